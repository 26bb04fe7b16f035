"""Parts of a large graph, each with the neighbours that its nodes hear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components
from torch import Tensor

from stlora_peft.errors import message

Ints: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class SubGraph:
    """Some nodes of a graph and the edges between them.

    Args:
        node_ids: Their numbers in the whole graph, the core first, then the halo.
        edge_index: Edges between them, numbered by their place in ``node_ids``.
        edge_weight: Weights of these edges.
        num_core: Number of nodes that this part is about; the others are only there to be heard.

    Shapes:
        - **node_ids:** :math:`(n,)`, int64; **edge_index:** :math:`(2, e)`, int64; **edge_weight:** :math:`(e,)`
    """

    node_ids: Tensor
    edge_index: Tensor
    edge_weight: Tensor
    num_core: int

    @property
    def core(self) -> Tensor:
        """Numbers of the core's nodes in the whole graph."""
        return self.node_ids[: self.num_core]

    def to(self, device: torch.device | str) -> SubGraph:
        """Copy the part to a device."""
        ids, edges, weight = (tensor.to(device) for tensor in (self.node_ids, self.edge_index, self.edge_weight))
        return SubGraph(ids, edges, weight, self.num_core)


class Neighbourhoods:
    """A graph from which sub-graphs are cut at a cost that is theirs, not that of the whole graph.

    Args:
        edge_index: Directed edges, source above target.
        edge_weight: Weight of each edge.
        num_nodes: Number of nodes.

    Example:
        >>> chain = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
        >>> part = Neighbourhoods(chain, torch.ones(4), num_nodes=5).around(torch.tensor([4, 3]), hops=1)
        >>> part.node_ids.tolist(), part.edge_index.tolist(), part.num_core
        ([4, 3, 2], [[2, 1], [1, 0]], 2)
    """

    def __init__(self, edge_index: Tensor, edge_weight: Tensor, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self._edges, self._weight = edge_index.cpu(), edge_weight.cpu()
        source, target = self._edges.numpy()
        self._order = np.argsort(target, kind="stable")
        self._starts = np.concatenate([[0], np.bincount(target, minlength=num_nodes).cumsum()])
        joined = np.concatenate([source, target]), np.concatenate([target, source])
        self._joined = csr_array((np.ones(len(joined[0]), dtype=np.int8), joined), shape=(num_nodes, num_nodes))
        self._place = np.full(num_nodes, -1)  # of each node in the part that is being cut

    def around(self, core: Tensor, hops: int) -> SubGraph:
        """Cut the part of some nodes and of all that are at most so many edges away, in either direction.

        Args:
            core: Numbers of the nodes.
            hops: Depth of the halo.
        """
        place = self._place
        ids = front = core.cpu().numpy()
        place[ids] = np.arange(len(ids))
        for _ in range(hops):
            reached = np.unique(_entries(self._joined.indptr, self._joined.indices, front))
            front = reached[place[reached] < 0]
            place[front] = len(ids) + np.arange(len(front))
            ids = np.concatenate([ids, front])
        edges = np.sort(_entries(self._starts, self._order, ids))
        source, target = place[self._edges.numpy()[:, edges]]
        edges, ends = edges[source >= 0], np.stack([source, target])[:, source >= 0]
        place[ids] = -1
        return SubGraph(torch.from_numpy(ids), torch.from_numpy(ends), self._weight[edges], len(core))

    def blocks(self, nodes_per_step: int) -> list[Tensor]:
        """Divide the nodes into compact blocks of nearly one size, by halving again and again.

        A half is what a search that starts at the rim of the graph reaches first.

        Args:
            nodes_per_step: Nodes in one block at most.
        """
        found: list[Tensor] = []
        count = -(-self.num_nodes // nodes_per_step)
        stack = [(np.arange(self.num_nodes), self._joined, count)]
        while stack:
            ids, graph, parts = stack.pop()
            if parts == 1:
                found.append(torch.from_numpy(np.sort(ids)))
                continue
            first = parts // 2
            order = _from_the_rim(graph)
            cut = len(ids) * first // parts
            for half, number in ((order[cut:], parts - first), (order[:cut], first)):
                stack.append((ids[half], graph[half][:, half], number))
        return found


def partition(
    edge_index: Tensor, edge_weight: Tensor, num_nodes: int, *, nodes_per_step: int, hops: int
) -> list[SubGraph]:
    r"""Divide a graph into parts, every node in the core of exactly one, with a halo of neighbours.

    A network whose nodes hear others at most :math:`k` edges away forecasts the core of a part as in the whole graph
    if ``hops`` is :math:`k`; if it also divides by degrees, one hop more. The halo follows edges in both directions.

    Args:
        edge_index: Directed edges, source above target.
        edge_weight: Weight of each edge.
        num_nodes: Number of nodes :math:`N`.
        nodes_per_step: Nodes in a core at most.
        hops: Depth of the halo.

    Returns:
        The parts, the same for the same graph.

    Shapes:
        - **edge_index:** :math:`(2, E)`; **edge_weight:** :math:`(E,)`

    Raises:
        ValueError: If ``nodes_per_step`` is below 1 or ``hops`` below 0.

    Example:
        >>> nodes = torch.arange(6)
        >>> ring = torch.stack([nodes, (nodes + 1) % 6])
        >>> parts = partition(ring, torch.ones(6), 6, nodes_per_step=3, hops=1)
        >>> [(part.num_core, len(part.node_ids)) for part in parts]
        [(3, 5), (3, 5)]

    References:
        Training on parts: Chiang et al. (Cluster-GCN), KDD 2019, arXiv:1905.07953. Differs: parts come from halving
        by breadth-first search instead of METIS, and nodes keep the neighbours that lie in other parts.
    """
    for name, value, least in (("nodes_per_step", nodes_per_step, 1), ("hops", hops, 0)):
        if value < least:
            raise ValueError(
                message(
                    f"the graph cannot be divided with this '{name}'",
                    expected=f"{name} >= {least}",
                    got=f"{name}={value}",
                    fix="give for instance nodes_per_step=1000 and hops=2",
                )
            )
    graph = Neighbourhoods(edge_index, edge_weight, num_nodes)
    return [graph.around(block, hops) for block in graph.blocks(nodes_per_step)]


def _entries(starts: Ints, values: Ints, rows: Ints) -> Ints:
    """Values of some rows of a matrix in CSR form, one row after the other."""
    begin, count = starts[rows], starts[rows + 1] - starts[rows]
    shift = np.repeat(begin - (count.cumsum() - count), count)
    return values[shift + np.arange(len(shift))]


def _from_the_rim(graph: csr_array) -> Ints:
    """Nodes in the order of a breadth-first search from one that is far from the others."""
    graph = _connected(graph)
    far = 0
    for _ in range(2):  # the last one of a search lies at the rim
        far = int(breadth_first_order(graph, far, directed=False, return_predecessors=False)[-1])
    return np.asarray(breadth_first_order(graph, far, directed=False, return_predecessors=False), dtype=np.int64)


def _connected(graph: csr_array) -> csr_array:
    """The graph with its components in a chain, one edge between each and the next."""
    count, labels = connected_components(graph, directed=False)
    if count == 1:
        return graph
    first = np.unique(labels, return_index=True)[1]
    links = csr_array((np.ones(count - 1, dtype=graph.dtype), (first[:-1], first[1:])), shape=graph.shape)
    return graph + links + links.T
