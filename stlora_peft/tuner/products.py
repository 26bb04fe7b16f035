"""One matrix product for each node, with a backward pass of its own."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

MANY_ROWS = 64  # from here on a copy of all rows costs more than calling the product node by node


def own_gradient(*tensors: Tensor) -> bool:
    """Whether a function may replace torch's gradients: single or double precision, no compiler, no ``torch.func``.

    Args:
        tensors: What the function reads.
    """
    known = len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in (torch.float32, torch.float64)
    autocast = torch.is_autocast_enabled(tensors[0].device.type)
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return known and torch.is_grad_enabled() and not autocast and not transformed


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
        out = cast(Tensor, cast(Any, _Products).apply(rows, weight))
    else:
        out = torch.bmm(rows, weight.mT)
    return out.reshape(*free, out.shape[-1]).movedim((0, -1), (node, channel))


class _Products(torch.autograd.Function):
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
