"""torch-geometric-temporal's TGCN and A3TGCN, each with and without a batch axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.acceleration import pyg
from stlora_peft.acceleration.convolutions import FastGCNConv
from stlora_peft.acceleration.fast import Fast, bare
from stlora_peft.backbones import tgt

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _TGCN(nn.Module): ...

    class _TGCN2(nn.Module): ...

    class _A3TGCN(nn.Module): ...

    class _A3TGCN2(nn.Module): ...
else:
    _recurrent = tgt.load().nn.recurrent
    _TGCN, _TGCN2, _A3TGCN, _A3TGCN2 = _recurrent.TGCN, _recurrent.TGCN2, _recurrent.A3TGCN, _recurrent.A3TGCN2


class Gate(NamedTuple):
    """A gate as a function of the averaged input and of the state: its graph convolution and its linear layer in one.

    Args:
        inputs: Weight of the averaged input.
        state: Weight of the state.
        bias: Additive bias.
    """

    inputs: Tensor
    state: Tensor
    bias: Tensor | None


class _Cell(Fast):
    """What both cells share: their input is averaged over the graph once, and a gate is one product.

    Attributes:
        ndim: Number of axes of its input.
    """

    is_cell = True
    ndim: ClassVar[int]
    out_channels: int

    def forward(
        self, X: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, H: Tensor | None = None
    ) -> Tensor:
        """State after one more step."""
        cell = cast(Any, self)
        if not fusible(cell, X, H, edge_index, edge_weight, self.ndim):
            state: Tensor = cell.plain.forward(cell, X, edge_index, edge_weight, H)
            return state
        before = cell._set_hidden_state(X, H)
        heard = cell.conv_z.average(X, edge_index, edge_weight)
        return _next_state(heard, before, *map(self.gate, "zrh"))

    def gate(self, name: str) -> Gate:
        """A gate of this cell."""
        conv, linear = (
            cast(FastGCNConv, getattr(self, f"conv_{name}")),
            cast(nn.Linear, getattr(self, f"linear_{name}")),
        )
        of_conv, of_state = linear.weight.split(self.out_channels, 1)
        bias: Tensor | None = linear.bias
        if conv.bias is not None:
            bias = F.linear(conv.bias, of_conv, bias)
        return Gate(of_conv @ conv.lin.weight, of_state, bias)


class FastTGCN(_Cell, _TGCN):
    """``TGCN``, whose nodes are on the first axis."""

    plain = _TGCN
    ndim = 2


class FastTGCN2(_Cell, _TGCN2):
    """``TGCN2``, the same with a batch axis."""

    plain = _TGCN2
    ndim = 3


class _Attention(Fast):
    """What both networks share: all periods at once.

    Attributes:
        ndim: Number of axes of the input of their cell.
    """

    is_cell = True
    ndim: ClassVar[int]

    def forward(
        self, X: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, H: Tensor | None = None
    ) -> Tensor:
        """Mean of the states of all periods, weighted by the attention."""
        network = cast(Any, self)
        cell, periods = network._base_tgcn, network.periods
        fits = isinstance(X, Tensor) and X.ndim == self.ndim + 1 and X.shape[-1] >= periods
        known = fits and bare([cell], FastTGCN, FastTGCN2) and not torch.is_autocast_enabled(X.device.type)
        if not known or not fusible(cell, X[..., 0], H, edge_index, edge_weight, self.ndim):
            mean: Tensor = network.plain.forward(network, X, edge_index, edge_weight, H)
            return mean
        share = network._attention.softmax(0)
        heard = cell.conv_z.average(X[..., :periods].flatten(-2), edge_index, edge_weight)
        steps = heard.unflatten(-1, (-1, periods)).movedim(-1, 0).contiguous()  # [t b n c]
        gates = tuple(map(cell.gate, "zrh"))
        if H is None:
            states = _first_states(steps, *gates)
            share = share + _nothing(gates[1])
        else:
            states = _next_state(steps, H, *gates)
        return cast(Tensor, torch.tensordot(share, states, 1))


class FastA3TGCN(_Attention, _A3TGCN):
    """``A3TGCN``, whose nodes are on the first axis."""

    plain = _A3TGCN
    ndim = 2


class FastA3TGCN2(_Attention, _A3TGCN2):
    """``A3TGCN2``, the same with a batch axis."""

    plain = _A3TGCN2
    ndim = 3


def fusible(cell: Any, X: Any, H: Any, edge_index: Any, edge_weight: Any, ndim: int) -> bool:
    """Whether the gates of a TGCN can be computed together, without calling their layers."""
    convs, linears = ([getattr(cell, f"{kind}_{name}") for name in "zrh"] for kind in ("conv", "linear"))
    if not bare(convs, FastGCNConv) or not bare(linears, nn.Linear):
        return False
    settings = {(conv.improved, conv.add_self_loops, conv.normalize, conv.cached) for conv in convs}
    if not bare([conv.lin for conv in convs], pyg.Linear) or len(settings) > 1 or convs[0].cached:
        return False
    known = all(conv.knows(X, edge_index, edge_weight) for conv in convs) and X.ndim == ndim
    return known and (H is None or (H.shape[:-1] == X.shape[:-1] and H.dtype == X.dtype))


def _next_state(heard: Tensor, before: Tensor, update: Gate, reset: Gate, candidate: Gate) -> Tensor:
    """State after one more step; ``heard`` may hold several, each of them after ``before``."""
    of_input, of_state = torch.cat([update.inputs, reset.inputs]), torch.cat([update.state, reset.state])
    bias = None if update.bias is None or reset.bias is None else torch.cat([update.bias, reset.bias])
    gates = (F.linear(heard, of_input, bias) + F.linear(before, of_state)).sigmoid()
    z, r = gates.chunk(2, -1)
    new = (F.linear(heard, candidate.inputs, candidate.bias) + F.linear(before * r, candidate.state)).tanh()
    return z * before + (1 - z) * new


def _first_states(heard: Tensor, update: Gate, _: Gate, candidate: Gate) -> Tensor:
    """States after one step from zero, which nothing resets."""
    keep = F.linear(heard, -update.inputs, None if update.bias is None else -update.bias).sigmoid()
    return keep * F.linear(heard, candidate.inputs, candidate.bias).tanh()


def _nothing(gate: Gate) -> Tensor:
    """Zero, with gradients of zero, not none, for a gate that has no effect, as the original has them."""
    parts = [part.sum() for part in gate if part is not None]
    zero: Tensor = torch.stack(parts).sum() * 0.0
    return zero
