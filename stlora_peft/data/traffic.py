"""Traffic of a simulated city: who wants to drive when, and what the roads make of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stlora_peft.data.conditions import wander
from stlora_peft.data.roads import Floats, Ints, RoadNetwork, shares

JAM_DENSITY = 130.0  # vehicles per km and lane at standstill
WAVE_SPEED = 15.0  # km/h at which a jam grows backwards
LEAST_SPEED = 3.0  # km/h
WEEKDAY_FACTOR = np.array([0.97, 1.0, 1.0, 1.02, 1.05, 1.0, 0.92])  # Monday first
_BLOCK = 256  # nodes whose days are computed together, in the cache of a processor


@dataclass(frozen=True)
class NodeKind:
    """Ranges from which the roads of one kind are drawn, and when people use them.

    Humps are (hour, width in hours, height) of a bell curve over the day. On workdays the first is the morning, the
    third the afternoon peak.
    """

    free_speed: tuple[float, float]  # km/h
    capacity: tuple[float, float]  # vehicles per hour and lane
    lanes: tuple[int, int]
    saturation: float  # median of peak demand / capacity
    night: float  # demand at night / peak demand
    workday: tuple[tuple[float, float, float], ...]
    weekend: tuple[tuple[float, float, float], ...]


KINDS: Mapping[str, NodeKind] = {
    "arterial": NodeKind(
        (85, 112),
        (1700, 2100),
        (2, 4),
        1.12,
        0.10,
        ((7.8, 1.2, 0.8), (12.8, 3.5, 0.55), (17.3, 1.6, 0.85), (20.5, 2.0, 0.2)),
        ((13.5, 3.5, 0.65), (18.5, 2.2, 0.35)),
    ),
    "downtown": NodeKind(
        (52, 72),
        (650, 900),
        (1, 3),
        1.08,
        0.08,
        ((8.8, 1.4, 0.65), (13.0, 3.0, 0.75), (17.5, 1.6, 0.65), (20.5, 2.0, 0.25)),
        ((14.5, 3.2, 0.55), (20.0, 2.2, 0.35)),
    ),
    "residential": NodeKind(
        (58, 82),
        (800, 1100),
        (1, 2),
        1.08,
        0.05,
        ((7.5, 1.0, 0.95), (13.0, 3.0, 0.30), (18.0, 1.5, 0.75), (20.5, 1.8, 0.2)),
        ((11.5, 2.5, 0.5), (17.5, 2.5, 0.4)),
    ),
    "leisure": NodeKind(
        (68, 95),
        (1000, 1400),
        (1, 2),
        1.08,
        0.05,
        ((8.5, 1.5, 0.2), (14.0, 3.0, 0.4), (18.5, 2.0, 0.55), (20.8, 1.8, 0.45)),
        ((12.5, 2.6, 0.8), (17.0, 2.4, 0.95), (21.0, 1.6, 0.4)),
    ),
}


@dataclass(frozen=True)
class NodeTraits:
    """What is particular to each road section; every entry is an array over the nodes."""

    kind: Ints
    free_speed: Floats  # km/h
    capacity: Floats  # vehicles per hour and lane
    lanes: Floats
    length_km: Floats
    saturation: Floats  # peak demand / capacity
    speed_at_capacity: Floats  # share of the free speed
    capacity_drop: Floats  # share of the capacity lost behind a queue
    upstream: Floats  # share of the demand that hangs on upstream sections
    diversion: Floats  # share of the demand that a full section drives away
    spillback: Floats  # share of the capacity that full sections downstream can take
    rain: Floats  # how strongly rain slows drivers
    phase_hours: Floats  # how much later than its kind's the node's day is
    stretch: Floats  # how much wider its peaks are


def draw_traits(kind: Ints, rng: np.random.Generator) -> NodeTraits:
    """Draw the traits of every node from the ranges of its kind.

    Args:
        kind: Number of each node's kind, in the order of :data:`KINDS`.
        rng: Source of randomness.

    Returns:
        The traits.
    """
    kinds = list(KINDS.values())
    n = len(kind)

    def between(name: str) -> Floats:
        low, high = np.array([getattr(k, name) for k in kinds], dtype=float)[kind].T
        drawn: Floats = rng.uniform(low, high)
        return drawn

    median = np.array([k.saturation for k in kinds])[kind]
    return NodeTraits(
        kind=kind,
        free_speed=between("free_speed"),
        capacity=between("capacity"),
        lanes=np.round(between("lanes")),
        length_km=rng.uniform(0.8, 2.5, n),
        saturation=np.clip(median * np.exp(rng.normal(0, 0.20, n)), 0.5, 1.5),
        speed_at_capacity=rng.uniform(0.5, 0.9, n),
        capacity_drop=rng.uniform(0.02, 0.12, n),
        upstream=rng.uniform(0.1, 0.6, n),
        diversion=rng.uniform(0.3, 0.9, n),
        spillback=rng.uniform(0.2, 0.7, n),
        rain=rng.uniform(0.5, 1.5, n),
        phase_hours=rng.normal(0, 0.8, n),
        stretch=np.exp(rng.normal(0, 0.2, n)),
    )


def day_profiles(traits: NodeTraits, tidal: Floats, rng: np.random.Generator, minutes: Ints | None = None) -> Floats:
    """Demand over each minute of a workday and of a weekend day, as a share of the node's peak.

    Args:
        traits: Traits of the nodes.
        tidal: 1 for inbound, -1 for outbound roads; shifts weight between morning and afternoon.
        rng: Source of randomness.
        minutes: Minutes from a Monday's midnight at which alone it is asked for; then the days of many nodes, of which
            only the peaks count, need no memory.

    Returns:
        Profiles (2, 1440, N) whose largest entry at each node is 1; their entries (T, N) at the minutes where given.
    """
    kinds = list(KINDS.values())
    members = [np.flatnonzero(traits.kind == number) for number in range(len(kinds))]
    heights = [_peak_heights(kind, tidal[nodes], rng) for kind, nodes in zip(kinds, members, strict=True)]
    surge = _daily_surges(len(traits.kind), rng)
    days = slice(None) if minutes is None else (minutes // 1440 % 7 >= 5).astype(int)
    rows = slice(None) if minutes is None else minutes % 1440
    shape = (2, 1440) if minutes is None else (len(minutes),)
    profiles = np.empty((*shape, len(traits.kind)))
    for kind, nodes, height in zip(kinds, members, heights, strict=True):
        for start in range(0, len(nodes), _BLOCK):
            some = nodes[start : start + _BLOCK]
            block = _profiles(kind, traits, some, [day[:, start : start + _BLOCK] for day in height])
            block += _surge(surge[:, some])
            profiles[..., some] = (block / block.max(axis=(0, 1)))[days, rows]
    return profiles


def _peak_heights(kind: NodeKind, tidal: Floats, rng: np.random.Generator) -> list[Floats]:
    """Heights of the peaks of a workday and of a weekend day (humps, N) at nodes of one kind."""
    heights = []
    for day, humps in enumerate((kind.workday, kind.weekend)):
        height = np.array([h for _, _, h in humps])[:, None] * np.exp(rng.normal(0, 0.2, (len(humps), len(tidal))))
        if day == 0:
            height[0] *= 1 + 0.6 * tidal
            height[2] *= 1 - 0.6 * tidal
        heights.append(height)
    return heights


def _profiles(kind: NodeKind, traits: NodeTraits, nodes: Ints, heights: list[Floats]) -> Floats:
    """Demand over the days (2, 1440, N) of some nodes of one kind, without a surge."""
    profiles = np.full((2, 1440, len(nodes)), kind.night)
    hours = np.arange(1440)[:, None] / 60
    for day, humps in enumerate((kind.workday, kind.weekend)):
        for (centre, width, _), size in zip(humps, heights[day], strict=True):
            away = (hours - centre - traits.phase_hours[nodes] + 12) % 24 - 12
            profiles[day] += size * np.exp(-0.5 * (away / (width * traits.stretch[nodes])) ** 2)
    return profiles


def _daily_surges(num_nodes: int, rng: np.random.Generator) -> Floats:
    """Hour, width and height (3, N) of the demand of the school, factory or market next to each node."""
    return np.stack(
        [rng.uniform(6, 21, num_nodes), rng.uniform(0.4, 0.8, num_nodes), rng.uniform(0.1, 0.6, num_nodes)]
    )


def _surge(drawn: Floats) -> Floats:
    """That demand over every day (1440, N)."""
    centre, width, height = drawn
    surge: Floats = height * np.exp(-0.5 * ((np.arange(1440)[:, None] / 60 - centre) / width) ** 2)
    return surge


def demand(profile: Floats, traits: NodeTraits, minutes: Ints, rng: np.random.Generator) -> Floats:
    """Vehicles per hour and lane that want to pass each node at each step.

    Args:
        profile: Result of :func:`day_profiles` at the minutes.
        traits: Traits of the nodes.
        minutes: Minutes from a Monday's midnight to each step.
        rng: Source of randomness.

    Returns:
        Demand (T, N): profile x weekday x day's mood x slow noise.
    """
    day = minutes // 1440
    weekday = day % 7
    share = profile * WEEKDAY_FACTOR[weekday][:, None]
    number = day - day[0]
    days = int(number[-1]) + 1
    mood = rng.normal(0, 0.02, (days, 1)) + rng.normal(0, 0.02, (days, len(traits.kind)))
    step = int(minutes[1] - minutes[0]) if len(minutes) > 1 else 5
    noise = wander(share.shape, keep=math.exp(-step / 40), std=0.03, rng=rng)
    wanted: Floats = share * np.exp(mood[number] + noise) * (traits.saturation * traits.capacity)
    return wanted


def drive(
    wanted: Floats, capacity: Floats, free_speed: Floats, traits: NodeTraits, roads: RoadNetwork, step_minutes: int
) -> tuple[Floats, Floats]:
    """Let the demand meet the roads, step by step; equations in :func:`stlora_peft.data.simulate_city`.

    Args:
        wanted: Demand (T, N) in vehicles per hour and lane.
        capacity: Capacity (T, N) before queues take their part, in vehicles per hour and lane.
        free_speed: Speed on the empty road (T, N), in km/h.
        traits: Traits of the nodes.
        roads: The network.
        step_minutes: Minutes in a step.

    Returns:
        Flow in vehicles per hour and lane, and density in vehicles per km and lane, both (T, N).
    """
    num_steps, n = wanted.shape
    source, target = roads.edge_index
    hours = step_minutes / 60
    forward = _lags(60 * roads.length_km / traits.free_speed[source], step_minutes)
    backward = _lags(60 * roads.length_km / WAVE_SPEED, step_minutes)
    arriving = shares(roads.turn_share, target, n) * traits.upstream[target]
    leaving = roads.turn_share * traits.spillback[source]
    own = 1 - np.bincount(target, weights=arriving, minlength=n)
    room = 0.8 * JAM_DENSITY * traits.length_km
    flow, density = np.empty_like(wanted), np.empty_like(wanted)
    served, full = np.ones_like(wanted), np.zeros_like(wanted)
    queue = np.zeros(n)
    for t in range(num_steps):
        platoon = np.bincount(target, arriving * served[np.maximum(t - forward, 0), source], minlength=n)
        blocked = np.bincount(source, leaving * full[np.maximum(t - backward, 0), target] ** 2, minlength=n)
        fullness = queue / room
        arrive = wanted[t] * (own + platoon) * (1 - traits.diversion * fullness)
        limit = capacity[t] * (1 - traits.capacity_drop * np.minimum(4 * fullness, 1)) * (1 - blocked)
        out = np.minimum(limit, arrive + queue / hours)
        queue = np.minimum(queue + (arrive - out) * hours, room)
        moving = free_speed[t] * (1 - (1 - traits.speed_at_capacity) * np.minimum(out / traits.capacity, 1) ** 2)
        flow[t] = out
        density[t] = out / moving + queue / traits.length_km
        served[t] = out / wanted[t]
        full[t] = queue / room
    return flow, np.minimum(density, flow / LEAST_SPEED)


def _lags(minutes: Floats, step_minutes: int) -> Ints:
    """Minutes as whole steps, at least 1."""
    return np.maximum(np.round(minutes / step_minutes), 1).astype(np.int64)
