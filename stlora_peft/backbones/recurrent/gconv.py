"""GConvGRU, GConvLSTM and GCLSTM: gates made of Chebyshev graph convolutions."""

from __future__ import annotations

from typing import Any, ClassVar

from stlora_peft.backbones import tgt
from stlora_peft.backbones.chebyshev import CachedChebConv
from stlora_peft.backbones.recurrent.cells import RecurrentForecaster, cell_spec

_cells: Any = tgt.load().nn.recurrent


class ChebForecaster(RecurrentForecaster):
    """What the three networks share: their cell takes ``[b n c]``, and its convolutions keep the graph.

    The convolutions are :class:`stlora_peft.backbones.chebyshev.CachedChebConv`: PyG's parameters and numbers, faster.

    Attributes:
        upstream: Name of the cell's class in torch-geometric-temporal.
    """

    upstream: ClassVar[str]

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        K: int = 3,
        residual: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, window, horizon, residual, hidden_channels=hidden_channels, K=K)
        self.cell = _with_cached_graphs(getattr(_cells, self.upstream)(in_channels, hidden_channels, K))
        self.head = self.new_head(hidden_channels)


class GConvGRUForecaster(ChebForecaster):
    r"""A GRU whose matrix products are Chebyshev graph convolutions, and a linear head.

    With graph convolutions :math:`\Theta` of order :math:`K`, the state :math:`h_t` of all nodes is

    .. math::
        z_t &= \sigma(\Theta_{xz} * x_t + \Theta_{hz} * h_{t-1}), \qquad
        r_t = \sigma(\Theta_{xr} * x_t + \Theta_{hr} * h_{t-1}), \\
        \tilde h_t &= \tanh(\Theta_{xh} * x_t + \Theta_{hh} * (h_{t-1} \odot r_t)), \qquad
        h_t = z_t \odot h_{t-1} + (1 - z_t) \odot \tilde h_t, \\
        \hat y_n &= W h_{T,n} + b \; [\, + x_{T,n} \,]

    It fits any number of nodes.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
        K: Terms of each convolution: a node hears nodes up to :math:`K - 1` edges away in each step.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = GConvGRUForecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Seo et al., ICONIP 2018, arXiv:1612.07659, as torch-geometric-temporal's ``GConvGRU`` builds it. Differs: all
        horizons at once from the last state instead of the next step; the residual.
    """

    name = "gconvgru"
    upstream = "GConvGRU"
    stlora_spec = cell_spec(("conv_x_z", "conv_h_z", "conv_x_r", "conv_h_r", "conv_x_h", "conv_h_h"), "b n c")


class GConvLSTMForecaster(ChebForecaster):
    r"""An LSTM with peepholes whose matrix products are Chebyshev graph convolutions, and a linear head.

    With graph convolutions :math:`\Theta` of order :math:`K` and the peepholes :math:`w`, one number a channel,

    .. math::
        i_t &= \sigma(\Theta_{xi} * x_t + \Theta_{hi} * h_{t-1} + w_i \odot c_{t-1} + b_i), \qquad
        f_t \text{ alike}, \\
        c_t &= f_t \odot c_{t-1} + i_t \odot \tanh(\Theta_{xc} * x_t + \Theta_{hc} * h_{t-1} + b_c), \\
        o_t &= \sigma(\Theta_{xo} * x_t + \Theta_{ho} * h_{t-1} + w_o \odot c_t + b_o), \qquad
        h_t = o_t \odot \tanh(c_t), \\
        \hat y_n &= W h_{T,n} + b \; [\, + x_{T,n} \,]

    It fits any number of nodes.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
        K: Terms of each convolution: a node hears nodes up to :math:`K - 1` edges away in each step.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = GConvLSTMForecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Seo et al., ICONIP 2018, arXiv:1612.07659, as torch-geometric-temporal's ``GConvLSTM`` builds it. Differs: all
        horizons at once from the last state instead of the next step; the residual.
    """

    name = "gconvlstm"
    upstream = "GConvLSTM"
    num_states = 2
    stlora_spec = cell_spec([f"conv_{source}_{gate}" for gate in "ifco" for source in "xh"], "b n c")


class GCLSTMForecaster(ChebForecaster):
    r"""An LSTM whose state passes through Chebyshev graph convolutions and whose input does not.

    With graph convolutions :math:`\Theta` of order :math:`K` and matrices :math:`W_g`,

    .. math::
        i_t &= \sigma(x_t W_i + \Theta_i * h_{t-1} + b_i), \qquad f_t, o_t \text{ alike}, \\
        c_t &= f_t \odot c_{t-1} + i_t \odot \tanh(x_t W_c + \Theta_c * h_{t-1} + b_c), \qquad
        h_t = o_t \odot \tanh(c_t), \\
        \hat y_n &= W h_{T,n} + b \; [\, + x_{T,n} \,]

    The matrices are bare parameters of the cell, ``W_i`` to ``W_o``, and adapted with it (target ``cell``); its
    convolutions are targets of their own. With a window of one step the state is zero when the convolutions read it,
    so that nothing in them trains.

    It fits any number of nodes.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the state.
        K: Terms of each convolution: a node hears nodes up to :math:`K - 1` edges away in each step.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = GCLSTMForecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Chen et al. (GC-LSTM), arXiv:1812.04206, as torch-geometric-temporal's ``GCLSTM`` builds it. Differs: a
        forecast of the values of every node instead of the links between them; the residual.
    """

    name = "gclstm"
    upstream = "GCLSTM"
    num_states = 2
    stlora_spec = cell_spec(("cell", "conv_i", "conv_f", "conv_c", "conv_o"), "b n c")


def _with_cached_graphs(cell: Any) -> Any:
    """Put a convolution that keeps the graph in place of each ``ChebConv``, with the same weights."""
    for name, conv in list(cell.named_children()):
        cached = CachedChebConv(conv.in_channels, conv.out_channels, K=cell.K)
        cached.load_state_dict(conv.state_dict())
        setattr(cell, name, cached)
    return cell
