r"""The maths of node-conditioned low-rank updates, as free functions of tensors.

Every update has the form :math:`\tfrac{\alpha}{r} B A_i x_i` with one shared :math:`B`. The functions
here take the rank directions :math:`u = A x` in any memory layout, told by two axis numbers, and apply the
part that belongs to the node. No PEFT, no modules, no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.tuner.products import nodewise, project


def aligned(factor: Tensor, ndim: int, node: int, channel: int) -> Tensor:
    """View a factor of shape (N, r) so that it broadcasts over a tensor of ``ndim`` axes."""
    shape = [1] * ndim
    shape[node], shape[channel] = factor.shape
    return (factor if node < channel else factor.mT).reshape(shape)


def gate_update(u: Tensor, gate: Tensor, bias: Tensor, node: int, channel: int) -> Tensor:
    r"""Weight and shift the rank directions of each node.

    .. math:: v_i = \mathrm{diag}(g_i)\,u_i + h_i

    Args:
        u: Rank directions, :math:`N` on axis ``node`` and :math:`r` on axis ``channel``.
        gate: Factors :math:`g`, shape :math:`(N, r)`.
        bias: Shifts :math:`h`, shape :math:`(N, r)`.
        node: Index of the node axis of ``u``.
        channel: Index of the rank axis of ``u``.

    Returns:
        Tensor of the shape of ``u``.

    Example:
        >>> u = torch.ones(1, 2, 1)
        >>> gate_update(u, torch.tensor([[2.0], [3.0]]), torch.zeros(2, 1), node=1, channel=2).flatten()
        tensor([2., 3.])
    """
    return torch.addcmul(aligned(bias, u.ndim, node, channel), u, aligned(gate, u.ndim, node, channel))


def core_update(u: Tensor, core: Tensor, node: int, channel: int) -> Tensor:
    r"""Mix the rank directions of each node.

    .. math:: v_i = G_i\,u_i

    Args:
        u: Rank directions, :math:`N` on axis ``node`` and :math:`r` on axis ``channel``.
        core: Matrices :math:`G`, shape :math:`(N, r, r)`.
        node: Index of the node axis of ``u``.
        channel: Index of the rank axis of ``u``.

    Returns:
        Tensor of the shape of ``u``.
    """
    return nodewise(u, core, node, channel)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    r"""``conv1d`` or ``conv2d`` without padding, in the order in which the input lies in memory.

    A tensor ``[b t n c]`` that is viewed as ``[b c n t]`` has its channels last with the spatial axes in the other
    order. torch would copy it; with both axes swapped, in the weight too, it need not.

    Args:
        x: Input, shape :math:`(B, F_{in}, *)`.
        weight: Kernels, shape :math:`(F_{out}, F_{in}, *K)`.
        bias: Additive bias, shape :math:`(F_{out})`, or None.
        stride: Step along each axis of the kernel.
        dilation: Spacing of the kernel along each of its axes.

    Returns:
        Tensor of shape :math:`(B, F_{out}, *)`.

    Example:
        >>> x = torch.arange(6.0).reshape(1, 6, 1, 1).permute(0, 3, 2, 1)  # [b t n c] as [b c n t]
        >>> convolve(x, torch.ones(1, 1, 1, 3), None, (1, 1), (1, 1)).flatten()
        tensor([ 3.,  6.,  9., 12.])
    """
    if weight.ndim == 3:
        return F.conv1d(x, weight, bias, tuple(stride), 0, tuple(dilation))
    if x.ndim == 4 and _swapped_channels_last(x):
        if weight.shape[2:] == (1, 1) and tuple(stride) == (1, 1):
            return project(x.permute(0, 3, 2, 1), weight[:, :, 0, 0], bias).permute(0, 3, 2, 1)
        x, weight = x.transpose(2, 3), weight.transpose(2, 3)
        return F.conv2d(x, weight, bias, tuple(stride)[::-1], 0, tuple(dilation)[::-1]).transpose(2, 3)
    return F.conv2d(x, weight, bias, tuple(stride), 0, tuple(dilation))


def _swapped_channels_last(x: Tensor) -> bool:
    """Whether a tensor ``[b c n t]`` lies in memory as ``[b t n c]``."""
    return x.permute(0, 3, 2, 1).is_contiguous() and not x.is_contiguous()


def full_conv(
    x: Tensor, weight: Tensor, node: int, channel: int, stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    r"""Convolve each node's series by the node's own kernels, as one grouped convolution.

    .. math:: u_{i,t} = \sum_k A_{i,k}\,x_{i,\,st + dk}

    Args:
        x: Input with axes for nodes, channels, any batch axes and, last, one or two that the kernel runs along.
        weight: Kernels :math:`A`, shape :math:`(N, r, F_{in}, *K)`; or a divisor of :math:`N`, as in
            :func:`stlora_peft.tuner.products.nodewise`.
        node: Index of the node axis of ``x``.
        channel: Index of the channel axis of ``x``.
        stride: Step :math:`s` along each axis of the kernel.
        dilation: Spacing :math:`d` of the kernel along each of its axes.

    Returns:
        Tensor with the axes of ``x``, :math:`r` on axis ``channel``.
    """
    num_nodes, rank, in_features, *kernel = weight.shape
    if num_nodes < x.shape[node]:
        return _tiled_conv(x, weight, node, channel, stride, dilation)
    moved = (-len(kernel) - 2, -len(kernel) - 1)
    rows = x.movedim((node, channel), moved)  # [... n c *]
    batch, steps = rows.shape[: moved[0]], rows.shape[-len(kernel) :]
    rows = rows.reshape(math.prod(batch), num_nodes * in_features, *steps)
    conv = F.conv1d if len(kernel) == 1 else F.conv2d
    out = conv(rows, weight.flatten(0, 1), None, tuple(stride), 0, tuple(dilation), groups=num_nodes)
    return out.reshape(*batch, num_nodes, rank, *out.shape[2:]).movedim(moved, (node, channel))


def _tiled_conv(
    x: Tensor, weight: Tensor, node: int, channel: int, stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """:func:`full_conv` with kernels of neighbouring nodes: all taps in one product, then their sum over time."""
    matrices, rank, in_features, *kernel = weight.shape
    taps = weight.flatten(3).movedim(3, 1).reshape(matrices, -1, in_features)  # [g (k r) c]
    u = nodewise(x, taps, node, channel).movedim((node, channel), (0, -1))
    u = u.unflatten(-1, (-1, rank))  # [n ... *steps k r]
    steps = u.shape[-2 - len(kernel) : -2]
    lengths = [
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(steps, kernel, stride, dilation, strict=True)
    ]
    out = None
    for tap, offsets in enumerate(product(*map(range, kernel))):
        seen = u[..., tap, :]
        for axis, (offset, length, s, d) in enumerate(zip(offsets, lengths, stride, dilation, strict=True)):
            seen = _every(seen, seen.ndim - 1 - len(kernel) + axis, offset * d, length, s)
        out = seen if out is None else out + seen
    return cast(Tensor, out).movedim((0, -1), (node, channel))


def _every(x: Tensor, axis: int, first: int, length: int, step: int) -> Tensor:
    """Entries ``first``, ``first + step``, ... of an axis, ``length`` of them."""
    return x.narrow(axis, first, (length - 1) * step + 1)[(slice(None),) * axis + (slice(None, None, step),)]


def delta_weight(up: Tensor, down: Tensor, scaling: float) -> Tensor:
    r"""Dense form of a shared update, :math:`\tfrac{\alpha}{r} B A`, in the shape of the base weight.

    Args:
        up: :math:`B`, shape :math:`(F_{out}, r)`.
        down: :math:`A`, shape :math:`(r, F_{in}, *)`.
        scaling: :math:`\alpha / r`.

    Returns:
        Tensor of shape :math:`(F_{out}, F_{in}, *)`.
    """
    return torch.einsum("or,r...->o...", up, down) * scaling


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    r"""Zero each entry with probability :math:`p` and scale the others, so that the mean stays.

    .. math:: y = \tfrac{m}{1 - p}\, x, \qquad m \sim \mathrm{Bernoulli}(1 - p)

    On a CPU :math:`p` is rounded to a multiple of :math:`2^{-16}` and the mask is drawn from 16 random bits for each
    entry, where torch draws a double: about five times faster, and otherwise the dearest step of a small layer.

    Args:
        x: Any tensor.
        p: Probability of a zero, in [0, 1).
        training: Whether anything is dropped.

    Returns:
        Tensor of the shape of ``x``, with the memory layout of ``x``.

    Example:
        >>> sorted(dropout(torch.ones(1000), 0.5, training=True).unique().tolist())
        [0.0, 2.0]

    References:
        Differs from ``torch.nn.functional.dropout``: other random numbers on a CPU.
    """
    if not training or p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return x * dropout_mask(x, p)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    r"""Draw the mask :math:`\tfrac{m}{1 - p}` of :func:`dropout`.

    Args:
        x: Tensor that it is for.
        p: Probability of a zero, in [0, 1).

    Returns:
        Tensor of the shape, type and memory layout of ``x``.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(torch.ones_like(x), p)
    threshold = min(round(p * 2**16), 2**16 - 1)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    last = (
        threshold - 2**15
    )  # lowest number that is kept; comparing would take a tensor of truth values, which is slow
    kept = bits.clamp_(last - 1, last) if threshold else bits.fill_(last)
    kept = kept.as_strided(x.shape, torch.empty_like(x, device="meta").stride()).to(x.dtype).sub_(last - 1)
    return kept.mul_(2**16 / (2**16 - threshold))


class Dropout(nn.Dropout):
    """torch's module of this name by way of :func:`dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries while training."""
        return dropout(x, self.p, self.training)
