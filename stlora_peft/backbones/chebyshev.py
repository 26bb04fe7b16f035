"""PyG's ChebConv with a cached propagation matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import check_graph
from stlora_peft.backbones.propagation import DENSE_ON_ACCELERATOR, Propagation, PropagationCache, outside_graphs

if TYPE_CHECKING:  # PyG ships no types: this is the part of it that is used here

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
else:
    try:
        from torch_geometric.nn import ChebConv as _ChebConv
        from torch_geometric.nn import MessagePassing as _MessagePassing
    except ImportError as error:
        raise tgt.import_error(error) from error


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

    @outside_graphs
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
