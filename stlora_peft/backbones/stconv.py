"""torch-geometric-temporal's STConv in one call over batch and time, with a cached propagation matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.chebyshev import CachedChebConv

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _UpstreamSTConv(nn.Module):
        _temporal_conv1: nn.Module
        _temporal_conv2: nn.Module
        _graph_conv: nn.Module
        _batch_norm: nn.Module

        def __init__(self, *args: Any) -> None:
            """Types of torch-geometric-temporal's STConv."""
else:
    _UpstreamSTConv = tgt.load().nn.STConv


class STConv(_UpstreamSTConv):
    r"""torch-geometric-temporal's ``STConv`` without its loop over batch and time.

    Arguments, parameters, state dict and numbers are those of the original, up to rounding. A training step is
    several times faster on a CPU (``benchmarks/accelerate``), because the graph convolution is one call over
    ``[b t n c]`` that multiplies with a cached matrix.

    Args:
        num_nodes: Number of nodes :math:`N` of the batch normalisation.
        in_channels: Width of the input.
        hidden_channels: Width between the two gated convolutions along time.
        out_channels: Width of the output.
        kernel_size: Steps that each convolution along time spans.
        K: Number of Chebyshev terms.
        normalization: Laplacian of the graph convolution: ``"sym"``, ``"rw"`` or ``None``.
        bias: Learn a bias in the graph convolution.

    Shapes:
        - **X:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **output:** :math:`(B, T - 2 (kernel\_size - 1), N, C_{out})`, ``[b t n c]``

    Example:
        >>> import torch
        >>> block = STConv(5, 2, 8, 4, kernel_size=3, K=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> block(torch.zeros(2, 12, 5, 2), ring).shape
        torch.Size([2, 8, 5, 4])

    References:
        Yu et al. (STGCN), IJCAI 2018, arXiv:1709.04875, as torch-geometric-temporal 0.56.2 builds it. Differs: in
        speed alone.
    """

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int,
        K: int,
        normalization: str | None = "sym",
        bias: bool = True,
    ) -> None:
        super().__init__(num_nodes, in_channels, hidden_channels, out_channels, kernel_size, K, normalization, bias)
        self._graph_conv = CachedChebConv(hidden_channels, hidden_channels, K, normalization, bias)

    def forward(self, X: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Run the block over all samples and steps at once.

        Args:
            X: Features of the nodes over time, ``[b t n c]``.
            edge_index: Edges, source above target.
            edge_weight: Weights of the edges; all one where absent.
        """
        hidden = self._graph_conv(self._temporal_conv1(X).contiguous(), edge_index, edge_weight)
        hidden = self._temporal_conv2(hidden.relu())
        # torch's gradients of a normalisation are wrong where one step is left and the nodes are last in memory
        normalised: Tensor = self._batch_norm(hidden.transpose(1, 2).contiguous())  # [b n t c]
        return normalised.transpose(1, 2)
