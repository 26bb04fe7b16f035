"""Recurrent layers and cells with a node-conditioned update on their output."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.layers import STLoraLayer


class STLoraRecurrent(STLoraLayer):
    r"""``nn.LSTM`` and ``nn.GRU`` with the update on the output.

    .. math:: y_{i,t} = h_{i,t} + \tfrac{\alpha}{r} B A_i h_{i,t}

    The recurrence itself is untouched. The last layer's final hidden state gets the same update, so that it
    still equals the last output; the LSTM's cell state is returned as it is. Where the backbone reads nothing but the
    final hidden state, as its ``stlora_spec`` says, only that is updated and the output is None.
    """

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        rnn = cast(nn.LSTM, base_layer)
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        return (width,), width

    @property
    def _rnn(self) -> nn.LSTM:
        return cast(nn.LSTM, self.get_base_layer())

    def node_axes(self, ndim: int) -> tuple[int, ...]:
        """The batch axis of a recurrent layer."""
        return (0,) if self._rnn.batch_first else (1,)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the recurrent layer and update its output and final hidden state."""
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise ValueError(
                message(
                    f"stlora layer '{self.name}' cannot read its input",
                    expected="a padded tensor of three axes",
                    got=f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__,
                    fix="pad a packed sequence, and give a single series a batch axis",
                )
            )
        out, state = self.base_layer(x, *args, **kwargs)
        hidden = state[0] if isinstance(state, tuple) else state
        read = self._ends(out, hidden) if self.final_state else out
        update = self._active_updates(read)
        if update is None:
            return out, state
        read = read + update.to(read.dtype)
        hidden = self._final_hidden(read, hidden)
        return None if self.final_state else read, (hidden, *state[1:]) if isinstance(state, tuple) else hidden

    def _ends(self, out: Tensor, hidden: Tensor) -> Tensor:
        """The steps of the output that the final hidden state is made of."""
        time = 1 if self._rnn.batch_first else 0
        if not self._rnn.bidirectional:
            return hidden[-1].unsqueeze(time)
        return torch.stack([out.select(time, 0), out.select(time, -1)], time)

    def _final_hidden(self, out: Tensor, hidden: Tensor) -> Tensor:
        """Put the last layer's updated final output into the hidden state."""
        time = 1 if self._rnn.batch_first else 0
        if not self._rnn.bidirectional:
            return torch.cat([hidden[:-1], out.select(time, -1)[None]])
        forward, backward = out.chunk(2, dim=-1)
        last = torch.stack([forward.select(time, -1), backward.select(time, 0)])
        return torch.cat([hidden[:-2], last])


class STLoraCell(STLoraLayer):
    r"""``nn.GRUCell``, ``nn.LSTMCell`` and ``nn.RNNCell`` with the update on the new hidden state.

    .. math:: h'_i = \mathrm{cell}(x, h)_i + \tfrac{\alpha}{r} B A_i\, \mathrm{cell}(x, h)_i

    The caller hands the updated state to the next step, so the update takes part in the recurrence. The cell state
    of an LSTM is returned as it is.
    """

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        width = cast(nn.GRUCell, base_layer).hidden_size
        return (width,), width

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the cell and update its new hidden state."""
        new = self.base_layer(x, *args, **kwargs)
        hidden = new[0] if isinstance(new, tuple) else new
        update = None if self.disable_adapters else self._active_updates(hidden)
        if update is None:
            return new
        hidden = hidden + update.to(hidden.dtype)
        return (hidden, *new[1:]) if isinstance(new, tuple) else hidden
