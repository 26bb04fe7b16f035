"""Diffusion convolution: with torch-geometric-temporal's numbers, or with those of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _BatchedDConv(nn.Module):
        weight: Tensor
        bias: Tensor

        def __init__(self, in_channels: int, out_channels: int, K: int) -> None:
            """Types of torch-geometric-temporal's BatchedDConv."""

        def propagate(self, edge_index: Tensor, *, x: Tensor, norm: Tensor, size: None) -> Tensor: ...
else:
    _BatchedDConv = tgt.load().nn.recurrent.dcrnn.BatchedDConv


class DiffusionConv(_BatchedDConv):
    r"""torch-geometric-temporal's ``BatchedDConv`` on edges that are normalised beforehand.

    With ``exact=True`` it is the convolution of the paper, for the weighted adjacency :math:`W`, whose entry
    :math:`w_{ij}` is the sum of the weights of the edges from :math:`i` to :math:`j`,

    .. math::
        y = b + \sum_{k=0}^{K-1} \left( (D_O^{-1} W)^k x\, \Theta_{k,1} + (D_I^{-1} W^\top)^k x\, \Theta_{k,2} \right)

    with the degrees :math:`D_O = \mathrm{diag}(W 1)` and :math:`D_I = \mathrm{diag}(W^\top 1)` and :math:`0 / 0 = 0`.
    Otherwise it is what torch-geometric-temporal computes, see :func:`upstream_norms`: along the edges with
    :math:`1 / d_O` of the sender, and against them; and from :math:`k = 2` on :math:`T_k = 2 P T_{k-1} - x`, which
    spans the same polynomials of :math:`P`.

    Parameters and state dict are those of ``BatchedDConv`` and of ``DConv``.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        K: Number of terms :math:`K`, at least 1.
        exact: Compute the paper's convolution.

    Shapes:
        - **X:** :math:`(N, C_{in})`, ``[n c]``, or rows ``[(b n) c]`` of a union of graphs
        - **edge_index:** :math:`(2, E)`, **edge_norm:** :math:`(2, E)`
        - **output:** :math:`(N, C_{out})`

    Example:
        >>> conv = DiffusionConv(4, 8, K=2, exact=True)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> conv(torch.zeros(5, 4), ring, exact_norms(ring, torch.ones(5), 5)).shape
        torch.Size([5, 8])

    References:
        Li et al. (DCRNN), ICLR 2018, arXiv:1707.01926, Eq. 2 and 3. Their code, unlike the equations and like
        torch-geometric-temporal, transposes both walks.
    """

    def __init__(self, in_channels: int, out_channels: int, K: int, *, exact: bool) -> None:
        super().__init__(in_channels, out_channels, K)
        self.exact = exact

    def forward(self, X: Tensor, edge_index: Tensor, edge_norm: Tensor, cached_idx: bool = False) -> Tensor:
        """Convolve the features of the nodes over the graph.

        Args:
            X: Features.
            edge_index: Edges, source above target.
            edge_norm: What :func:`exact_norms` or :func:`upstream_norms` makes of their weights.
            cached_idx: Not used; torch-geometric-temporal's cell passes it.
        """
        along, against = edge_index, edge_index.flip(0)
        walks = (against, along) if self.exact else (along, against)
        out = self.bias
        for weights, edges, norm in zip(self.weight, walks, edge_norm, strict=True):
            term = X
            out = out + X @ weights[0]
            for weight in weights[1:]:
                heard = self.propagate(edges, x=term, norm=norm, size=None)
                term = heard if self.exact or term is X else 2.0 * heard - X
                out = out + term @ weight
        return out


def exact_norms(edge_index: Tensor, edge_weight: Tensor, num_nodes: int) -> Tensor:
    r"""Weight of each edge over the degree of its source, and over that of its target.

    Args:
        edge_index: Edges, source above target.
        edge_weight: Their weights.
        num_nodes: Number of nodes.

    Returns:
        :math:`w_{ij} / d_O(i)` above :math:`w_{ij} / d_I(j)`, zero where a degree is zero.

    Example:
        >>> exact_norms(torch.tensor([[0, 0], [1, 2]]), torch.tensor([1.0, 3.0]), num_nodes=3)
        tensor([[0.2500, 0.7500],
                [1.0000, 1.0000]])
    """
    degrees = _degrees(edge_index, edge_weight, num_nodes)
    own = (degree.gather(0, ends) for degree, ends in zip(degrees, edge_index, strict=True))
    return torch.stack([edge_weight / degree.where(degree != 0, 1.0) for degree in own])


def upstream_norms(edge_index: Tensor, edge_weight: Tensor, num_nodes: int) -> Tensor:
    """Numbers that torch-geometric-temporal's ``DConv`` and ``BatchedDConv`` put in place of :func:`exact_norms`.

    They leave the weight out of the numerator. Those of the walk against the edges belong to the sources of the edges
    in the order given, but are dealt out to the edges in the order of their targets: right for a symmetric graph with
    edges in order, wrong for others, and infinite if no edge enters the source of an edge.

    Args:
        edge_index: Edges, source above target.
        edge_weight: Their weights.
        num_nodes: Number of nodes.

    Returns:
        A number for each edge along its direction, above one for each against it.

    Example:
        >>> upstream_norms(torch.tensor([[0, 0], [1, 2]]), torch.tensor([1.0, 3.0]), num_nodes=3)
        tensor([[0.2500, 0.2500],
                [   inf,    inf]])
    """
    source, target = edge_index
    out_degree, in_degree = (degree.gather(0, source) for degree in _degrees(edge_index, edge_weight, num_nodes))
    order = (target * num_nodes + source).argsort()
    against = torch.empty_like(in_degree).index_put((order,), in_degree.reciprocal())
    return torch.stack([out_degree.reciprocal(), against])


def _degrees(edge_index: Tensor, edge_weight: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Degrees of all nodes, as sources and as targets."""
    zero = edge_weight.new_zeros(num_nodes)
    source, target = edge_index
    return zero.index_add(0, source, edge_weight), zero.index_add(0, target, edge_weight)
