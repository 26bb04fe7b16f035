"""ASTGCN: two blocks whose graph convolution is weighed by an attention over pairs of nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.nodes import NodeBound, NodeBoundForecaster, mean_entry, mean_pair
from stlora_peft.tuner.spec import BackboneSpec

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _TemporalAttention(nn.Module):
        _U1: nn.Parameter
        _U2: nn.Parameter
        _U3: nn.Parameter
        _be: nn.Parameter
        _Ve: nn.Parameter

        def __init__(self, in_channels: int, num_of_vertices: int, num_of_timesteps: int) -> None: ...

    class _SpatialAttention(nn.Module):
        _W1: nn.Parameter
        _W2: nn.Parameter
        _W3: nn.Parameter
        _bs: nn.Parameter
        _Vs: nn.Parameter

        def __init__(self, in_channels: int, num_of_vertices: int, num_of_timesteps: int) -> None: ...

    class _ChebConvAttention(nn.Module):
        _weight: nn.Parameter
        _bias: nn.Parameter

        def __init__(self, in_channels: int, out_channels: int, K: int, normalization: str | None) -> None: ...

        def __norm__(
            self,
            edge_index: Tensor,
            num_nodes: int,
            edge_weight: Tensor | None,
            normalization: str | None,
            lambda_max: float,
            dtype: torch.dtype,
        ) -> tuple[Tensor, Tensor]: ...

    class _ASTGCNBlock(nn.Module):
        _time_convolution: nn.Conv2d
        _residual_convolution: nn.Conv2d
        _layer_norm: nn.LayerNorm

        def __init__(
            self, in_channels: int, K: int, chev: int, time: int, stride: int, N: int, T: int, normalization: str
        ) -> None: ...

        def _reset_parameters(self) -> None: ...
else:
    _upstream = tgt.load().nn.attention.astgcn
    _TemporalAttention, _SpatialAttention = _upstream.TemporalAttention, _upstream.SpatialAttention
    _ChebConvAttention, _ASTGCNBlock = _upstream.ChebConvAttention, _upstream.ASTGCNBlock


class TemporalAttention(_TemporalAttention, NodeBound):
    """Attention between the steps of a window, whose scores are sums over all nodes.

    In another city its weights of the nodes, ``_U1`` and ``_U2``, are the mean over the old ones, scaled so that the
    sums keep their size.
    """

    def __init__(self, in_channels: int, num_nodes: int, window: int) -> None:
        super().__init__(in_channels, num_nodes, window)
        self.num_nodes = num_nodes

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the steps, ``[b t t]``, for ``x`` of ``[b n c t]``."""
        left = torch.einsum("bnct,n,cm->btm", x, self._U1, self._U2)
        scores = left @ torch.einsum("c,bnct->bnt", self._U3, x)
        # Not with @: with a weight it rounds otherwise once the weight is to be trained, as an adapter's copy is.
        return torch.einsum("st,btu->bsu", self._Ve, (scores + self._be).sigmoid()).softmax(1)

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """Mean weight of a node."""
        return {
            "_U1": mean_entry(self._U1, 0, num_nodes, summed=True),
            "_U2": mean_entry(self._U2, 1, num_nodes, summed=True),
        }


class SpatialAttention(_SpatialAttention, NodeBound):
    """Attention between the nodes, with a weight ``_Vs`` and a bias ``_bs`` for each pair of them.

    In another city both have two values, one for a node and itself and one for any other pair: the means over the old
    pairs, those of ``_Vs`` scaled so that the sum over a row stays.
    """

    def __init__(self, in_channels: int, num_nodes: int, window: int) -> None:
        super().__init__(in_channels, num_nodes, window)
        self.num_nodes = num_nodes

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the nodes, ``[b n n]``, for ``x`` of ``[b n c t]``; columns sum to one."""
        left = torch.einsum("bnct,t,cu->bnu", x, self._W1, self._W2)
        scores = left @ torch.einsum("c,bmct->btm", self._W3, x)
        return torch.einsum("nm,bmk->bnk", self._Vs, (scores + self._bs).sigmoid()).softmax(1)

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """Mean weight and bias of a pair."""
        return {
            "_bs": mean_pair(self._bs, num_nodes, summed=False),
            "_Vs": mean_pair(self._Vs, num_nodes, summed=True),
        }


class ChebConvAttention(_ChebConvAttention):
    r"""Chebyshev graph convolution whose terms are weighed by an attention between the nodes.

    .. math::
        y_i = b + \sum_{k=0}^{K-1} \sum_j T_k(\hat L)_{ji}\, S_{ji}\, x_j\, \Theta_k , \qquad
        \hat L = -D^{-1/2} A D^{-1/2}

    with the attention :math:`S`, whose columns sum to one, and the edges :math:`A_{ji}` from :math:`j` to :math:`i`.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        K: Number of terms :math:`K`, at least 1.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **attention:** :math:`(B, N, N)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, T, N, C_{out})`

    References:
        Guo et al. (ASTGCN), AAAI 2019, and its authors' code. Differs from torch-geometric-temporal 0.56.2, which
        multiplies the term of order 1 by the attention twice, so that it fades with :math:`1 / N^2`, builds the
        higher ones from that, and passes messages against the direction of the edges.
    """

    def __init__(self, in_channels: int, out_channels: int, K: int) -> None:
        super().__init__(in_channels, out_channels, K, "sym")

    def forward(self, x: Tensor, edge_index: Tensor, attention: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Convolve every step over the graph, weighed by the sample's attention."""
        rows = x.permute(0, 2, 1, 3).flatten(2)  # [b n (t c)]
        own = attention.diagonal(dim1=1, dim2=2)[:, None, :, None]
        out = own * x @ self._weight[0] + self._bias
        for term, weight in zip(self._terms(edge_index, edge_weight, x), self._weight[1:], strict=True):
            heard = (term * attention).transpose(1, 2) @ rows
            out = out + heard.unflatten(2, (x.shape[1], -1)).transpose(1, 2) @ weight
        return out

    def _terms(self, edge_index: Tensor, edge_weight: Tensor | None, x: Tensor) -> list[Tensor]:
        """Chebyshev polynomials of the Laplacian from the first on, ``[n n]``, source above target."""
        size = x.shape[2]
        edges, norm = self.__norm__(edge_index, size, edge_weight, "sym", 2.0, dtype=x.dtype)
        laplacian = x.new_zeros(size, size).index_put((edges[0], edges[1]), norm.to(x.dtype), accumulate=True)
        terms = [torch.eye(size, dtype=x.dtype, device=x.device), laplacian]
        while len(terms) < self._weight.shape[0]:
            terms.append(2.0 * laplacian @ terms[-1] - terms[-2])
        return terms[1 : self._weight.shape[0]]


class Block(_ASTGCNBlock):
    """torch-geometric-temporal's ASTGCNBlock over all steps at once, with edge weights.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **output:** :math:`(B, T', N, C_{out})`
    """

    def __init__(self, in_channels: int, channels: int, K: int, stride: int, num_nodes: int, window: int) -> None:
        super().__init__(in_channels, K, channels, channels, stride, num_nodes, window, "sym")
        self._temporal_attention = TemporalAttention(in_channels, num_nodes, window)
        self._spatial_attention = SpatialAttention(in_channels, num_nodes, window)
        self._chebconv_attention = ChebConvAttention(in_channels, channels, K)
        self._reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Attend, convolve over the graph, then along time."""
        series = x.permute(0, 2, 3, 1)  # [b n c t]
        steps = self._temporal_attention(series)
        attention = self._spatial_attention((series.flatten(1, 2) @ steps).view_as(series))  # [b n n]
        hidden = self._chebconv_attention(x, edge_index, attention, edge_weight).relu()
        hidden = self._time_convolution(hidden.permute(0, 3, 2, 1))  # [b c n t]
        hidden = hidden + self._residual_convolution(x.permute(0, 3, 2, 1))
        out: Tensor = self._layer_norm(hidden.relu().permute(0, 3, 2, 1))
        return out


class ASTGCN(NodeBoundForecaster):
    r"""Two attention blocks of torch-geometric-temporal and a linear head over all steps.

    A block scores the steps of the window against each other, then the nodes, weighs the terms of a Chebyshev graph
    convolution with the scores of the nodes, and convolves along time:

    .. math::
        S = \mathrm{softmax}\bigl(V_s\, \sigma(\mathrm{score}(x E) + b_s)\bigr), \qquad
        z = \mathrm{LN}\,\mathrm{relu}\bigl(R x + \Phi * \mathrm{relu}(x *_{\hat L \odot S} \Theta)\bigr)

    with the attention :math:`E` between steps, :math:`S` between nodes and the residual map :math:`R`. The forecast is
    :math:`\hat y_n = W\, \mathrm{vec}(z_{1 \dots T', n}) + b \; [\, + x_{T,n} \,]`. All of a sample's nodes enter the
    scores.

    Args:
        num_nodes: Number of nodes :math:`N`: both attentions of a block have weights for each node, the spatial one
            for each pair, see :class:`TemporalAttention` and :class:`SpatialAttention`.
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the blocks.
        K: Number of Chebyshev terms: a node hears nodes up to :math:`K - 1` edges away in each block.
        time_stride: Stride of the first block along time.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Cost:
        :math:`4 N^2 + N (2 + C_{in} + C_{hidden})` numbers are bound to the nodes, and a forward holds
        :math:`B N^2` scores.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> model = ASTGCN(num_nodes=5, in_channels=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Guo et al. (ASTGCN), AAAI 2019, doi:10.1609/aaai.v33i01.3301922. Differs: the recent window only, without the
        daily and weekly ones; the symmetrically normalised Laplacian, whose largest eigenvalue is at most 2 and is
        not searched for; edge weights; the final convolution is the same linear map as an ``nn.Linear``; the
        residual. :class:`ChebConvAttention` says where it computes other numbers than torch-geometric-temporal.
    """

    name = "astgcn"
    stlora_spec = BackboneSpec(
        target_modules=("_chebconv_attention", "_time_convolution", "_residual_convolution", "head"),
        node_layout={
            "_chebconv_attention": "b t n c",
            "_time_convolution": "b c n t",
            "_residual_convolution": "b c n t",
            "head": "b n c",
        },
        node_bound=(
            "block1._temporal_attention",
            "block1._spatial_attention",
            "block2._temporal_attention",
            "block2._spatial_attention",
        ),
        head=("head",),
    )

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        K: int = 3,
        time_stride: int = 1,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {"num_nodes": num_nodes, "hidden_channels": hidden_channels, "K": K, "time_stride": time_stride}
        self.check_positive(**sizes)
        self.hyperparameters |= sizes
        steps = (window - 1) // time_stride + 1
        self.block1 = Block(in_channels, hidden_channels, K, time_stride, num_nodes, window)
        self.block2 = Block(hidden_channels, hidden_channels, K, 1, num_nodes, steps)
        self.head = nn.Linear(steps * hidden_channels, horizon * out_channels)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the blocks over the graph and read the steps that are left."""
        z = self.block2(self.block1(x, edge_index, edge_weight), edge_index, edge_weight)  # [b t n c]
        change: Tensor = self.head(z.transpose(1, 2).flatten(2))  # [b n (t c)]
        return change
