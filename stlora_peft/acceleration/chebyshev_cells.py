"""torch-geometric-temporal's GConvGRU, GConvLSTM and GCLSTM: one propagation and one product for several gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stlora_peft.acceleration import pyg
from stlora_peft.acceleration.convolutions import FastChebConv, convolved
from stlora_peft.acceleration.fast import Fast, bare, base_layers, one_graph, ordinary
from stlora_peft.backbones import tgt
from stlora_peft.backbones.chebyshev import CachedChebConv
from stlora_peft.tuner.graph_layers import STLoraGraphConv

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _Cell(nn.Module):
        out_channels: int

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

        def __getattr__(self, name: str) -> Any: ...

    class _GConvGRU(_Cell): ...

    class _GConvLSTM(_Cell): ...

    class _GCLSTM(_Cell): ...
else:
    _recurrent = tgt.load().nn.recurrent
    _GConvGRU, _GConvLSTM, _GCLSTM = _recurrent.GConvGRU, _recurrent.GConvLSTM, _recurrent.GCLSTM

_Convolve = Callable[[Sequence[Any], Tensor], Tensor]
_Graph = tuple[Tensor, Tensor | None, Tensor | None, Tensor | float | None]


class FastGConvGRU(Fast, _GConvGRU):
    """``GConvGRU``: its input and its state are propagated once for all gates."""

    plain = _GConvGRU

    def forward(
        self,
        X: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        H: Tensor | None = None,
        lambda_max: Tensor | None = None,
    ) -> Tensor:
        """State after one more step."""
        graph = (edge_index, edge_weight, None, lambda_max)
        of_x = (self.conv_x_z, self.conv_x_r, self.conv_x_h)
        of_h = (self.conv_h_z, self.conv_h_r, self.conv_h_h)
        convolve = _together((*of_x, *of_h), X, (H,), graph)
        if convolve is None:
            state: Tensor = super().forward(X, edge_index, edge_weight, H, lambda_max)
            return state
        before: Tensor = self._set_hidden_state(X, H)
        width = self.out_channels
        gates_x, candidate_x = convolve(of_x, X).split([2 * width, width], -1)
        update, reset = (gates_x + convolve(of_h[:2], before)).sigmoid().chunk(2, -1)
        candidate = (candidate_x + convolve(of_h[2:], before * reset)).tanh()
        after: Tensor = update * before + (1 - update) * candidate
        return after


class FastGConvLSTM(Fast, _GConvLSTM):
    """``GConvLSTM``: its input and its state are propagated once for all gates."""

    plain = _GConvLSTM

    def forward(
        self,
        X: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        H: Tensor | None = None,
        C: Tensor | None = None,
        lambda_max: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """State and memory after one more step."""
        graph = (edge_index, edge_weight, None, lambda_max)
        of_x = (self.conv_x_i, self.conv_x_f, self.conv_x_c, self.conv_x_o)
        of_h = (self.conv_h_i, self.conv_h_f, self.conv_h_c, self.conv_h_o)
        convolve = _together((*of_x, *of_h), X, (H, C), graph)
        if convolve is None:
            states: tuple[Tensor, Tensor] = super().forward(X, edge_index, edge_weight, H, C, lambda_max)
            return states
        state, memory = self._set_hidden_state(X, H), self._set_cell_state(X, C)
        sums = convolve(of_x, X) + convolve(of_h, state)
        enter, keep, new, leave = sums.chunk(4, -1)
        enter = (enter + self.w_c_i * memory + self.b_i).sigmoid()
        keep = (keep + self.w_c_f * memory + self.b_f).sigmoid()
        memory = keep * memory + enter * (new + self.b_c).tanh()
        leave = (leave + self.w_c_o * memory + self.b_o).sigmoid()
        return leave * memory.tanh(), memory


class FastGCLSTM(Fast, _GCLSTM):
    """``GCLSTM``: its state is propagated once for all gates."""

    plain = _GCLSTM

    def forward(
        self,
        X: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        H: Tensor | None = None,
        C: Tensor | None = None,
        lambda_max: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """State and memory after one more step."""
        graph = (edge_index, edge_weight, None, lambda_max)
        convs = (self.conv_i, self.conv_f, self.conv_c, self.conv_o)
        convolve = _together(convs, X, (H, C), graph)
        if convolve is None:
            states: tuple[Tensor, Tensor] = super().forward(X, edge_index, edge_weight, H, C, lambda_max)
            return states
        state, memory = self._set_hidden_state(X, H), self._set_cell_state(X, C)
        weights = torch.cat([self.W_i, self.W_f, self.W_c, self.W_o], 1)
        # an adapter puts a row for each node in the place of a bias
        biases = torch.cat([self.b_i, self.b_f, self.b_c, self.b_o], -1)
        enter, keep, new, leave = (X @ weights + convolve(convs, state) + biases).chunk(4, -1)
        memory = keep.sigmoid() * memory + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * memory.tanh(), memory


def _together(layers: Sequence[Any], X: Tensor, states: Sequence[Tensor | None], graph: _Graph) -> _Convolve | None:
    """How to compute some convolutions of a cell together, without calling them, or None where they must be called."""
    convs = base_layers(layers, FastChebConv, CachedChebConv)
    if convs is None or not one_graph(X, *graph):
        return None
    first = convs[0]
    alike = all((conv.normalization, len(conv.lins)) == (first.normalization, len(first.lins)) for conv in convs)
    fits = all(X.ndim == 2 if state is None else state.shape[:-1] == X.shape[:-1] for state in states)
    same_type = all(state is None or state.dtype == X.dtype for state in states)
    plain_sums = all(ordinary(conv) and bare(conv.lins, pyg.Linear) for conv in convs)
    if not (alike and fits and same_type and plain_sums):
        return None
    for layer in layers:
        if isinstance(layer, STLoraGraphConv):
            layer.check_graph(X, graph[0])
    return lambda some, x: convolved(some, x, graph)
