"""Batch normalisation by the windows of all processes, as one process with the whole batch would have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stlora_peft.frozen.tracing import calling_instead
from stlora_peft.launch import process_count


@contextmanager
def sharing_norms(model: nn.Module, counts: bool = True) -> Iterator[None]:
    r"""Have every batch normalisation in training mode take its statistics over the batches of all processes.

    Over all :math:`n = \sum_p n_p` values of a channel,

    .. math::
        \mu = \tfrac1n \sum_p \sum_{k \le n_p} x_{pk}, \qquad
        \sigma^2 = \tfrac1n \sum_p \sum_{k \le n_p} (x_{pk} - \mu)^2,

    and the running statistics follow them as in torch, so they are the same in every process. Unlike
    ``torch.nn.SyncBatchNorm`` it runs on a CPU, and leaves the modules, their names and their state dict as they are.
    In one process nothing changes.

    Args:
        model: The model that is called inside.
        counts: Whether this process's batch takes part; one that only keeps step does not.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)] if process_count() > 1 else []
    with calling_instead({norm: partial(_normalised, norm, counts) for norm in norms}):
        yield


class _Total(torch.autograd.Function):
    """Sum over the processes; each of them feels what it does to the losses of all."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return _added(own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _added(gradients[0])


def _added(own: Tensor) -> Tensor:
    whole = own.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole)
    return whole


def _normalised(norm: _BatchNorm, counts: bool, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What the norm makes of this process's part of the batch."""
    if not norm.training and norm.running_mean is not None:
        return forward(x)
    norm._check_input_dim(x)
    shape = [1, -1] + [1] * (x.ndim - 2)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    part = float(counts)
    own = wide.new_tensor([part * x.numel() / x.shape[1]])
    sums = _total(torch.cat([part * wide.sum(axes), own]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    variance = _total(part * centred.square().sum(axes)) / count
    _follow(norm, mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1)))
    scaled = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        scaled = scaled * norm.weight.view(shape) + norm.bias.view(shape)
    return scaled.to(x.dtype)


def _total(own: Tensor) -> Tensor:
    whole: Tensor = _Total.apply(own)  # type: ignore[no-untyped-call]
    return whole


def _follow(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Let the running statistics follow those of a batch."""
    tracked = norm.num_batches_tracked
    if not norm.training or norm.running_mean is None or norm.running_var is None or tracked is None:
        return
    tracked.add_(1)
    share = 1 / float(tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)
