"""A simulated city: traffic that is good enough to learn from where no data are at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, get_args

import numpy as np

from stlora_peft.data.city import City
from stlora_peft.data.conditions import capacity_left, hourly_rules, rain
from stlora_peft.data.detectors import count_vehicles, measure_speed, missing_readings
from stlora_peft.data.roads import Character, Floats, Ints, RoadNetwork, build_roads
from stlora_peft.data.traffic import KINDS, NodeTraits, day_profiles, demand, draw_traits, drive
from stlora_peft.data.validation import check_option, checked_interval, checked_start
from stlora_peft.errors import message

Quantity = Literal["speed", "flow", "both"]

UNITS = {
    "speed": "speed (km/h)",
    "flow": "flow (vehicles per step)",
    "both": "speed (km/h), flow (vehicles per step)",
}
MIXES: Mapping[str, Mapping[str, float]] = {
    "radial": {"arterial": 0.45, "downtown": 0.15, "residential": 0.30, "leisure": 0.10},
    "grid": {"arterial": 0.25, "downtown": 0.30, "residential": 0.25, "leisure": 0.20},
}
KM_PER_DEGREE = 111.2


def simulate_city(
    num_nodes: int = 50,
    days: float = 28,
    seed: int = 0,
    *,
    quantity: Quantity = "speed",
    character: Character = "radial",
    mix: Mapping[str, float] | None = None,
    interval_minutes: int = 5,
    start: str | datetime = "2024-01-01",
    name: str | None = None,
) -> City:
    r"""Simulate the traffic of a city of a given size, graph and mix of roads.

    All cities share the same physics; what differs between two of them, and strongly between the nodes of one, is
    where and how it plays out. So a backbone that was trained on one carries over to another, and learning its nodes
    pays: a node's free speed shows in its last readings, but when its peaks come, how high they are compared with its
    capacity, when its rules change, how deep it breaks down and how it recovers do not.

    **Roads.** Each node is a road section of length :math:`L_i` with a detector. Places are drawn along spokes or on
    a lattice, neighbours are the three nearest in either direction, plus the shortest edges that connect all.
    Traffic at node :math:`i` has a heading; the share :math:`\tau_{ij}` of it that leaves towards neighbour :math:`j`
    is a softmax over how well the edge follows the heading. Edge weights are :math:`\exp(-(t_{ij} / 1.5\,\bar t)^2)`
    with the free travel time :math:`t_{ij}` and its mean :math:`\bar t` over the edges.

    **Demand.** Vehicles per hour and lane that want to pass,

    .. math::
        d_i(t) = x_i C_i \; p_i(t) \; w(t) \, e^{m_i(t) + \varepsilon_i(t)}

    with capacity :math:`C_i`, saturation :math:`x_i` (0.5 to 1.5), daily profile :math:`p_i \le 1`, weekday factor
    :math:`w` (0.92 to 1.05), day's mood :math:`m` (3 %), and noise :math:`\varepsilon` (3 %) that lasts about 40
    minutes. A profile sums the bell curves of the node's kind for workdays or weekends (own phase, width and heights;
    inbound roads lean to the morning, outbound ones to the afternoon) and a surge at the node's own hour of every
    day. What upstream nodes served of their own demand arrives, or fails to, a travel time later, and a fuller
    section drives some away:

    .. math::
        a_i(t) = d_i(t) \, (1 - g_i \phi_i(t))
                 \Big(1 - u_i + u_i \sum_j \rho_{ji} \frac{f_j(t - t_{ji})}{d_j(t - t_{ji})}\Big)

    with fullness :math:`\phi_i`, diversion :math:`g_i` (0.3 to 0.9), dependence on upstream :math:`u_i` (0.1 to 0.6)
    and :math:`\rho_{ji} = \tau_{ji} / \sum_k \tau_{ki}`.

    **Capacity.** It changes with the rules of the hour :math:`r_i` (signal plans, limits: 1, and 0.7 to 0.97 in the
    node's own 3 to 9 hours of every day), with the drivers (waves of 5 % that last 15 minutes) and incidents (0.25 to
    0.7 for about 40 minutes, one per node in 12 days), both in :math:`I_i`; it shrinks by rain :math:`R` (on every
    fifth day, some hours), behind an own queue, and by full sections downstream, whose jam arrives with the backward
    wave of 15 km/h after :math:`b_{ij}`:

    .. math::
        c_i(t) = C_i I_i(t) \sqrt{r_i(t)} \, (1 - 0.15 R(t)) \big(1 - \delta_i \min(4\phi_i(t), 1)\big)
                 \Big(1 - s_i \sum_j \tau_{ij}\, \phi_j(t - b_{ij})^2\Big)

    with capacity drop :math:`\delta_i` (0.02 to 0.12) and exposure to spillback :math:`s_i` (0.2 to 0.7).

    **Queue, flow, density, speed.** With step :math:`h`, queue :math:`q_i` and room :math:`Q_i = 0.8 \cdot 130\, L_i`
    (vehicles per lane; what finds no room drives elsewhere):

    .. math::
        f_i &= \min(c_i,\; a_i + q_i / h) \\
        q_i &\leftarrow \min(q_i + (a_i - f_i) h,\; Q_i), \qquad \phi_i = q_i / Q_i \\
        k_i &= f_i / v_i^{free} + q_i / L_i, \qquad
        v_i^{free} = V_i r_i (1 - 0.1\, e_i R) \big(1 - (1 - \kappa_i) \min(f_i / C_i, 1)^2\big) \\
        v_i &= \max(f_i / k_i,\; 3)

    which is the fundamental diagram :math:`f = k v`: a free branch that falls from the free speed :math:`V_i` to
    :math:`\kappa_i V_i` (0.5 to 0.9) at capacity, and a congested branch where the queue adds density and no flow.
    Drivers mind the rain by :math:`e_i` (0.5 to 1.5).

    **Detectors.** Speed: own gain (4 %), drift (2 % over days), 0.8 km/h of noise, and the spread between vehicles
    (3 to 8 km/h) divided by the square root of their number. Flow: Poisson counts with an own share of missed
    vehicles. Readings are lost one by one (0.3 %), in gaps of about 45 minutes, and, in one sensor of 25 (of cities
    with 10 or more), for 30 to 60 % of the record.

    The traffic moves in steps of at most 5 minutes whatever the interval, starting with empty roads.

    Args:
        num_nodes: Number :math:`N` of sensors.
        days: Length of the record in days.
        seed: Same seed and options, same city. The roads and their traits do not depend on ``days``, ``quantity``,
            ``start`` or ``interval_minutes``.
        quantity: ``"speed"``, ``"flow"``, or ``"both"`` as two channels.
        character: ``"radial"`` (spokes, many arterials, tidal traffic) or ``"grid"`` (a lattice, much downtown).
        mix: Shares of the kinds of road ``"arterial"``, ``"downtown"``, ``"residential"``, ``"leisure"``, scaled to
            a sum of 1; None takes those of the character.
        interval_minutes: Minutes between two readings.
        start: Local time of the first reading.
        name: Name of the city; None makes one of character and seed.

    Returns:
        The city, with node ids that hold character and seed.

    Shapes:
        - **values:** :math:`(T, N, 1)`, or :math:`(T, N, 2)` for both

    Units:
        Speed in km/h; flow in vehicles per step over all lanes; coordinates in degrees around latitude 0.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> city = simulate_city(num_nodes=20, days=2, seed=1)
        >>> city.values.shape, city.name
        ((576, 20, 1), 'radial-1')

    References:
        Daganzo, The cell transmission model, Transportation Research B 28 (1994): sending and receiving flows and
        the backward wave. Bureau of Public Roads, Traffic assignment manual (1964): speed that falls with a power of
        flow / capacity. Differs from both: point queues with a delay on the edges, so that a step may be minutes
        long; vehicles that find no room leave the network.
    """
    check_option("quantity", quantity, get_args(Quantity))
    check_option("character", character, get_args(Character))
    _require(num_nodes >= 1, "num_nodes", "at least 1", num_nodes)
    _require(seed >= 0, "seed", "at least 0", seed)
    interval = checked_interval("simulated city", interval_minutes)
    begin = checked_start("simulated city", start)
    if begin is None:
        raise _out_of_range("start", "an ISO time", start)
    num_steps = round(days * 1440 / interval) if math.isfinite(days) else 0
    _require(num_steps >= 1, "days", f"at least one step of {interval} minutes", days)

    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(7)]
    roads = build_roads(num_nodes, character, streams[0])
    traits = draw_traits(_kinds(roads, MIXES[character] if mix is None else mix, streams[1]), streams[1])
    minutes = _minutes(num_steps, interval, begin)
    profile = day_profiles(traits, roads.tidal, streams[1], minutes)
    known, place = np.unique(minutes % 1440, return_inverse=True)
    rule = hourly_rules(num_nodes, streams[1], known)[place]
    speed, vehicles = _traffic(roads, traits, profile, rule, minutes, num_steps, interval, streams[2:4])
    readings = _readings(speed, vehicles, quantity, interval, streams[4:])
    return City(
        values=readings.astype(np.float32),
        edge_index=roads.edge_index,
        edge_weight=_weights(roads, traits).astype(np.float32),
        interval_minutes=interval,
        node_ids=tuple(f"{character}{seed}-{i:03d}" for i in range(num_nodes)),
        start=begin,
        coordinates=(roads.position[:, ::-1] / KM_PER_DEGREE).astype(np.float32),
        name=f"{character}-{seed}" if name is None else name,
        quantity=UNITS[quantity],
    )


def _kinds(roads: RoadNetwork, mix: Mapping[str, float], rng: np.random.Generator) -> Ints:
    """Give each node a kind: the mix to the node, downtown where the centre is."""
    unknown = sorted(set(mix) - set(KINDS))
    _require(not unknown, "mix", f"shares of {', '.join(KINDS)}", ", ".join(unknown))
    weights = np.array([mix.get(kind, 0.0) for kind in KINDS], dtype=float)
    usable = bool(np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0)
    _require(usable, "mix", "shares of at least 0 that are not all 0", dict(mix))
    num_nodes = len(roads.position)
    ends = np.round(np.cumsum(weights) / weights.sum() * num_nodes).astype(int)
    counts = np.diff(ends, prepend=0)
    centrality = np.linalg.norm(roads.position, axis=1) * np.exp(rng.normal(0, 0.25, num_nodes))
    order = np.argsort(centrality, kind="stable")
    downtown = list(KINDS).index("downtown")
    central, outer = order[: counts[downtown]], rng.permutation(order[counts[downtown] :])
    kinds = np.full(num_nodes, downtown, dtype=np.int64)
    others = [number for number in range(len(KINDS)) if number != downtown]
    kinds[outer] = np.repeat(others, counts[others])
    kinds[central] = downtown
    return kinds


def _minutes(num_steps: int, interval: int, begin: datetime) -> Ints:
    """Minutes from a Monday's midnight to each step of the simulation, several to an interval."""
    step = _step(interval)
    first = begin.weekday() * 1440 + begin.hour * 60 + begin.minute
    return first + step * np.arange(num_steps * (interval // step))


def _step(interval: int) -> int:
    """Minutes in a step of the simulation."""
    return max(minutes for minutes in range(1, 6) if interval % minutes == 0)


def _traffic(
    roads: RoadNetwork,
    traits: NodeTraits,
    profile: Floats,
    rule: Floats,
    minutes: Ints,
    num_steps: int,
    interval: int,
    streams: list[np.random.Generator],
) -> tuple[Floats, Floats]:
    """True speed (km/h) and vehicles per step over all lanes, averaged over each interval."""
    step = _step(interval)
    parts = interval // step
    wet = rain(minutes, streams[1])
    left = capacity_left(len(minutes), len(traits.kind), step, streams[1])
    wanted = demand(profile, traits, minutes, streams[0])
    capacity = traits.capacity * left * np.sqrt(rule) * (1 - 0.15 * wet)[:, None]
    free_speed = traits.free_speed * rule * (1 - 0.10 * wet[:, None] * traits.rain)
    flow, density = drive(wanted, capacity, free_speed, traits, roads, step)
    mean_flow = flow.reshape(num_steps, parts, -1).mean(axis=1)
    mean_density = density.reshape(num_steps, parts, -1).mean(axis=1)
    return mean_flow / mean_density, mean_flow * traits.lanes * interval / 60


def _readings(
    speed: Floats, vehicles: Floats, quantity: Quantity, interval: int, streams: list[np.random.Generator]
) -> Floats:
    """What the detectors report of the asked quantity, NaN where a reading is lost."""
    channels = []
    if quantity != "flow":
        channels.append(measure_speed(speed, vehicles, interval, streams[0]))
    if quantity != "speed":
        channels.append(count_vehicles(vehicles, interval, streams[1]))
    lost = missing_readings(len(speed), speed.shape[1], interval, streams[2])
    return np.where(lost[..., None], np.nan, np.stack(channels, axis=-1))


def _weights(roads: RoadNetwork, traits: NodeTraits) -> Floats:
    """Weight of each edge from its free travel time."""
    source, target = roads.edge_index
    minutes = 60 * roads.length_km / (0.5 * (traits.free_speed[source] + traits.free_speed[target]))
    weights: Floats = np.exp(-((minutes / (1.5 * minutes.mean())) ** 2)) if len(minutes) else minutes
    return weights


def _require(holds: bool, option: str, expected: str, got: Any) -> None:
    """Raise where an option is out of its range."""
    if not holds:
        raise _out_of_range(option, expected, got)


def _out_of_range(option: str, expected: str, got: Any) -> ValueError:
    """Error about an option."""
    where = f"simulated city: option '{option}' is out of range"
    return ValueError(message(where, expected=expected, got=repr(got), fix=f"give another {option}"))
