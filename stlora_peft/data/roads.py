"""Road network of a simulated city: places, headings, kinds of road, and the edges between neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Character = Literal["radial", "grid"]

NEIGHBOURS = 3
SPACING_KM = 1.5
TURN_SHARPNESS = 3.0


@dataclass(frozen=True)
class RoadNetwork:
    """Road sections, one detector each, and the edges between neighbouring sections.

    Args:
        position: Place of each detector, in km from the city's centre.
        heading: Unit vector along which traffic passes the detector.
        tidal: How far that is towards the centre: 1 inbound, -1 outbound.
        edge_index: Directed edges; every pair of neighbours has both directions.
        length_km: Length of each edge.
        turn_share: Share of the traffic leaving the source that takes the edge; sums to 1 over the edges of a source.
    """

    position: Floats
    heading: Floats
    tidal: Floats
    edge_index: Ints
    length_km: Floats
    turn_share: Floats


def build_roads(num_nodes: int, character: Character, rng: np.random.Generator) -> RoadNetwork:
    """Draw a connected road network.

    Args:
        num_nodes: Number of detectors.
        character: ``"radial"`` (spokes towards a centre) or ``"grid"`` (a jittered lattice).
        rng: Source of randomness.

    Returns:
        The network.
    """
    position = _radial_places(num_nodes, rng) if character == "radial" else _grid_places(num_nodes, rng)
    heading = _headings(position, character, rng)
    outward = position / np.maximum(np.linalg.norm(position, axis=1, keepdims=True), 1e-9)
    edge_index = _neighbour_edges(position)
    step = position[edge_index[1]] - position[edge_index[0]]
    length = np.maximum(np.linalg.norm(step, axis=1), 0.1)
    along = (step * heading[edge_index[0]]).sum(axis=1) / length
    return RoadNetwork(
        position=position,
        heading=heading,
        tidal=-(heading * outward).sum(axis=1),
        edge_index=edge_index,
        length_km=length,
        turn_share=shares(np.exp(TURN_SHARPNESS * along), edge_index[0], num_nodes),
    )


def shares(amounts: Floats, owner: Ints, num_owners: int) -> Floats:
    """Divide each edge's amount by the sum over the edges of the same owner."""
    return amounts / np.bincount(owner, weights=amounts, minlength=num_owners)[owner]


def _radial_places(num_nodes: int, rng: np.random.Generator) -> Floats:
    """Places along spokes, denser towards the centre, with some in between."""
    radius = SPACING_KM * np.sqrt(num_nodes / np.pi) * rng.uniform(0.02, 1, num_nodes) ** 0.6
    spokes = int(rng.integers(5, 9))
    on_spoke = 2 * np.pi * (rng.integers(spokes, size=num_nodes) + rng.normal(0, 0.06, num_nodes)) / spokes
    angle = np.where(rng.random(num_nodes) < 0.7, on_spoke, rng.uniform(0, 2 * np.pi, num_nodes))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _grid_places(num_nodes: int, rng: np.random.Generator) -> Floats:
    """Places on a jittered square lattice, of which some crossings have no detector."""
    side = int(np.ceil(np.sqrt(1.2 * num_nodes)))
    crossings = np.sort(rng.permutation(side * side)[:num_nodes])
    lattice = np.stack([crossings % side, crossings // side], axis=1) - (side - 1) / 2
    return SPACING_KM * (lattice + rng.normal(0, 0.12, lattice.shape))


def _headings(position: Floats, character: Character, rng: np.random.Generator) -> Floats:
    """Directions of traffic: to or from the centre, some across; or along the streets of a grid."""
    num_nodes = len(position)
    if character == "grid":
        angle = np.pi / 2 * rng.integers(4, size=num_nodes)
    else:
        turn = rng.choice([0.0, np.pi, np.pi / 2, -np.pi / 2], size=num_nodes, p=[0.38, 0.38, 0.12, 0.12])
        angle = np.arctan2(position[:, 1], position[:, 0]) + turn + rng.normal(0, 0.2, num_nodes)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _neighbour_edges(position: Floats) -> Ints:
    """Both directions between each place and its nearest ones, and whatever it takes to connect all."""
    num_nodes = len(position)
    distance = np.linalg.norm(position[:, None] - position, axis=2)
    np.fill_diagonal(distance, np.inf)
    linked = np.zeros((num_nodes, num_nodes), dtype=bool)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : min(NEIGHBOURS, num_nodes - 1)]
    linked[np.arange(num_nodes)[:, None], nearest] = True
    linked |= linked.T
    reached = _reachable(linked)
    while not reached.all():
        gap = np.where(reached[:, None] & ~reached, distance, np.inf)
        source, target = np.unravel_index(gap.argmin(), gap.shape)
        linked[source, target] = linked[target, source] = True
        reached = _reachable(linked)
    return np.stack(np.nonzero(linked)).astype(np.int64)


def _reachable(linked: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which nodes can be reached from node 0."""
    reached = np.zeros(len(linked), dtype=bool)
    front = np.array([0])
    while len(front):
        reached[front] = True
        front = np.flatnonzero(linked[front].any(axis=0) & ~reached)
    return reached
