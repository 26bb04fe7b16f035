"""Statistics of node-bound normalisation, taken from a city's own data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stlora_peft.tuner.node_bound import node_bound_modules


class _Observer:
    """Mean and variance of everything that a normalisation module is given, node by node."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.before = [buffer.clone() for buffer in norm.buffers()]
        self.batches = self.count = 0
        self.mean = self.square = torch.zeros(())
        self.hook = norm.register_forward_pre_hook(self.observe)

    def observe(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Merge a batch with those before (Chan, Golub and LeVeque, 1979)."""
        rows = args[0].detach().transpose(0, 1).flatten(1)  # [n *]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        new, total = rows.shape[1], self.count + rows.shape[1]
        shift = rows.mean(1) - self.mean.to(rows)
        self.mean = self.mean.to(rows) + shift * (new / total)
        self.square = self.square.to(rows) + rows.var(1, correction=0) * new + shift**2 * (self.count * new / total)
        self.batches, self.count = self.batches + 1, total

    def finish(self, whole: bool) -> None:
        """Write the statistics; put the old ones back where nothing, or not everything, was seen."""
        self.hook.remove()
        for buffer, before in zip(self.norm.buffers(), self.before, strict=True):
            buffer.copy_(before)
        if whole and self.count > 1 and self.norm.running_mean is not None and self.norm.running_var is not None:
            self.norm.running_mean.copy_(self.mean)
            self.norm.running_var.copy_(self.square / (self.count - 1))
            cast(Tensor, self.norm.num_batches_tracked).fill_(self.batches)


@contextmanager
def _estimating(model: nn.Module, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Eval mode, but for ``norms``, which normalise by the batch and take the statistics of all of them at the end."""
    modes = {module: module.training for module in model.modules()}
    observers = [_Observer(norm) for norm in norms]
    whole = False
    model.eval()
    try:
        for observer in observers:
            observer.norm.train()
        yield
        whole = True
    finally:
        for observer in observers:
            observer.finish(whole)
        for module, mode in modes.items():
            module.training = mode


def reestimate(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], node_bound: Iterable[str] | None = None
) -> int:
    """Re-estimate node-bound normalisation statistics on a city's own data; nothing else changes.

    The new statistics are mean and variance over all batches together. While they are taken, each batch is
    normalised by its own. Without any batch, or after an error, the old ones stay.

    Args:
        model: Backbone, or PEFT model whose active adapter belongs to the city.
        batches: Keyword arguments of the model's forward, one mapping for each batch.
        node_bound: Names in a plain backbone; None takes the backbone's own list.

    Returns:
        Number of normalisation modules that were re-estimated.
    """
    norms = [
        m
        for m in node_bound_modules(model, node_bound).values()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]
    if norms:
        with torch.no_grad(), _estimating(model, norms):
            for batch in batches:
                model(**batch)
    return len(norms)
