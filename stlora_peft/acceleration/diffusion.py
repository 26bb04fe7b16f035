"""torch-geometric-temporal's diffusion convolutions and the cells made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.acceleration.fast import Fast, bare, one_graph, ordinary
from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import check_graph
from stlora_peft.backbones.propagation import Propagation
from stlora_peft.backbones.recurrent.diffusion_conv import DiffusionConv, upstream_norms

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _DConv(nn.Module):
        weight: nn.Parameter
        bias: nn.Parameter | None

        def forward(self, *args: Any) -> Tensor: ...

    class _BatchedDConv(_DConv): ...

    class _DCRNN(nn.Module):
        conv_x_z: _DConv
        conv_x_r: _DConv
        conv_x_h: _DConv
        out_channels: int

        def forward(self, *args: Any) -> Tensor: ...

        def _set_hidden_state(self, X: Tensor, H: Tensor | None) -> Tensor: ...

    class _BatchedDCRNN(_DCRNN): ...
else:
    _dcrnn = tgt.load().nn.recurrent.dcrnn
    _DConv, _BatchedDConv, _DCRNN, _BatchedDCRNN = _dcrnn.DConv, _dcrnn.BatchedDConv, _dcrnn.DCRNN, _dcrnn.BatchedDCRNN

_Walks = tuple[Propagation, Propagation]


class _Diffusion(Fast):
    r"""What the diffusion convolutions share: two walks, :math:`T_1 = P x`, :math:`T_k = 2 P T_{k-1} - x`."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def walks(self, x: Tensor, *graph: Any) -> _Walks | None:
        """Matrices along the edges and against them, or None where this layer cannot do with them."""
        if not one_graph(x, *graph) or not ordinary(self) or x.dtype != torch.float32:
            return None
        found: _Walks | None = self.kept((*graph, x.shape[-2]), self.walk_matrices)
        return found

    def walk_matrices(self, edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int) -> _Walks | None:
        """Build both matrices, unless a number in them is infinite or torch-geometric-temporal refuses the graph."""
        if edge_weight is None or not edge_weight.is_floating_point():
            return None
        check_graph(edge_index, edge_weight, num_nodes)
        along, against = upstream_norms(edge_index, edge_weight, num_nodes)
        return _matrices(edge_index, along, against, num_nodes)

    def diffused(self, x: Tensor, walks: _Walks) -> Tensor:
        """Output of the layer."""
        features = _features(x, walks, self.weight.shape[1])
        return F.linear(features, _weight([self]).mT, self.bias)


class FastDConv(_Diffusion, _DConv):
    """``DConv``: its degrees are computed once instead of in every call."""

    plain = _DConv

    def forward(self, X: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """Convolve the features of the nodes over the graph."""
        walks = self.walks(X, edge_index, edge_weight)
        return super().forward(X, edge_index, edge_weight) if walks is None else self.diffused(X, walks)

    def walk_matrices(self, edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int) -> _Walks | None:
        """As above; the original cannot take an edge twice, nor one of weight zero, and takes no weights for ones."""
        if edge_weight is None:
            edge_weight = torch.ones(edge_index.shape[1], device=edge_index.device)
        pairs = edge_index[0] * num_nodes + edge_index[1]
        if pairs.unique().numel() < pairs.numel() or not bool(edge_weight.all()):
            return None
        return super().walk_matrices(edge_index, edge_weight, num_nodes)


class FastBatchedDConv(_Diffusion, _BatchedDConv):
    """``BatchedDConv``, whose flag ``cached_idx`` is not needed to notice the same graph."""

    plain = _BatchedDConv

    def forward(self, X: Tensor, edge_index: Tensor, edge_weight: Tensor, cached_idx: bool = False) -> Tensor:
        """Convolve the features of the nodes over the graph."""
        walks = self.walks(X, edge_index, edge_weight)
        return super().forward(X, edge_index, edge_weight) if walks is None else self.diffused(X, walks)


class FastDiffusionConv(Fast, DiffusionConv):
    """The convolution of this package's DCRNN backbones, on edges that were normalised beforehand."""

    plain = DiffusionConv
    weight: Tensor

    def forward(self, X: Tensor, edge_index: Tensor, edge_norm: Tensor, cached_idx: bool = False) -> Tensor:
        """Convolve the features of the nodes over the graph."""
        walks = None
        if one_graph(X, edge_index, edge_norm) and ordinary(self):
            walks = self.kept((edge_index, edge_norm, X.shape[-2]), self.walk_matrices)
        if walks is None:
            return super().forward(X, edge_index, edge_norm)
        features = _features(X, walks, self.weight.shape[1], powers=self.exact)
        return F.linear(features, _weight([self]).mT, self.bias)

    def walk_matrices(self, edge_index: Tensor, edge_norm: Tensor, num_nodes: int) -> _Walks | None:
        """Build both matrices, unless a number in them is infinite."""
        along, against = edge_norm.to(torch.promote_types(edge_norm.dtype, torch.float32))
        if self.exact:
            return _matrices(edge_index.flip(0), along, against, num_nodes)
        return _matrices(edge_index, along, against, num_nodes)


class FastDCRNN(Fast, _DCRNN):
    """``DCRNN``: both gates read one diffusion of input and state."""

    plain = _DCRNN
    is_cell = True

    def forward(
        self, X: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, H: Tensor | None = None
    ) -> Tensor:
        """State after one more step."""
        convs = (self.conv_x_z, self.conv_x_r, self.conv_x_h)
        fits = isinstance(X, Tensor) and X.ndim == 2 and (H is None or H.shape[:-1] == X.shape[:-1])
        walks = _shared_walks(convs, X, edge_index, edge_weight) if fits and bare(convs, FastDConv) else None
        if walks is None:
            return super().forward(X, edge_index, edge_weight, H)
        before = self._set_hidden_state(X, H)
        order = convs[0].weight.shape[1]
        gates = F.linear(
            _features(torch.cat([X, before], -1), walks, order), _weight(convs[:2]).mT, _bias(convs[:2])
        ).sigmoid()
        update, reset = gates.chunk(2, -1)
        both = torch.cat([X, before * reset], -1)
        candidate = F.linear(_features(both, walks, order), _weight(convs[2:]).mT, convs[2].bias).tanh()
        return update * before + (1 - update) * candidate


class FastBatchedDCRNN(Fast, _BatchedDCRNN):
    """``BatchedDCRNN``: all steps of the input at once, and one graph instead of a union of many."""

    plain = _BatchedDCRNN
    is_cell = True

    def forward(self, X: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """States of all steps, ``[b t n c]``."""
        convs = (self.conv_x_z, self.conv_x_r, self.conv_x_h)
        fits = isinstance(X, Tensor) and X.ndim == 4 and bare(convs, FastBatchedDConv)
        walks = _shared_walks(convs, X, edge_index, edge_weight) if fits else None
        if walks is None:
            return super().forward(X, edge_index, edge_weight)
        order, inputs = convs[0].weight.shape[1], X.shape[-1]
        steps = _features(X.transpose(0, 1).contiguous(), walks, order)  # [t b n c]
        sums = (F.linear(steps, _weight(part, slice(inputs)).mT, _bias(part)) for part in (convs[:2], convs[2:]))
        gates_weight, candidate_weight = (_weight(part, slice(inputs, None)) for part in (convs[:2], convs[2:]))
        zero, states = X.new_zeros(X.shape[0], X.shape[2], self.out_channels), list[Tensor]()
        for gates, candidate in zip(*(part.unbind() for part in sums), strict=True):
            if states:
                gates = gates + _features(states[-1], walks, order) @ gates_weight
            update, reset = gates.sigmoid().chunk(2, -1)
            if states:
                candidate = candidate + _features(states[-1] * reset, walks, order) @ candidate_weight
            before = states[-1] if states else zero
            states.append(update * before + (1 - update) * candidate.tanh())
        return torch.stack(states, 1)

    def restore(self) -> None:
        """Give up the graph that the original remembers too: its convolutions do not know it."""
        self._cached_edge_index = None
        super().restore()


def _shared_walks(convs: Sequence[Any], x: Tensor, *graph: Any) -> _Walks | None:
    """Matrices of a cell's convolutions, or None where one cannot stand for all."""
    alike = all(conv.weight.shape[1] == convs[0].weight.shape[1] and ordinary(conv) for conv in convs)
    walks: _Walks | None = convs[0].walks(x, *graph) if alike else None
    return walks


def _matrices(edge_index: Tensor, along: Tensor, against: Tensor, num_nodes: int) -> _Walks | None:
    """Matrix along the edges and one against them, or None if a number is infinite."""
    if not bool(along.isfinite().all() and against.isfinite().all()):
        return None
    back = edge_index.flip(0)
    return Propagation.build(edge_index, along, num_nodes), Propagation.build(back, against, num_nodes)


def _features(x: Tensor, walks: _Walks, order: int, powers: bool = False) -> Tensor:
    """Terms of both walks side by side: ``x``, those along the edges, those against them."""
    found = [x]
    for walk in walks if order > 1 else ():
        term = walk.terms(x, 2)[1]
        found.append(term)
        for _ in range(2, order):
            heard = walk.terms(term, 2)[1]
            term = heard if powers else 2.0 * heard - x
            found.append(term)
    return torch.cat(found, -1).to(x.dtype) if len(found) > 1 else x


def _weight(convs: Sequence[Any], rows: slice = slice(None)) -> Tensor:
    """Weights of several convolutions side by side, those of some input channels in the order of the features."""
    columns = []
    for conv in convs:
        along, against = conv.weight[:, :, rows]
        columns.append(torch.cat([along[:1] + against[:1], along[1:], against[1:]]).flatten(0, 1))
    return torch.cat(columns, 1)


def _bias(convs: Sequence[Any]) -> Tensor | None:
    """Biases of several convolutions, one after the other."""
    return None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])
