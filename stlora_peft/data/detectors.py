"""What the detectors of a simulated city make of its traffic."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from stlora_peft.data.conditions import wander
from stlora_peft.data.roads import Floats


def measure_speed(speed: Floats, vehicles: Floats, interval_minutes: int, rng: np.random.Generator) -> Floats:
    """Mean speed of the vehicles that pass: own gain, drift, and the spread of the few that are averaged.

    Args:
        speed: True speed (T, N), km/h.
        vehicles: Vehicles that pass in each step (T, N).
        interval_minutes: Minutes in a step.
        rng: Source of randomness.

    Returns:
        Measured speed, km/h, at least 0.
    """
    spread = rng.uniform(3, 8, speed.shape[1])  # km/h between vehicles
    noise = np.sqrt(0.8**2 + spread**2 / np.maximum(vehicles, 1)) * rng.normal(size=speed.shape)
    gain = rng.normal(1, 0.04, speed.shape[1]) + _drift(speed.shape, interval_minutes, rng)
    return np.maximum(speed * gain + noise, 0)


def count_vehicles(vehicles: Floats, interval_minutes: int, rng: np.random.Generator) -> Floats:
    """Vehicles that the detector counts: whole numbers, of which it misses its own share.

    Args:
        vehicles: Expected vehicles in each step (T, N).
        interval_minutes: Minutes in a step.
        rng: Source of randomness.

    Returns:
        Counts.
    """
    gain = rng.uniform(0.85, 1.02, vehicles.shape[1]) + _drift(vehicles.shape, interval_minutes, rng)
    return rng.poisson(vehicles * np.maximum(gain, 0)).astype(np.float64)


def missing_readings(
    num_steps: int, num_nodes: int, interval_minutes: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Which readings are lost: single ones, gaps of about 45 minutes, and a few sensors for much of the record.

    Args:
        num_steps: Length of the record.
        num_nodes: Number of sensors.
        interval_minutes: Minutes in a step.
        rng: Source of randomness.

    Returns:
        True where lost (T, N); every sensor keeps some readings.
    """
    lost = rng.random((num_steps, num_nodes)) < 0.003
    count = int(rng.poisson(0.15 * num_nodes * num_steps * interval_minutes / 1440))
    start, node = rng.integers(num_steps, size=count), rng.integers(num_nodes, size=count)
    length = np.ceil(45 * np.exp(rng.normal(0, 0.8, count)) / interval_minutes).astype(int)
    for t, i, steps in zip(start, node, length, strict=True):
        lost[t : t + steps, i] = True
    for i in rng.permutation(num_nodes)[: math.ceil(num_nodes / 25) if num_nodes >= 10 else 0]:
        share = rng.uniform(0.3, 0.6)
        begin = int(rng.uniform(0, 1 - share) * num_steps)
        lost[begin : begin + int(share * num_steps), i] = True
    lost[:, lost.all(axis=0)] = False
    return lost


def _drift(shape: tuple[int, ...], interval_minutes: int, rng: np.random.Generator) -> Floats:
    """Slow change of a detector's gain, 2 % over some days."""
    return wander(shape, keep=math.exp(-interval_minutes / (3 * 1440)), std=0.02, rng=rng)
