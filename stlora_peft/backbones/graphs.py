"""The road graph: checked, as a matrix, and as a union of copies."""

from __future__ import annotations

import torch
from torch import Tensor

from stlora_peft.errors import message


def check_graph(edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int) -> None:
    """Refuse edges that do not fit the nodes; a compiler, which knows no values, is not asked.

    Args:
        edge_index: Edges, source above target.
        edge_weight: Weights of the edges.
        num_nodes: Number of nodes.

    Raises:
        ValueError: If the shape, the type or a number of a node is wrong, or the weights are too many or too few.
    """
    if torch.compiler.is_compiling():
        return
    is_tensor = isinstance(edge_index, Tensor)
    if not is_tensor or edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point():
        _refuse_graph(
            "edge_index of shape (2, E), integer node numbers",
            f"shape {tuple(edge_index.shape)}, {edge_index.dtype}" if is_tensor else type(edge_index).__name__,
            "put the sources in the first row and the targets in the second; without edges they are "
            "torch.empty(2, 0, dtype=torch.long)",
        )
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < num_nodes:
        _refuse_graph(
            f"node numbers from 0 to {num_nodes - 1}, for N={num_nodes} nodes",
            f"numbers from {int(edge_index.min())} to {int(edge_index.max())}",
            "give the graph of the city that x belongs to",
        )
    if edge_weight is not None and edge_weight.shape != edge_index.shape[1:]:
        _refuse_graph(
            f"edge_weight of shape ({edge_index.shape[1]},), one for each edge",
            f"shape {tuple(edge_weight.shape)}",
            "give one weight for each column of edge_index, or none at all",
        )


def dense_graph(edge_index: Tensor, edge_weight: Tensor | None, x: Tensor) -> Tensor:
    """Matrix of the edge weights, source above target, parallel edges summed.

    Args:
        edge_index: Edges, source above target, as :func:`check_graph` passes them.
        edge_weight: Weights of the edges; all one where absent.
        x: Input whose type and device the matrix takes, nodes on axis 2.

    Shapes:
        - **x:** ``[b t n c]``
        - **output:** :math:`(N, N)`

    Example:
        >>> dense_graph(torch.tensor([[0, 0], [1, 1]]), None, torch.zeros(1, 1, 2, 1))
        tensor([[0., 2.],
                [0., 0.]])
    """
    weight = x.new_ones(edge_index.shape[1]) if edge_weight is None else edge_weight.to(x.dtype)
    empty = x.new_zeros(x.shape[2], x.shape[2])
    return empty.index_put((edge_index[0], edge_index[1]), weight, accumulate=True)


def union(edge_index: Tensor, edge_values: Tensor, copies: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Join copies of a graph into one, so that row ``i`` is node ``i % num_nodes``.

    Args:
        edge_index: Edges of one copy, source above target.
        edge_values: What belongs to the edges, on its last axis.
        copies: Number of copies.
        num_nodes: Number of nodes of one copy.

    Returns:
        Edges and edge values of the union.

    Example:
        >>> edges, weights = union(torch.tensor([[0], [1]]), torch.tensor([0.5]), copies=2, num_nodes=3)
        >>> edges.tolist(), weights.tolist()
        ([[0, 3], [1, 4]], [0.5, 0.5])
    """
    shift = torch.arange(copies, device=edge_index.device)[:, None] * num_nodes
    edges = (edge_index[:, None] + shift).flatten(1)
    return edges, torch.cat([edge_values] * copies, dim=-1)


def _refuse_graph(expected: str, got: str, fix: str) -> None:
    """Raise the error of an unfit graph."""
    raise ValueError(message("the graph does not fit the nodes", expected=expected, got=got, fix=fix))


def transition(weights: Tensor) -> Tensor:
    r"""Divide every row by its sum, :math:`P = D^{-1} W`; a row of zeros stays one.

    Args:
        weights: Weights of the edges, what a node hears in its row.

    Shapes:
        - **weights**, **output:** :math:`(*, N, N)`

    Example:
        >>> transition(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([[0.2500, 0.7500],
                [0.0000, 0.0000]])
    """
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)
