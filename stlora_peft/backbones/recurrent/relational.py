"""LRGCN: an LSTM made of relational graph convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import union
from stlora_peft.backbones.recurrent.cells import RecurrentForecaster, cell_spec

_cells: Any = tgt.load().nn.recurrent
RELATIONS = 2
"""A neighbour is one that sends to a node, or one that it sends to."""


class LRGCNForecaster(RecurrentForecaster):
    r"""An LSTM whose matrix products are relational graph convolutions, and a linear head.

    A node hears those that send to it and those that it sends to through different weights,

    .. math::
        (R * x)_n = \Theta_0 x_n + \theta +
        \sum_{\rho} \Theta_\rho \, \mathrm{mean}_{m \in \mathcal N_\rho(n)} x_m ,
        \qquad \rho \in \{\text{in}, \text{out}\},

    where both :math:`\Theta_\rho` are mixtures of ``num_bases`` matrices. With such convolutions :math:`R`,

    .. math::
        i_t &= \sigma(R_{xi} * x_t + R_{hi} * h_{t-1}), \qquad f_t, o_t \text{ alike}, \\
        c_t &= f_t \odot c_{t-1} + i_t \odot \tanh(R_{xc} * x_t + R_{hc} * h_{t-1}), \qquad
        h_t = o_t \odot \tanh(c_t), \\
        \hat y_n &= W h_{T,n} + b \; [\, + x_{T,n} \,]

    The convolution takes no weights of the edges: ``edge_weight`` is accepted and ignored. It fits any number of
    nodes. The cell has no batch axis and runs on the union of :math:`B` copies of the graph.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
        num_bases: Matrices that the weights of the relations are mixed from.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``
        - the cell sees rows ``[(b n) c]``, node fastest

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = LRGCNForecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Li et al. (LRGCN), KDD 2019, arXiv:1905.03994, whose four relations are these two, within a step and from the
        step before, as torch-geometric-temporal's ``LRGCN`` builds it. Differs: a forecast of the values of every
        node instead of the failure of a path; the residual.
    """

    name = "lrgcn"
    folded = True
    num_states = 2
    stlora_spec = cell_spec([f"conv_{source}_{gate}" for gate in "ifco" for source in "xh"], "(b n) c")

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        num_bases: int = 2,
        residual: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            window,
            horizon,
            residual,
            hidden_channels=hidden_channels,
            num_bases=num_bases,
        )
        self.cell = _cells.LRGCN(in_channels, hidden_channels, RELATIONS, num_bases)
        self.head = self.new_head(hidden_channels)

    def graph(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> tuple[Any, ...]:
        """Edges of the union in both directions, and their relations."""
        both = torch.cat([edge_index, edge_index.flip(0)], dim=1)
        relation = torch.arange(RELATIONS, device=both.device).repeat_interleave(edge_index.shape[1])
        return union(both, relation, x.shape[0], x.shape[2])
