"""DyGrEncoder: a gated graph convolution of each step, then an LSTM along time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import union
from stlora_peft.backbones.recurrent.cells import RecurrentForecaster
from stlora_peft.tuner.spec import BackboneSpec

_cells: Any = tgt.load().nn.recurrent
_AGGREGATIONS = ("add", "max", "mean")


class DyGrEncoderForecaster(RecurrentForecaster):
    r"""A gated graph convolution of each step, an LSTM along time that every node shares, and a linear head.

    Each of the :math:`L` rounds of the convolution passes messages and updates the nodes by a GRU,

    .. math::
        g^0_{t} &= [x_t, 0], \qquad
        g^{l+1}_{t,n} = \mathrm{GRU}\big(\mathrm{agg}_{m \to n}\; w_{mn} \Theta_l g^l_{t,m},\; g^l_{t,n}\big), \\
        \hat y_n &= W\, \mathrm{LSTM}(g^L_{1,n}, \dots, g^L_{T,n})_T + b \; [\, + x_{T,n} \,]

    It fits any number of nodes. The steps do not depend on each other before the LSTM, so that one convolution on the
    union of :math:`T B` copies of the graph and one call of the LSTM compute what torch-geometric-temporal's cell
    does step by step; more than one LSTM layer, which the cell cannot pass its state on to, works too.

    Args:
        in_channels: Channels of the input, values first; not above ``hidden_channels``.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the convolution and of the LSTM.
        conv_layers: Rounds :math:`L` of the convolution: a node hears nodes up to :math:`L` edges away.
        lstm_layers: Number of LSTM layers on top of each other.
        aggregation: What a node makes of its messages: ``"add"``, ``"max"`` or ``"mean"``.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``
        - the convolution sees rows ``[(t b n) c]``, the LSTM ``[t (b n) c]``, node fastest

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, if the input has more channels than the convolution, if the aggregation is
            unknown, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = DyGrEncoderForecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Taheri and Berger-Wolf, ASONAM 2019, as torch-geometric-temporal's ``DyGrEncoder`` builds it. Differs: a
        forecast of the values of every node instead of a decoder of links; the residual.
    """

    name = "dygrencoder"
    stlora_spec = BackboneSpec(
        target_modules=("conv_layer", "recurrent_layer", "head"),
        node_layout={"conv_layer": "(t b n) c", "recurrent_layer": "t (b n) c", "head": "b n c"},
        head=("head",),
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        conv_layers: int = 2,
        lstm_layers: int = 1,
        aggregation: str = "mean",
        residual: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            window,
            horizon,
            residual,
            hidden_channels=hidden_channels,
            conv_layers=conv_layers,
            lstm_layers=lstm_layers,
        )
        self._check_options(aggregation)
        self.hyperparameters["aggregation"] = aggregation
        self.cell = _cells.DyGrEncoder(hidden_channels, conv_layers, aggregation, hidden_channels, lstm_layers)
        self.head = self.new_head(hidden_channels)

    def encode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """Convolve all steps at once, and read them as sequences."""
        samples, steps, nodes, _ = x.shape
        rows = x.transpose(0, 1).flatten(0, 2)  # [(t b n) c]
        convolved = self.cell.conv_layer(rows, *union(edge_index, edge_weight, steps * samples, nodes))
        states: Tensor = self.cell.recurrent_layer(convolved.view(steps, samples * nodes, -1))[0]  # [t (b n) c]
        return states[-1]

    def _check_options(self, aggregation: str) -> None:
        """Refuse what the convolution cannot be built from."""
        if self.in_channels > self.hidden_channels:
            self.refuse(
                "too many input channels",
                f"in_channels <= hidden_channels = {self.hidden_channels}, which the input is filled up to with zeros",
                f"in_channels = {self.in_channels}",
                "give a larger hidden_channels",
            )
        if aggregation not in _AGGREGATIONS:
            self.refuse(
                "aggregation is unknown",
                f"one of {', '.join(_AGGREGATIONS)}",
                repr(aggregation),
                "take one of the list",
            )
