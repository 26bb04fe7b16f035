r"""Chebyshev terms of a static graph as products with one cached matrix.

PyG propagates by gathering a feature row for every edge and scattering the rows back. Where the graph stays the same
over batch and time, the same sum is a product with one :math:`N \times N` matrix, several times faster on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Method = TypeVar("_Method", bound=Callable[..., Any])
_Found = TypeVar("_Found")
outside_graphs = cast(Callable[[_Method], _Method], torch.compiler.disable)
"""Leave a function to Python where ``torch.compile`` traces what calls it."""

ROWS_PER_PRODUCT = 1024
"""Rows of one sparse product: enough to hide the cost of the call, few enough for the cache of a core."""

DENSE_ON_ACCELERATOR = 2048
"""Largest number of nodes for which a device other than a CPU keeps a matrix at all."""


@dataclass(frozen=True, eq=False)
class Propagation:
    """A propagation matrix and its transpose, both dense or both in CSR form.

    Args:
        matrix: Entry ``[i, j]`` weighs what node ``i`` hears from node ``j``.
        transpose: Its transpose, which propagates gradients.
    """

    matrix: Tensor
    transpose: Tensor

    @classmethod
    def build(cls, edge_index: Tensor, norm: Tensor, num_nodes: int) -> Propagation:
        """Sum the normalised weights of parallel edges into one matrix.

        Args:
            edge_index: Edges, source above target.
            norm: Normalised weight of each edge.
            num_nodes: Number of nodes.

        Example:
            >>> chain = torch.tensor([[0, 1, 1], [1, 2, 2]])
            >>> Propagation.build(chain, torch.tensor([0.5, 2.0, 1.0]), 3).matrix
            tensor([[0.0000, 0.0000, 0.0000],
                    [0.5000, 0.0000, 0.0000],
                    [0.0000, 3.0000, 0.0000]])
        """
        source, target = edge_index
        if dense_is_faster(num_nodes, source.numel(), norm.device):
            matrix = norm.new_zeros(num_nodes, num_nodes)
            matrix.index_put_((target, source), norm, accumulate=True)
            return cls(matrix, matrix.t().contiguous())
        return cls(_csr(target, source, norm, num_nodes), _csr(source, target, norm, num_nodes))

    def terms(self, x: Tensor, order: int) -> list[Tensor]:
        r"""Chebyshev terms :math:`T_0(P) x, \dots, T_{K-1}(P) x`.

        Args:
            x: Features of the nodes.
            order: Number of terms :math:`K`, at least 1.

        Shapes:
            - **x:** :math:`(*, N, C)`
            - **output:** :math:`K` tensors of this shape
        """
        if order == 1:
            return [x]
        slabs = x.reshape(-1, *x.shape[-2:]).to(self.matrix.dtype)
        higher = _apply(_Chebyshev, slabs, order - 1, self.matrix, self.transpose)
        return [x, *(term.view(x.shape) for term in higher)]


@dataclass
class PropagationCache:
    """Keeps the last propagation matrix, together with copies of everything it was computed from.

    A look-up compares the values of the tensors, not their identity, so a graph that was changed in place is noticed.
    Copies and pickles of the cache are empty.

    Example:
        >>> import copy
        >>> cache, calls = PropagationCache(), []
        >>> def build(weight):
        ...     calls.append(weight)
        ...     return Propagation(torch.eye(2), torch.eye(2))
        >>> weight = torch.ones(3)
        >>> for factor in (1.0, 1.0, 2.0):
        ...     _ = cache.get((weight.mul_(factor),), build)
        >>> len(calls), len(copy.deepcopy(cache))
        (2, 0)
    """

    _entry: tuple[tuple[Any, ...], Any] | None = field(default=None, repr=False)

    def get(self, inputs: tuple[Any, ...], build: Callable[..., _Found]) -> _Found:
        """Matrix for ``inputs``, computed by ``build(*inputs)`` unless these were the inputs of the last call.

        Args:
            inputs: Tensors and plain values that the matrix depends on, always as many for one cache.
            build: Computes the matrix, or whatever else is kept for these inputs.
        """
        entry = self._entry  # read once: replicas on several threads share the cache
        if entry is not None and all(map(_same, entry[0], inputs)):
            return cast(_Found, entry[1])
        kept = tuple(value.detach().clone() if isinstance(value, Tensor) else value for value in inputs)
        found = build(*kept)
        self._entry = kept, found
        return found

    def __len__(self) -> int:
        """Number of matrices kept: none or one."""
        return int(self._entry is not None)

    def __reduce__(self) -> tuple[type[PropagationCache], tuple[()]]:
        """Copy and pickle as an empty cache."""
        return PropagationCache, ()


def dense_is_faster(num_nodes: int, num_edges: int, device: torch.device) -> bool:
    """Whether a dense matrix beats CSR: on a CPU, where three in ten pairs of nodes are joined, whatever their number.

    Args:
        num_nodes: Number of nodes.
        num_edges: Number of edges, self-loops among them.
        device: Where the matrix lives. Devices other than a CPU get dense matrices only.
    """
    return device.type != "cpu" or num_edges >= 0.3 * num_nodes**2


def _same(kept: Any, given: Any) -> bool:
    """Whether an input of the cached matrix equals that of this call."""
    if isinstance(kept, Tensor) and isinstance(given, Tensor):
        alike = (kept.dtype, kept.device, kept.shape) == (given.dtype, given.device, given.shape)
        return alike and torch.equal(kept, given)
    return type(kept) is type(given) and bool(kept == given)


def _csr(row: Tensor, column: Tensor, norm: Tensor, num_nodes: int) -> Tensor:
    """Block-diagonal CSR matrix of several copies of the graph, rows in the order of the edges.

    Parallel edges stay apart and a row keeps the order of its edges, so that sums are rounded as PyG rounds them.
    """
    copies = max(1, ROWS_PER_PRODUCT // num_nodes)
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row, minlength=num_nodes).repeat(copies)
    shift = torch.arange(copies, device=row.device)[:, None] * num_nodes
    rows = copies * num_nodes
    with warnings.catch_warnings():  # torch announces once per process that CSR is in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
            (column[order] + shift).flatten().int(),
            norm[order].repeat(copies),
            (rows, rows),
            check_invariants=False,
        )


def _times(matrix: Tensor, x: Tensor, alpha: float = 1.0) -> Tensor:
    """``alpha * matrix @ x`` for each slab of ``x`` ``[s n c]``."""
    if matrix.layout == torch.strided:
        return torch.baddbmm(x, matrix.expand(x.shape[0], -1, -1), x, beta=0.0, alpha=alpha)
    rows, size = x.flatten(0, 1), matrix.shape[0]
    # torch's own kernel, used where there is no MKL, scales what is there, which beta=0 does not make finite
    out = torch.empty_like(rows) if torch.backends.mkl.is_available() else torch.zeros_like(rows)
    for start in range(0, rows.shape[0], size):
        chunk, product = rows[start : start + size], out[start : start + size]
        if chunk.shape[0] < size:
            matrix = _top_left(matrix, chunk.shape[0])
        torch.addmm(product, matrix, chunk, beta=0.0, alpha=alpha, out=product)
    return out.view(x.shape)


def _top_left(matrix: Tensor, size: int) -> Tensor:
    """The first blocks of a block-diagonal CSR matrix."""
    starts = matrix.crow_indices()[: size + 1]
    count = int(starts[-1])
    return torch.sparse_csr_tensor(
        starts, matrix.col_indices()[:count], matrix.values()[:count], (size, size), check_invariants=False
    )


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call an autograd function; torch leaves their ``apply`` untyped."""
    call: Callable[..., Any] = function.apply
    return call(*args)


class _Chebyshev(torch.autograd.Function):
    """Chebyshev terms 1 to ``count`` of ``x``."""

    @staticmethod
    def forward(x: Tensor, count: int, matrix: Tensor, transpose: Tensor) -> tuple[Tensor, ...]:
        """Run the recursion ``T_k = 2 P T_(k-1) - T_(k-2)``."""
        with torch.autocast(x.device.type, enabled=False):
            terms = [x, _times(matrix, x)]
            while len(terms) <= count:
                terms.append(_times(matrix, terms[-1], alpha=2.0).sub_(terms[-2]))
        return tuple(terms[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the matrices; nothing else is needed backward."""
        _, _, ctx.matrix, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Sum the gradients of the terms, each propagated backwards."""
        return _apply(_Clenshaw, ctx.transpose, ctx.matrix, *grads), None, None, None


class _Clenshaw(torch.autograd.Function):
    """Sum of Chebyshev terms, ``sum_k T_k(matrix) grads[k - 1]``: the adjoint of :class:`_Chebyshev`."""

    @staticmethod
    def forward(matrix: Tensor, transpose: Tensor, *grads: Tensor) -> Tensor:
        """Run Clenshaw's recursion ``b_k = g_k + 2 P b_(k+1) - b_(k+2)``, one product per order."""
        with torch.autocast(grads[0].device.type, enabled=False):
            slabs = [grad.contiguous() for grad in grads]
            above, current = None, slabs.pop()
            while slabs:
                below = _times(matrix, current, alpha=2.0).add_(slabs.pop())
                above, current = current, below if above is None else below.sub_(above)
            total = _times(matrix, current)
            return total if above is None else total.sub_(above)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the matrices."""
        ctx.matrix, ctx.transpose, *grads = inputs
        ctx.count = len(grads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of a gradient are Chebyshev terms again."""
        return None, None, *_apply(_Chebyshev, grad.contiguous(), ctx.count, ctx.transpose, ctx.matrix)
