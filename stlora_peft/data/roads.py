"""Road network of a simulated city: places, headings, kinds of road, and the edges between neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.spatial import Delaunay, cKDTree

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
    count = min(NEIGHBOURS, num_nodes - 1)
    nearest = cKDTree(position).query(position, count + 1)[1].reshape(num_nodes, -1)[:, 1:]  # itself comes first
    pairs = np.stack([np.repeat(np.arange(num_nodes), count), nearest.ravel()])
    parts, label = _components(pairs, num_nodes)
    if parts > 1:
        pairs = np.concatenate([pairs, _bridges(position, label, parts)], axis=1)
    numbers = np.unique(np.concatenate([pairs[0] * num_nodes + pairs[1], pairs[1] * num_nodes + pairs[0]]))
    return np.stack([numbers // num_nodes, numbers % num_nodes]).astype(np.int64)


def _components(pairs: Ints, num_nodes: int) -> tuple[int, Ints]:
    """Number of the parts that are not joined, and the part of each node."""
    ones = np.ones(pairs.shape[1], dtype=np.int8)
    parts, label = connected_components(csr_array((ones, tuple(pairs)), shape=(num_nodes, num_nodes)), directed=False)
    return int(parts), label


def _bridges(position: Floats, label: Ints, parts: int) -> Ints:
    """The shortest edges that join all parts: the least spanning tree of the parts.

    The shortest edge from any set of places to all others is an edge of the Delaunay triangulation.
    """
    corners = Delaunay(position).simplices
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]]).T
    ends = np.sort(label[edges], axis=0)
    edges, ends = edges[:, ends[0] != ends[1]], ends[:, ends[0] != ends[1]]
    length = np.linalg.norm(position[edges[0]] - position[edges[1]], axis=1)
    order = np.argsort(length, kind="stable")
    _, first = np.unique(ends[0, order] * parts + ends[1, order], return_index=True)
    shortest = order[first]  # of the edges between two parts
    place = coo_array((length[shortest], tuple(ends[:, shortest])), shape=(parts, parts)).tocsr()
    tree = minimum_spanning_tree(place).tocoo()
    numbers = ends[0, shortest] * parts + ends[1, shortest]
    kept = np.isin(numbers, tree.row.astype(np.int64) * parts + tree.col)
    return edges[:, shortest[kept]]
