"""MSTGCN: blocks of a Chebyshev graph convolution and a convolution along time, without attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.base import Forecaster
from stlora_peft.backbones.chebyshev import CachedChebConv
from stlora_peft.tuner.spec import BackboneSpec

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _MSTGCNBlock(nn.Module):
        _time_conv: nn.Conv2d
        _residual_conv: nn.Conv2d
        _layer_norm: nn.LayerNorm

        def __init__(self, in_channels: int, K: int, chev: int, time: int, stride: int) -> None: ...

        def _reset_parameters(self) -> None: ...
else:
    _MSTGCNBlock = tgt.load().nn.attention.mstgcn.MSTGCNBlock


class Block(_MSTGCNBlock):
    """torch-geometric-temporal's MSTGCNBlock over all steps at once, with edge weights.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **output:** :math:`(B, T', N, C_{out})`
    """

    def __init__(self, in_channels: int, channels: int, K: int, stride: int) -> None:
        super().__init__(in_channels, K, channels, channels, stride)
        self._cheb_conv = CachedChebConv(in_channels, channels, K)
        self._reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Convolve over the graph, then along time."""
        hidden = self._cheb_conv(x, edge_index, edge_weight).relu()
        hidden = self._time_conv(hidden.permute(0, 3, 2, 1))  # [b c n t]
        hidden = hidden + self._residual_conv(x.permute(0, 3, 2, 1))
        out: Tensor = self._layer_norm(hidden.relu().permute(0, 3, 2, 1))
        return out


class MSTGCN(Forecaster):
    r"""Blocks of torch-geometric-temporal's MSTGCN and a linear head over all steps.

    It is ASTGCN without its attentions: a block is a Chebyshev graph convolution :math:`\Theta`, a convolution
    :math:`\Phi` along time, a residual map :math:`R` and a layer normalisation over the channels,

    .. math::
        z = \mathrm{LN}\,\mathrm{relu}\bigl(R x + \Phi * \mathrm{relu}(x *_{\hat L} \Theta)\bigr), \qquad
        \hat y_n = W\, \mathrm{vec}(z_{1 \dots T', n}) + b \; [\, + x_{T,n} \,]

    No weight is bound to a node: the network fits any number of them.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the blocks.
        K: Number of Chebyshev terms: a node hears nodes up to :math:`K - 1` edges away in each block.
        num_blocks: Number of blocks.
        time_stride: Stride of the first block along time.
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
        >>> model = MSTGCN(in_channels=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Guo et al. (ASTGCN), AAAI 2019, doi:10.1609/aaai.v33i01.3301922, where it is the ablation. Differs: the
        recent window only; the symmetrically normalised Laplacian, whose largest eigenvalue is at most 2, where
        torch-geometric-temporal 0.56.2 searches that of the plain one from a random start in every forward and fails
        without edges; edge weights; the final convolution is the same linear map as an ``nn.Linear``; the residual.
        torch-geometric-temporal mixes samples, nodes and steps where it is given one graph for all steps; given the
        same graph once for each step it computes what is computed here.
    """

    name = "mstgcn"
    stlora_spec = BackboneSpec(
        target_modules=("_cheb_conv", "_time_conv", "_residual_conv", "head"),
        node_layout={
            "_cheb_conv": "b t n c",
            "_time_conv": "b c n t",
            "_residual_conv": "b c n t",
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
        K: int = 3,
        num_blocks: int = 2,
        time_stride: int = 1,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {"hidden_channels": hidden_channels, "K": K, "num_blocks": num_blocks, "time_stride": time_stride}
        self.check_positive(**sizes)
        self.hyperparameters |= sizes
        widths = [in_channels] + [hidden_channels] * (num_blocks - 1)
        strides = [time_stride] + [1] * (num_blocks - 1)
        self.blocks = nn.ModuleList(
            Block(width, hidden_channels, K, stride) for width, stride in zip(widths, strides, strict=True)
        )
        steps = (window - 1) // time_stride + 1
        self.head = nn.Linear(steps * hidden_channels, horizon * out_channels)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the blocks over the graph and read the steps that are left."""
        for block in self.blocks:
            x = block(x, edge_index, edge_weight)
        change: Tensor = self.head(x.transpose(1, 2).flatten(2))  # [b n (t c)]
        return change
