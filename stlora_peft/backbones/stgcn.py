"""STGCN: two spatio-temporal convolution blocks and a head."""

from __future__ import annotations

from torch import Tensor, nn

from stlora_peft.backbones.base import Forecaster
from stlora_peft.backbones.stconv import STConv
from stlora_peft.tuner.spec import BackboneSpec


class Head(nn.Module):
    """Two linear layers that read what the blocks left of a node's window.

    Args:
        in_features: Steps that are left times hidden channels.
        hidden_features: Width between the two layers.
        out_features: Numbers per node that the forecast consists of.

    Shapes:
        - **x:** :math:`(B, N, F_{in})`, ``[b n c]``
        - **output:** :math:`(B, N, F_{out})`, ``[b n c]``
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_features, hidden_features)
        self.output = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map the features of each node to its forecast."""
        forecast: Tensor = self.output(self.hidden(x).relu())
        return forecast


class STGCN(Forecaster):
    r"""Two STConv blocks of torch-geometric-temporal and a head of two linear layers.

    A block is a gated convolution along time, a Chebyshev graph convolution of order :math:`K`, a second gated
    convolution and a batch normalisation over the nodes. Each of its convolutions takes ``kernel_size - 1`` steps
    away, so that :math:`T' = T - 4\,(\mathrm{kernel\_size} - 1)` steps are left for the head: 4 of 12 with kernel 3.

    .. math::
        z = \mathrm{STConv}_2(\mathrm{STConv}_1(x)), \qquad
        \hat y_n = W_2\, \mathrm{relu}(W_1\, \mathrm{vec}(z_{1 \dots T', n}) + b_1) + b_2 \; [\, + x_{T,n} \,]

    The blocks have torch-geometric-temporal's parameters under the same names and compute the same numbers as its
    ``STConv``, only faster, see :class:`stlora_peft.backbones.stconv.STConv`.

    Args:
        num_nodes: Number of nodes :math:`N`: the normalisation of each block has one mean, variance, weight and bias
            for each of them.
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`, at least ``4 * (kernel_size - 1) + 1``.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the blocks.
        kernel_size: Steps that each of the four gated convolutions spans.
        K: Order of the graph convolutions: a node hears nodes up to :math:`K - 1` edges away in each block.
        head_channels: Width between the two layers of the head.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, if the window is too short for the kernels, or if ``residual`` is asked for
            with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = STGCN(num_nodes=5, in_channels=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Yu et al. (STGCN), IJCAI 2018, arXiv:1709.04875. Differs: torch-geometric-temporal's block normalises each
        node over batch, time and channels instead of each channel; the head reads the remaining steps with linear
        layers instead of a third gated convolution; all horizons at once instead of one step; the residual.
    """

    name = "stgcn"
    stlora_spec = BackboneSpec(
        target_modules=("conv_1", "conv_2", "conv_3", "_graph_conv", "head.hidden", "head.output"),
        node_layout={
            "conv_1": "b c n t",
            "conv_2": "b c n t",
            "conv_3": "b c n t",
            "_graph_conv": "... n c",
            "head.hidden": "b n c",
            "head.output": "b n c",
        },
        node_bound=("block1._batch_norm", "block2._batch_norm"),
        head=("head.hidden", "head.output"),
    )

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        kernel_size: int = 3,
        K: int = 3,
        head_channels: int = 64,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {
            "num_nodes": num_nodes,
            "hidden_channels": hidden_channels,
            "kernel_size": kernel_size,
            "K": K,
            "head_channels": head_channels,
        }
        self.check_positive(**sizes)
        self.hyperparameters |= sizes
        steps = self._remaining_steps(kernel_size)
        self.block1 = STConv(num_nodes, in_channels, hidden_channels, hidden_channels, kernel_size, K)
        self.block2 = STConv(num_nodes, hidden_channels, hidden_channels, hidden_channels, kernel_size, K)
        self.head = Head(steps * hidden_channels, head_channels, horizon * out_channels)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the blocks over the graph and read the steps that are left."""
        z = self.block2(self.block1(x, edge_index, edge_weight), edge_index, edge_weight)  # [b t n c]
        change: Tensor = self.head(z.transpose(1, 2).flatten(2))  # [b n (t c)]
        return change

    def check_input(self, x: Tensor) -> None:
        """Refuse an input that does not fit, before any arithmetic.

        The number of nodes is that of the normalisation as it stands. An adapter that puts its own in place of it
        checks the nodes itself.

        Raises:
            ValueError: If the number of axes, of steps, of channels or of nodes is wrong.
        """
        super().check_input(x)
        norm = self.block1._batch_norm
        if isinstance(norm, nn.BatchNorm2d) and norm.weight.shape[0] != x.shape[2]:
            bound, found = norm.weight.shape[0], x.shape[2]
            self.refuse(
                "wrong number of nodes",
                f"N={bound} on axis 'n' of 'b t n c', the number of nodes of its normalisation",
                f"N={found} from an input of shape {tuple(x.shape)}",
                f"adapt it to the new city with STLoraConfig(num_nodes={found}), or build it with num_nodes={found}",
            )

    def _remaining_steps(self, kernel_size: int) -> int:
        """Number of steps that four unpadded convolutions leave of the window."""
        steps = self.window - 4 * (kernel_size - 1)
        if steps < 1:
            self.refuse(
                "window too short for the kernels",
                f"window >= 4 * (kernel_size - 1) + 1 = {4 * (kernel_size - 1) + 1} for kernel_size={kernel_size}",
                f"window = {self.window}",
                "give a longer window or a smaller kernel_size",
            )
        return steps
