"""Products with one matrix for all nodes and with one for each, with backward passes of their own.

The numbers are those of ``torch.nn.functional.linear`` and ``torch.bmm``, the gradients theirs up to rounding.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

MANY_ROWS = 64  # from here on a copy of all rows costs more than calling the product node by node


def own_gradient(*tensors: Tensor) -> bool:
    """Whether a function may replace torch's gradients: single or double precision, no compiler, no ``torch.func``.

    A compiler is ``torch.compile``, ``torch.export`` or ``torch.jit.trace``, which cannot save another function.

    Args:
        tensors: What the function reads.
    """
    known = len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in (torch.float32, torch.float64)
    autocast = torch.is_autocast_enabled(tensors[0].device.type)
    compiled = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    transformed = torch._C._are_functorch_transforms_active()
    return known and torch.is_grad_enabled() and not (autocast or compiled or transformed)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Multiply the last axis by one matrix for all nodes.

    .. math:: u = A\,x

    torch picks the kernel for an input of several axes by its strides and by whether the weight needs a gradient, and
    the kernels round differently; as rows of one matrix a loaded adapter gives the very numbers of the trained one.
    The gradient of a matrix of few columns it asks a CPU's library for in an order that takes up to ten times as long
    as the other, which is the one taken here.

    Args:
        x: Input, :math:`F_{in}` on the last axis.
        weight: Matrix :math:`A`, shape :math:`(r, F_{in})`.
        bias: Additive bias, shape :math:`(r)`, or None.

    Returns:
        Tensor of the shape of ``x`` with :math:`r` on the last axis.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu" and own_gradient(rows, weight):
        out = cast(Tensor, cast(Any, _Projection).apply(rows, weight, bias))
    else:
        out = F.linear(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Projection(torch.autograd.Function):
    """``F.linear`` of rows, the narrow side first in the product that is the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the products."""
        ctx.save_for_backward(rows, weight)
        return F.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of the rows, the matrix and the bias."""
        rows, weight = ctx.saved_tensors
        (gradient,) = gradients
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = F.linear(gradient, weight.mT.contiguous())
        if ctx.needs_input_grad[1]:
            narrow = weight.shape[0] <= weight.shape[1]
            of_weight = gradient.mT @ rows if narrow else (rows.mT @ gradient).mT
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_rows, of_weight, of_bias


def nodewise(x: Tensor, weight: Tensor, node: int, channel: int) -> Tensor:
    r"""Multiply each node's entries by the node's own matrix, axes kept in place.

    .. math:: y_i = A_i\,x_i

    On a CPU the gradient of the input lies in memory as the input does, so that it is added to other gradients of it,
    and read by the layers before, without strides.

    Args:
        x: Input, :math:`N` on axis ``node`` and :math:`F_{in}` on axis ``channel``.
        weight: Matrices :math:`A`, shape :math:`(N, F_{out}, F_{in})`; or a divisor of :math:`N` of them, which serve
            as many neighbouring nodes each.
        node: Index of the node axis of ``x``.
        channel: Index of the channel axis of ``x``.

    Returns:
        Tensor of the shape of ``x`` with :math:`F_{out}` on axis ``channel``.
    """
    rows = x.movedim((node, channel), (0, -1))  # [n * c]
    *free, width = rows.shape
    matrices = weight.shape[0]
    rows = rows.reshape(matrices, math.prod(free) // matrices, width)
    if x.device.type == "cpu" and own_gradient(rows, weight):
        out = cast(Tensor, cast(Any, _NodeProducts).apply(rows, weight))
    else:
        out = torch.bmm(rows, weight.mT)
    return out.reshape(*free, out.shape[-1]).movedim((0, -1), (node, channel))


class _NodeProducts(torch.autograd.Function):
    """``torch.bmm(rows, weight.mT)`` whose gradient has the strides of ``rows``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        """Compute the products."""
        ctx.save_for_backward(rows, weight)
        return torch.bmm(rows, weight.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of the rows and of the matrices."""
        rows, weight = ctx.saved_tensors
        (gradient,) = gradients
        of_rows = _as_laid_out(rows, gradient, weight) if ctx.needs_input_grad[0] else None
        of_weight = torch.bmm(gradient.mT, rows) if ctx.needs_input_grad[1] else None
        return of_rows, of_weight


def _as_laid_out(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm(left, right)`` with the strides of ``rows``."""
    if torch.is_grad_enabled() or rows.is_contiguous():  # a second derivative cannot look into what is written to
        return torch.bmm(left, right)
    out = torch.empty_like(rows)
    return torch.bmm(left, right, out=out) if rows.shape[1] >= MANY_ROWS else out.copy_(torch.bmm(left, right))
