"""The training loop of the search, the same for every arm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stlora_peft.data import CityData
from stlora_peft.evaluation import evaluate
from stlora_peft.metrics import masked_mae
from stlora_peft.significance import DailyErrors

BATCH, LONGEST_GRADIENT, DECAY = 32, 5.0, 0.98


def fit(
    model: nn.Module,
    data: CityData,
    steps: Sequence[int],
    rate: float,
    seed: int,
    *,
    node_rate: float = 1.0,
    weight_decay: float = 0.0,
) -> dict[int, DailyErrors]:
    """Train a model in place and measure the average of its steps on the way, which changes nothing in what follows.

    Args:
        model: The model; what requires gradients is trained.
        data: The city; ``train`` trains, ``test`` is what is measured.
        steps: Numbers of steps after which it is measured.
        rate: Learning rate of AdamW.
        seed: Seed of the order of the windows.
        node_rate: Learning rate of the node vectors relative to it.
        weight_decay: Decoupled weight decay of the matrices.

    Returns:
        Errors of every day, by number of steps.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(_groups(model, rate, node_rate, weight_decay), lr=rate)
    live = parameters + [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    average = [tensor.detach().clone() for tensor in live]
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    frozen = [norm for norm in norms if norm.weight is not None and not norm.weight.requires_grad]
    batches = _batches(len(data.train), seed)
    found: dict[int, DailyErrors] = {}
    for step in range(1, max(steps) + 1):
        model.train()
        for norm in frozen:
            norm.eval()
        batch = data.train.__getitems__(next(batches))
        forecast = data.scaler.inverse(model(batch["x"], data.edge_index, data.edge_weight))
        loss = masked_mae(forecast, batch["y"])
        if torch.isfinite(loss):
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, LONGEST_GRADIENT)
            optimizer.step()
        _take_in(average, live, min(DECAY, (1 + step) / (10 + step)))
        if step in steps:
            with _swapped(live, average):
                found[step] = DailyErrors(data.test, data.city.steps_per_day)
                evaluate(model, data.test, data, daily=found[step])
    return found


def _batches(count: int, seed: int) -> Iterator[list[int]]:
    """Whole batches of every pass over the windows, in random order; what remains of a pass is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, max(count - BATCH + 1, 1), BATCH):
            yield order[start : start + BATCH]


def _groups(model: nn.Module, rate: float, node_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: node vectors have their own rate, matrices decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(("nall_emb" in name, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": params, "lr": rate * (node_rate if node else 1), "weight_decay": weight_decay if matrix else 0.0}
        for (node, matrix), params in groups.items()
    ]


@torch.no_grad()
def _take_in(average: list[Tensor], live: list[Tensor], decay: float) -> None:
    """Move the average towards what is trained."""
    for mean, tensor in zip(average, live, strict=True):
        mean.mul_(decay).add_(tensor, alpha=1 - decay)


@contextmanager
def _swapped(live: list[Tensor], average: list[Tensor]) -> Iterator[None]:
    """Put the average in the place of what is trained for a while."""
    kept = [tensor.detach().clone() for tensor in live]
    _copy(average, live)
    try:
        yield
    finally:
        _copy(kept, live)


@torch.no_grad()
def _copy(values: list[Tensor], live: list[Tensor]) -> None:
    for tensor, value in zip(live, values, strict=True):
        tensor.copy_(value)
