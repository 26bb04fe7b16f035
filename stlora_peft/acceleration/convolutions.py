"""PyG's graph convolutions with a cached propagation matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlora_peft.acceleration import pyg
from stlora_peft.acceleration.fast import Fast, bare, base_of, one_graph, ordinary
from stlora_peft.backbones.chebyshev import CachedChebConv
from stlora_peft.backbones.graphs import check_graph
from stlora_peft.backbones.propagation import Propagation
from stlora_peft.tuner.siblings import sibling_updates


class FastChebConv(Fast, CachedChebConv):
    """PyG's ``ChebConv`` as :class:`stlora_peft.backbones.chebyshev.CachedChebConv` computes it."""

    plain = pyg.ChebConv

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        lambda_max: Tensor | float | None = None,
    ) -> Tensor:
        """Convolve the features of the nodes over the graph."""
        graph = (edge_index, edge_weight, batch, lambda_max)
        known = ordinary(self) and one_graph(x, *graph)
        if known and bare(self.lins, pyg.Linear):
            return convolved([self], x, graph)
        conv: Any = CachedChebConv if known else self.plain
        out: Tensor = conv.forward(self, x, *graph)
        return out


class FastGCNConv(Fast, pyg.GCNConv):
    r"""PyG's ``GCNConv``, :math:`y = \hat A x W^\top + b`, that normalises a graph once.

    The product with the smaller side of :math:`W` is the one with :math:`\hat A`. With ``cached=True`` the graph of
    the first call stays for good, as PyG has it.
    """

    plain = pyg.GCNConv

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Convolve the features of the nodes over the graph."""
        if not self.knows(x, edge_index, edge_weight):
            return super().forward(x, edge_index, edge_weight)
        mixed = torch.is_autocast_enabled(x.device.type)
        if self.in_channels < self.out_channels and bare([self.lin], pyg.Linear) and not mixed:
            return F.linear(self.average(x, edge_index, edge_weight), self.lin.weight, self.bias)
        sent = self.lin(x)
        # PyG normalises the graph in the type of the input
        out = self.average(sent.to(torch.promote_types(sent.dtype, x.dtype)), edge_index, edge_weight)
        return out if self.bias is None else out + self.bias

    def knows(self, x: Any, edge_index: Any, edge_weight: Any) -> bool:
        """Whether a matrix can stand for these edges."""
        return ordinary(self) and one_graph(x, edge_index, edge_weight)

    def average(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        r"""Product :math:`\hat A x` with the normalised graph."""
        normalize = self.normalize
        if self.cached and normalize:
            if self._cached_edge_index is None:
                settings = (self.improved, self.add_self_loops, self.flow, x.dtype)
                self._cached_edge_index = pyg.gcn_norm(edge_index, edge_weight, x.shape[-2], *settings)
            edge_index, edge_weight = self._cached_edge_index
            normalize = False
        return self.heard(x, edge_index, edge_weight, normalize, self.improved, self.add_self_loops)

    def propagation(
        self,
        edge_index: Tensor,
        edge_weight: Tensor | None,
        normalize: bool,
        improved: bool,
        add_self_loops: bool,
        num_nodes: int,
        dtype: torch.dtype,
    ) -> Propagation:
        """Matrix of the graph, normalised as PyG does it, in single precision at least."""
        check_graph(edge_index, edge_weight, num_nodes)
        if normalize:
            settings = (num_nodes, improved, add_self_loops, self.flow, _at_least_single(dtype))
            edge_index, edge_weight = pyg.gcn_norm(edge_index, edge_weight, *settings)
        return weighted(edge_index, edge_weight, num_nodes, dtype)


class FastGraphConv(Fast, pyg.GraphConv):
    r"""PyG's ``GraphConv``, :math:`y = A x W_1^\top + b + x W_2^\top`, with the sum or the mean over the edges."""

    plain = pyg.GraphConv

    def forward(self, x: Any, edge_index: Tensor, edge_weight: Tensor | None = None, size: Any = None) -> Tensor:
        """Convolve the features of the nodes over the graph."""
        if size is not None or not ordinary(self, "mean") or not one_graph(x, edge_index, edge_weight):
            return super().forward(x, edge_index, edge_weight, size)
        return self.lin_rel(self.heard(x, edge_index, edge_weight, self.aggr)) + self.lin_root(x)

    def propagation(
        self, edge_index: Tensor, edge_weight: Tensor | None, aggr: str, num_nodes: int, dtype: torch.dtype
    ) -> Propagation:
        """Matrix of the graph."""
        check_graph(edge_index, edge_weight, num_nodes)
        return weighted(edge_index, edge_weight, num_nodes, dtype, mean=aggr == "mean")


class FastSAGEConv(Fast, pyg.SAGEConv):
    r"""PyG's ``SAGEConv``, :math:`y = \bar A x W_1^\top + b + x W_2^\top`, with the mean or the sum over the edges."""

    plain = pyg.SAGEConv

    def forward(self, x: Any, edge_index: Tensor, size: Any = None) -> Tensor:
        """Convolve the features of the nodes over the graph."""
        if size is not None or not ordinary(self, "mean") or not one_graph(x, edge_index):
            return super().forward(x, edge_index, size)
        sent = self.lin(x).relu() if self.project else x
        out = self.lin_l(self.heard(sent, edge_index, self.aggr))
        if self.root_weight:
            out = out + self.lin_r(x)
        return F.normalize(out, dim=-1) if self.normalize else out

    def propagation(self, edge_index: Tensor, aggr: str, num_nodes: int, dtype: torch.dtype) -> Propagation:
        """Matrix of the graph."""
        check_graph(edge_index, None, num_nodes)
        return weighted(edge_index, None, num_nodes, dtype, mean=aggr == "mean")


class FastGatedGraphConv(Fast, pyg.GatedGraphConv):
    r"""PyG's ``GatedGraphConv``, a GRU cell that reads :math:`A x \Theta_l` in each of its layers."""

    plain = pyg.GatedGraphConv

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Convolve the features of the nodes over the graph."""
        known = ordinary(self) and one_graph(x, edge_index, edge_weight) and x.ndim == 2
        if not known or x.shape[-1] > self.out_channels:
            return super().forward(x, edge_index, edge_weight)
        state = F.pad(x, (0, self.out_channels - x.shape[-1]))
        for weight in self.weight:
            state = self.rnn(self.heard(state @ weight, edge_index, edge_weight), state)
        return state

    def propagation(
        self, edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int, dtype: torch.dtype
    ) -> Propagation:
        """Matrix of the graph."""
        check_graph(edge_index, edge_weight, num_nodes)
        return weighted(edge_index, edge_weight, num_nodes, dtype)


def convolved(layers: Sequence[Any], x: Tensor, graph: tuple[Any, ...]) -> Tensor:
    """Outputs of several Chebyshev convolutions of the same input, side by side, in one product.

    Args:
        layers: Convolutions of as many terms and of one normalisation, with adapters or without.
        x: Their input.
        graph: Their other arguments.
    """
    convs = [base_of(layer) for layer in layers]
    terms = convs[0]._terms_by_matrix(x, *graph)
    weight = torch.cat([torch.cat([lin.weight for lin in conv.lins], 1) for conv in convs])
    bias = None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])
    sums = F.linear(torch.cat(terms, -1).to(x.dtype), weight, bias)
    update = sibling_updates(layers, x)
    return sums if update is None else sums + update.to(sums.dtype)


def weighted(
    edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int, dtype: torch.dtype, mean: bool = False
) -> Propagation:
    """Matrix of the edges' weights, in single precision at least.

    Args:
        edge_index: Edges, source above target.
        edge_weight: Weights of the edges; all one where absent.
        num_nodes: Number of nodes.
        dtype: Type of the features.
        mean: Divide by the number of edges that enter a node.
    """
    dtype = _at_least_single(dtype)
    weight = torch.ones(edge_index.shape[1], dtype=dtype, device=edge_index.device)
    if edge_weight is not None:
        weight = edge_weight.to(dtype)
    if mean:
        weight = weight / edge_index[1].bincount(minlength=num_nodes)[edge_index[1]]
    return Propagation.build(edge_index, weight, num_nodes)


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    """Type of the numbers of a matrix for features of this type."""
    return torch.promote_types(dtype, torch.float32)
