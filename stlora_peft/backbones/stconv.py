"""torch-geometric-temporal's STConv in one call over batch and time, with a cached propagation matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import check_graph
from stlora_peft.backbones.propagation import DENSE_ON_ACCELERATOR, Propagation, PropagationCache

if TYPE_CHECKING:  # neither package ships types: this is the part of them that is used here

    class _MessagePassing(nn.Module):
        def propagate(self, edge_index: Tensor, *, x: Tensor, norm: Tensor) -> Tensor: ...

    class _ChebConv(_MessagePassing):
        lins: nn.ModuleList
        bias: Tensor | None
        normalization: str | None
        explain: bool | None

        def __init__(self, in_channels: int, out_channels: int, K: int, normalization: str | None, bias: bool) -> None:
            """Types of PyG's ChebConv."""

        def __norm__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]: ...

    class _UpstreamSTConv(nn.Module):
        _temporal_conv1: nn.Module
        _temporal_conv2: nn.Module
        _graph_conv: nn.Module
        _batch_norm: nn.Module

        def __init__(self, *args: Any) -> None:
            """Types of torch-geometric-temporal's STConv."""
else:
    _UpstreamSTConv = tgt.load().nn.STConv
    from torch_geometric.nn import ChebConv as _ChebConv
    from torch_geometric.nn import MessagePassing as _MessagePassing


_Method = TypeVar("_Method", bound=Callable[..., Any])
_outside_graphs = cast(Callable[[_Method], _Method], torch.compiler.disable)


class CachedChebConv(_ChebConv):
    r"""PyG's ``ChebConv`` that keeps the propagation matrix of the graph it saw last.

    .. math::
        y = b + \sum_{k=0}^{K-1} T_k(\hat L)\, x\, W_k^\top, \qquad
        \hat L = \tfrac{2}{\lambda_{\max}} L - I

    with the Chebyshev polynomials :math:`T_k` and the Laplacian :math:`L` of the graph under ``normalization``, both
    exactly as PyG defines them. Parameters and state dict are those of ``ChebConv``.

    The matrix is computed again whenever a value, shape, type or device of the graph differs from last time, in
    place or not. It is part of neither the state dict nor of copies and pickles. Learnable edge weights, PyG's
    explainers, ``torch.export`` and graphs of more than 2 048 nodes on a device other than a CPU go PyG's way, edge by
    edge, without a matrix. The matrix of a crowded graph, where at least three in
    ten pairs of nodes are joined, is dense and carries a non-finite feature to every node, not only to the
    neighbours; any other is in CSR form.

    The layers in ``lins`` are called as modules, so that replacing or hooking one of them takes effect; PyG calls
    the ``forward`` of the higher ones.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        K: Number of terms :math:`K`, at least 1.
        normalization: Laplacian: ``"sym"``, ``"rw"`` or ``None``.
        bias: Learn an additive bias :math:`b`.

    Shapes:
        - **x:** :math:`(*, N, C_{in})`, for instance ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **batch:** :math:`(N)` *(optional)*, **lambda_max:** scalar or one per graph *(optional)*
        - **output:** :math:`(*, N, C_{out})`

    Raises:
        ValueError: In ``forward``, if the edges do not fit the nodes.

    Example:
        >>> conv = CachedChebConv(4, 8, K=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> conv(torch.zeros(2, 12, 5, 4), ring).shape
        torch.Size([2, 12, 5, 8])

    References:
        Defferrard et al., NeurIPS 2016, arXiv:1606.09375. Differs from PyG: in speed alone.
    """

    def __init__(
        self, in_channels: int, out_channels: int, K: int, normalization: str | None = "sym", bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, K, normalization, bias)
        self._cache = PropagationCache()

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        lambda_max: Tensor | float | None = None,
    ) -> Tensor:
        """Convolve the features of the nodes over the graph.

        Args:
            x: Features, nodes on axis ``-2``.
            edge_index: Edges, source above target.
            edge_weight: Weights of the edges; all one where absent.
            batch: Graph of each node, where several graphs are joined into one.
            lambda_max: Largest eigenvalue of the Laplacian, of each graph where several are joined; twice the
                largest entry of the Laplacian where absent.

        Raises:
            ValueError: If the edges do not fit the nodes.
        """
        graph = (edge_index, edge_weight, batch, lambda_max)
        terms = self._terms_by_edge if self._by_edge(x, graph) else self._terms_by_matrix
        first, *higher = terms(x, *graph)
        out: Tensor = self.lins[0](first)
        for lin, term in zip(list(self.lins)[1:], higher, strict=True):
            out = out + lin(term.to(x.dtype))
        return out if self.bias is None else out + self.bias

    def _by_edge(self, x: Tensor, graph: tuple[Any, ...]) -> bool:
        """Whether there can be no cached matrix for this call."""
        learnable = torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in graph)
        huge = x.device.type != "cpu" and x.shape[-2] > DENSE_ON_ACCELERATOR
        exporting = bool(getattr(torch.compiler, "is_exporting", bool)())  # torch 2.6 cannot tell
        return learnable or huge or bool(self.explain) or exporting

    def _terms_by_edge(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None, *rest: Any) -> list[Tensor]:
        """Chebyshev terms as PyG computes them."""
        batch, lambda_max = rest
        edge_index, norm = self.__norm__(
            edge_index, x.shape[-2], edge_weight, self.normalization, lambda_max, dtype=x.dtype, batch=batch
        )
        terms = [x]
        while len(terms) < len(self.lins):
            # not self.propagate: in a subclass of ChebConv PyG swaps in a version that leaves an explainer's mask out
            heard = _MessagePassing.propagate(self, edge_index, x=terms[-1], norm=norm)
            terms.append(heard if len(terms) == 1 else 2.0 * heard - terms[-2])
        return terms

    @_outside_graphs
    def _terms_by_matrix(self, x: Tensor, *graph: Any) -> list[Tensor]:
        """Chebyshev terms through the cached matrix."""
        propagation = self._cache.get((*graph, self.normalization, x.shape[-2], x.dtype), self._build)
        return propagation.terms(x, len(self.lins))

    def _build(
        self,
        edge_index: Tensor,
        edge_weight: Tensor | None,
        batch: Tensor | None,
        lambda_max: Tensor | float | None,
        normalization: str | None,
        num_nodes: int,
        dtype: torch.dtype,
    ) -> Propagation:
        """Normalise the graph as PyG does and make the matrix, in single precision at least."""
        check_graph(edge_index, edge_weight, num_nodes)
        dtype = torch.promote_types(dtype, torch.float32)
        if edge_weight is not None:
            edge_weight = edge_weight.to(torch.promote_types(edge_weight.dtype, torch.float32))
        edges, norm = self.__norm__(
            edge_index, num_nodes, edge_weight, normalization, lambda_max, dtype=dtype, batch=batch
        )
        return Propagation.build(edges, norm.to(torch.promote_types(norm.dtype, dtype)), num_nodes)


class STConv(_UpstreamSTConv):
    r"""torch-geometric-temporal's ``STConv`` without its loop over batch and time.

    Arguments, parameters, state dict and numbers are those of the original, up to rounding. A training step is
    several times faster on a CPU (``benchmarks/stgcn_forward``), because the graph convolution is one call over
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
        hidden = self._temporal_conv1(_channel_major(X)).contiguous()
        hidden = self._graph_conv(hidden, edge_index, edge_weight)
        hidden = self._temporal_conv2(_channel_major(hidden).relu())
        normalised: Tensor = self._batch_norm(hidden.transpose(1, 2))  # [b n t c]
        return normalised.transpose(1, 2)


def _channel_major(x: Tensor) -> Tensor:
    """The same tensor ``[b t n c]`` with memory in the order ``b c n t``: one copy for three convolutions."""
    return x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
