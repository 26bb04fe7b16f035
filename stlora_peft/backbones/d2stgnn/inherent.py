"""The inherent block: what a node does of itself, by a recurrence and an attention along time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def positions(num_steps: int, width: int, like: Tensor) -> Tensor:
    r"""Sines and cosines of the numbers of the steps.

    .. math:: p_{t,2i} = \sin(t / 10000^{2i/D}), \qquad p_{t,2i+1} = \cos(t / 10000^{2i/D})

    Args:
        num_steps: Number of steps.
        width: Width :math:`D`.
        like: Tensor whose type and device the output takes.

    Shapes:
        - **output:** :math:`(T, D)`

    Example:
        >>> positions(2, 3, torch.zeros(1))
        tensor([[0.0000, 1.0000, 0.0000],
                [0.8415, 0.5403, 0.0022]])
    """
    steps = torch.arange(num_steps, dtype=like.dtype, device=like.device)
    powers = torch.arange(0, width, 2, dtype=like.dtype, device=like.device) / width
    angles = steps[:, None] * torch.exp(powers * -math.log(10000.0))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


class StepAttention(nn.Module):
    r"""Multi-head attention to the steps of a node.

    .. math:: z = \big\|_h\, \mathrm{softmax}\big(q_h K_h^\top / \sqrt{D / heads}\big) V_h \; W^O + b^O

    The keys have no bias: it would move all scores of a query alike, which a softmax does not see.

    Args:
        channels: Width :math:`D`, a multiple of the heads.
        heads: Number of heads.
        dropout: Share of weights, and of what comes out, that training leaves out.

    Shapes:
        - **x:** :math:`(B, N, Q, D)`, **keys**, **values:** :math:`(B, N, T, D)`
        - **output:** :math:`(B, N, Q, D)`
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend to the steps whose keys and values are given."""
        query, key, value = (
            part.unflatten(3, (self.heads, -1)).transpose(2, 3) for part in (self.query(x), keys, values)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)  # [b n h q t]
        heard = (self.dropout(weights) @ value).transpose(2, 3).flatten(3)
        answer: Tensor = self.dropout(self.out(heard))
        return answer


class InherentBlock(nn.Module):
    r"""Hidden states of what belongs to a node, and their forecast in strides.

    .. math::
        h_t = \mathrm{GRU}(x_t, h_{t-1}), \qquad m_t = h_t + p_t, \qquad
        z_t = \mathrm{att}(m_t; m_1 \dots m_T)

    with the positions :math:`p_t`. The forecast goes on where the series ends: the answer of the attention is the
    next input of the recurrence, and its state is remembered beside the others,

    .. math::
        h_{T+s} = \mathrm{GRU}(z_{T+s-1}, h_{T+s-1}), \qquad z_{T+s} = \mathrm{att}(m_{T+s}; m_1 \dots m_{T+s}).

    Each of the :math:`S` answers :math:`z_T, \dots, z_{T+S-1}` is to forecast several steps.

    Args:
        hidden_channels: Width of the series, a multiple of the heads.
        forecast_channels: Width of the forecast states.
        num_strides: Number of answers :math:`S` of the forecast.
        heads: Number of heads.
        dropout: Share of values that training leaves out.

    Shapes:
        - **x:** :math:`(B, N, T, D)`, **places_in_time:** :math:`(\ge T + S - 1, D)`
        - **output:** the answers :math:`(B, N, T, D)` and the forecast :math:`(B, N, S, F)`
    """

    def __init__(
        self, hidden_channels: int, forecast_channels: int, num_strides: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_strides = num_strides
        self.cell = nn.GRUCell(hidden_channels, hidden_channels)
        self.attention = StepAttention(hidden_channels, heads, dropout)
        self.forecast = nn.Linear(hidden_channels, forecast_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, places_in_time: Tensor) -> tuple[Tensor, Tensor]:
        """Read the series and go on with it."""
        rows, window, states = x.flatten(0, 1), x.shape[2], []  # [(b n) t c]
        state = torch.zeros_like(rows[:, 0])
        for step in rows.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        memory = self.dropout(torch.stack(states, 1) + places_in_time[:window]).view_as(x)
        keys, values = self.attention.key(memory), self.attention.value(memory)
        answers = self.attention(memory, keys, values)
        ahead = [answers[:, :, -1:]]
        for place in places_in_time[window : window + self.num_strides - 1]:
            state = self.cell(ahead[-1].flatten(0, 2), state)
            now = self.dropout(state + place).view_as(ahead[-1])  # [b n 1 c]
            keys = torch.cat([keys, self.attention.key(now)], 2)
            values = torch.cat([values, self.attention.value(now)], 2)
            ahead.append(self.attention(now, keys, values))
        return answers, self.forecast(torch.cat(ahead, 2))
