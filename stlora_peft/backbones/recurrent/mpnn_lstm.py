"""MPNNLSTM: two graph convolutions of each step, then two LSTMs along time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import union
from stlora_peft.backbones.recurrent.cells import RecurrentForecaster
from stlora_peft.tuner.spec import BackboneSpec

_cells: Any = tgt.load().nn.recurrent


class MPNNLSTMForecaster(RecurrentForecaster):
    r"""Two graph convolutions of each step, two LSTMs along time that every node shares, and a linear head.

    With graph convolutions :math:`\Theta` of one hop, batch normalisation and dropout in :math:`\phi`,

    .. math::
        g_t &= \phi(\mathrm{relu}(\Theta_1 * x_t)), \qquad g'_t = \phi(\mathrm{relu}(\Theta_2 * g_t)), \\
        h_{1 \dots T} &= \mathrm{LSTM}_1([g_1, g'_1], \dots, [g_T, g'_T]), \qquad
        h'_{1 \dots T} = \mathrm{LSTM}_2(h_1, \dots, h_T), \\
        \hat y_n &= W [h_{T,n}, h'_{T,n}, s_n] + b \; [\, + x_{T,n} \,]

    where :math:`s_n` is all channels of the first step and, as torch-geometric-temporal has it, the *last* channel of
    each other step: give the values last if they are to reach the head so.

    The normalisation is over channels, so that the network fits any number of nodes; the number that
    torch-geometric-temporal is built for is taken from the input. In training mode the normalisation joins the
    samples of a batch. The head belongs to the ``window`` that it was built for.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the convolutions and of the LSTMs.
        dropout: Share of the convolved features that is dropped in training, from 0 up to, but not, 1.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``
        - the convolutions see rows ``[(b t n) c]``, the LSTMs ``[t (b n) c]``, node fastest

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, if ``dropout`` is out of range, or if ``residual`` is asked for with fewer
            input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = MPNNLSTMForecaster(in_channels=3, hidden_channels=8)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Panagopoulos et al., AAAI 2021, arXiv:2009.08388, as torch-geometric-temporal's ``MPNNLSTM`` builds it.
        Differs: one linear layer for the head; all horizons at once; the residual.
    """

    name = "mpnnlstm"
    stlora_spec = BackboneSpec(
        target_modules=("_convolution_1", "_convolution_2", "_recurrent_1", "_recurrent_2", "head"),
        node_layout={
            "_convolution_1": "(b t n) c",
            "_convolution_2": "(b t n) c",
            "_recurrent_1": "t (b n) c",
            "_recurrent_2": "t (b n) c",
            "head": "b n c",
        },
        head=("head",),
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, window, horizon, residual, hidden_channels=hidden_channels)
        if not 0 <= dropout < 1:
            self.refuse("dropout out of range", "0 <= dropout < 1", f"dropout = {dropout}", "give a share below 1")
        self.hyperparameters["dropout"] = dropout
        self.cell = _cells.MPNNLSTM(in_channels, hidden_channels, num_nodes=1, window=window, dropout=dropout)
        self.head = self.new_head(2 * hidden_channels + in_channels + window - 1)

    def encode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """Run the cell on the union of a graph for each sample and step."""
        self.cell.num_nodes = x.shape[2]  # it only reshapes by it
        graph = union(edge_index, edge_weight, x.shape[0] * x.shape[1], x.shape[2])
        states: Tensor = self.cell(x.flatten(0, 2).contiguous(), *graph)  # [(b n) c]
        return states
