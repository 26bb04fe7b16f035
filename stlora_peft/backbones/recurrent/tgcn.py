"""TGCN and TGCN2: a GRU that reads a graph convolution of its input."""

from __future__ import annotations

from typing import Any

from stlora_peft.backbones import tgt
from stlora_peft.backbones.recurrent.cells import RecurrentForecaster, cell_spec

_cells: Any = tgt.load().nn.recurrent
_LAYERS = ("conv_z", "conv_r", "conv_h", "linear_z", "linear_r", "linear_h")


class TGCNForecaster(RecurrentForecaster):
    r"""A GRU that reads a graph convolution of its input, and a linear head.

    With graph convolutions :math:`\Theta` of one hop and :math:`[\cdot, \cdot]` for the two side by side,

    .. math::
        z_t &= \sigma(W_z [\Theta_z * x_t, h_{t-1}] + b_z), \qquad
        r_t = \sigma(W_r [\Theta_r * x_t, h_{t-1}] + b_r), \\
        \tilde h_t &= \tanh(W_h [\Theta_h * x_t, h_{t-1} \odot r_t] + b_h), \qquad
        h_t = z_t \odot h_{t-1} + (1 - z_t) \odot \tilde h_t, \\
        \hat y_n &= W h_{T,n} + b \; [\, + x_{T,n} \,]

    It fits any number of nodes. The cell has no batch axis and runs on the union of :math:`B` copies of the graph;
    :class:`TGCN2Forecaster` computes the same from the same weights with a batch axis. With a window of one step the
    state is zero when the reset gate multiplies it, so that nothing in that gate trains.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
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
        >>> model = TGCNForecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Zhao et al. (T-GCN), IEEE T-ITS 2020, arXiv:1811.05320, as torch-geometric-temporal's ``TGCN`` builds it.
        Differs: one graph convolution for each gate instead of two on top of each other for all; the residual.
    """

    name = "tgcn"
    folded = True
    stlora_spec = cell_spec(_LAYERS, "(b n) c")

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        residual: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, window, horizon, residual, hidden_channels=hidden_channels)
        self.cell = self.new_cell()
        self.head = self.new_head(hidden_channels)

    def new_cell(self) -> Any:
        """The cell with fresh weights."""
        return _cells.TGCN(self.in_channels, self.hidden_channels)


class TGCN2Forecaster(TGCNForecaster):
    r"""A GRU that reads a graph convolution of its input, with a batch axis, and a linear head.

    The network of :class:`TGCNForecaster`, whose docstring has the formula, around the cell that takes batches. Each
    loads the other's state dict.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
        residual: Forecast the change since the last step of the window.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``
        - the cell sees ``[b n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = TGCN2Forecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Zhao et al. (T-GCN), IEEE T-ITS 2020, arXiv:1811.05320, as torch-geometric-temporal's ``TGCN2`` builds it.
        Differs: one graph convolution for each gate instead of two on top of each other for all; the residual.
    """

    name = "tgcn2"
    folded = False
    stlora_spec = cell_spec(_LAYERS, "b n c")

    def new_cell(self) -> Any:
        """The cell with fresh weights; it does not use its ``batch_size``."""
        return _cells.TGCN2(self.in_channels, self.hidden_channels, batch_size=1)
