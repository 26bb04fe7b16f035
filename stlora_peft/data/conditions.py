"""What the hour, the drivers, incidents and the weather do to the roads of a simulated city."""

from __future__ import annotations

import math

import numpy as np

from stlora_peft.data.roads import Floats, Ints


def hourly_rules(num_nodes: int, rng: np.random.Generator, minutes: Ints | None = None) -> Floats:
    """Share of the free speed that the rules of the hour leave: signal plans, speed limits, parking.

    Args:
        num_nodes: Number of nodes.
        rng: Source of randomness.
        minutes: Minutes of the day that are asked for; None for all of them.

    Returns:
        Shares (1440, N), or (T, N), over the minutes of any day: 1, and 0.7 to 0.97 in the node's own 3 to 9 hours,
        with soft edges since drivers do not change all at once.
    """
    begin, hours = rng.uniform(0, 24, num_nodes), rng.uniform(3, 9, num_nodes)
    lost = 1 - rng.uniform(0.7, 0.97, num_nodes)
    if minutes is None:
        minutes = np.arange(1440)
    from_middle = np.abs((minutes[:, None] / 60 - begin - hours / 2 + 12) % 24 - 12)
    rules: Floats = 1 - lost / (1 + np.exp((from_middle - hours / 2) / 0.4))
    return rules


def capacity_left(num_steps: int, num_nodes: int, step_minutes: int, rng: np.random.Generator) -> Floats:
    """Share of the capacity that drivers' behaviour and incidents leave (T, N).

    Args:
        num_steps: Length of the record.
        num_nodes: Number of nodes.
        step_minutes: Minutes in a step.
        rng: Source of randomness.

    Returns:
        About 1 with waves of 5 % that last 15 minutes; 0.25 to 0.7 of that in an incident of about 40 minutes, of
        which each node has one in 12 days.
    """
    left = np.exp(wander((num_steps, num_nodes), keep=math.exp(-step_minutes / 15), std=0.05, rng=rng))
    count = int(rng.poisson(num_nodes * num_steps * step_minutes / (12 * 1440)))
    start, node = rng.integers(num_steps, size=count), rng.integers(num_nodes, size=count)
    length = np.ceil(40 * np.exp(rng.normal(0, 0.5, count)) / step_minutes).astype(int)
    severity = rng.uniform(0.25, 0.7, count)
    for t, i, steps, share in zip(start, node, length, severity, strict=True):
        left[t : t + steps, i] *= share
    return left


def rain(minutes: Ints, rng: np.random.Generator) -> Floats:
    """Intensity of rain (T,) from 0 to 1: on every fifth day for 2 to 8 hours, over the whole city."""
    wet = np.zeros(len(minutes))
    for day in range(int(minutes[0]) // 1440, int(minutes[-1]) // 1440 + 1):
        falls, start, hours, intensity = rng.random(), rng.uniform(0, 20), rng.uniform(2, 8), rng.uniform(0.4, 1)
        if falls < 0.2:
            into = (minutes - 1440 * day) / 60 - start
            wet = np.maximum(wet, intensity * np.clip(2 * np.minimum(into, hours - into), 0, 1))
    return wet


def wander(shape: tuple[int, ...], keep: float, std: float, rng: np.random.Generator) -> Floats:
    """Mean-reverting random walk along axis 0 that keeps a share of itself at each step."""
    path: Floats = rng.normal(0, std * math.sqrt(1 - keep**2), shape)
    path[0] = rng.normal(0, std, shape[1:])
    for t in range(1, len(path)):
        path[t] += keep * path[t - 1]
    return path
