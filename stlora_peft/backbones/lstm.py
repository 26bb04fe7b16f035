"""One LSTM that every node shares."""

from __future__ import annotations

from torch import Tensor, nn

from stlora_peft.backbones.base import Forecaster
from stlora_peft.tuner.spec import BackboneSpec


class LSTMForecaster(Forecaster):
    r"""One ``nn.LSTM`` shared by the nodes, and a linear head on its last hidden state.

    .. math::
        \hat y_{n} = W\, \mathrm{LSTM}(x_{1,n}, \dots, x_{T,n})_T + b \; [\, + x_{T,n} \,]

    Each node is a row of its own: nodes do not see each other, the graph is checked and not used, and the network
    fits any number of nodes. It is the control that tells what a graph is worth.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_size: Width of the hidden state.
        num_layers: Number of LSTM layers on top of each other.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``
        - the LSTM itself sees rows ``[(b n) t c]``, node fastest

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.

    Example:
        >>> import torch
        >>> model = LSTMForecaster(in_channels=3, hidden_size=16)
        >>> model(torch.zeros(8, 12, 207, 3), torch.zeros(2, 0, dtype=torch.long)).shape  # [b t n c]
        torch.Size([8, 12, 207, 1])

    References:
        FC-LSTM of Li et al. (DCRNN), ICLR 2018, arXiv:1707.01926, differs: there one LSTM reads all nodes at once.
    """

    name = "lstm"
    stlora_spec = BackboneSpec(
        target_modules=("lstm", "head"),
        node_layout={"lstm": "(b n) t c", "head": "b n c"},
        final_state=("lstm",),
        head=("head",),
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_size: int = 64,
        num_layers: int = 1,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        self.check_positive(hidden_size=hidden_size, num_layers=num_layers)
        self.hyperparameters |= {"hidden_size": hidden_size, "num_layers": num_layers}
        self.lstm = nn.LSTM(in_channels, hidden_size, num_layers, batch_first=True)
        self.head = nn.Linear(hidden_size, horizon * out_channels)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Read every node's window as one row of the LSTM; the graph is not used."""
        rows = x.transpose(1, 2).flatten(0, 1)  # [(b n) t c]
        final = self.lstm(rows)[1][0][-1]
        change: Tensor = self.head(final.reshape(x.shape[0], x.shape[2], -1))  # [b n (t c)]
        return change
