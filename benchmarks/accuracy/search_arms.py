"""What was trained in the search for defaults: every setting is said here, so a later default changes no arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from history import Calibrated, WindowCalibrated, from_source, with_history
from torch import Tensor, nn

from stlora_peft.data import City, CityData
from stlora_peft.evaluation import evaluate
from stlora_peft.methods import METHODS, build_adapter, calibrated
from stlora_peft.metrics import masked_mae
from stlora_peft.significance import DailyErrors
from stlora_peft.storage import SavedBackbone
from stlora_peft.tuner.config import PredictorConfig

BATCH, LONGEST_GRADIENT, DECAY = 32, 5.0, 0.98

Build = Callable[[SavedBackbone, CityData, City], nn.Module]
"""Makes a model of a backbone, the target's data and the source."""

PRESENT, CLOCK, BEFORE = "noise", "clock-last", "embedding"
"""The arm with the settings of today's ``STLoraConfig`` on a backbone of less than 250,000 parameters, the one of the
default before, and the one that most others change."""

ALL = 100
"""More channels than a city has."""


@dataclass(frozen=True)
class Arm:
    """One way to adapt a backbone.

    Args:
        words: What it is, for the page.
        build: Makes its model.
        trained: Whether steps are made.
        node_rate: Learning rate of the node vectors relative to that of the rest.
        weight_decay: Decoupled weight decay of the matrices.
    """

    words: str
    build: Build
    trained: bool = True
    node_rate: float = 1.0
    weight_decay: float = 0.0


def settings(
    conditioning: str = "embedding",
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.1,
    width: int | None = 64,
    predictor_dropout: float | None = None,
    emb_size: int = 16,
    emb_noise: float = 0.0,
    history_channels: int | None = ALL,
    frozen: bool = True,
    layers: bool = True,
) -> dict[str, Any]:
    """Arguments of :class:`stlora_peft.STLoraConfig`, none left to its defaults.

    Args:
        conditioning: How a node takes part.
        rank: Rank, of the layers and of the predictor.
        alpha: Numerator of the scale.
        dropout: Dropout in the layers.
        width: Width of the predictor; None leaves it out.
        predictor_dropout: Dropout in the predictor; None takes that of the layers.
        emb_size: Width of the node vectors.
        emb_noise: Deviation of the noise on them.
        history_channels: Channels that the predictor reads at every step; None takes the readings alone.
        frozen: Whether the backbone is frozen.
        layers: Adapt the layers that the backbone names; otherwise there is only the predictor.

    Example:
        >>> settings(width=None)["predictor"] is None
        True
    """
    dropouts = dropout if predictor_dropout is None else predictor_dropout
    sizes = {"width": width, "num_layers": 2, "r": rank, "dropout": dropouts, "history_channels": history_channels}
    predictor = None if width is None else PredictorConfig(**sizes)
    return {
        "conditioning": conditioning,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": False,
        "emb_size": emb_size,
        "emb_noise": emb_noise,
        "predictor": predictor,
        "freeze_backbone": frozen,
        "target_modules": None if layers else [],
    }


def _method(name: str) -> Build:
    """Take a method that has no settings."""
    return lambda saved, data, source: METHODS[name].build(saved.backbone, data).model


def _adapter(*conditioning: str, **changes: Any) -> Build:
    """Put an adapter on the backbone."""
    return lambda saved, data, source: build_adapter(saved.backbone, data, **settings(*conditioning, **changes))


def _reestimated(saved: SavedBackbone, data: CityData, source: City) -> nn.Module:
    """Take the backbone with the target's own statistics, frozen."""
    return METHODS["full"].build(saved.backbone, data).model.requires_grad_(False)


def _lora(saved: SavedBackbone, data: CityData, source: City) -> nn.Module:
    """Take the comparison's LoRA, which draws random numbers for PEFT's layers before its own where PEFT refuses.

    Raises:
        ValueError: If it is no longer that of the rows.
    """
    model = METHODS["lora"].build(saved.backbone, data).model
    config = model.peft_config["default"]
    if (config.r, config.lora_alpha, config.lora_dropout) != (8, 16, 0.0):
        raise ValueError(f"the arm 'lora' has rank 8, alpha 16 and no dropout; the method 'lora' now has {config}")
    return model


def _window(ridge: float | None) -> Build:
    return lambda *city: WindowCalibrated(_reestimated(*city), city[1], ridge)


def _closed_form(saved: SavedBackbone, data: CityData, source: City) -> nn.Module:
    """Take an adapter whose predictor the package fits in closed form."""
    return calibrated(build_adapter(saved.backbone, data, **settings()), data)


def _calibrated(build: Build, ridge: float | None = 0.01) -> Build:
    return lambda *city: Calibrated(build(*city), city[1], ridge)


ZERO, WIDE = {"dropout": 0.0}, {"rank": 32, "alpha": 32, "dropout": 0.0}
LAST, NOISE = {"history_channels": None}, {"history_channels": None, "dropout": 0.0, "emb_noise": 0.8}

ARMS: dict[str, Arm] = {
    "full": Arm("every parameter of the backbone", _method("full")),
    "lora": Arm("plain LoRA, rank 8, no dropout", _lora),
    "full+node-embedding": Arm(
        "every parameter, and a vector of each node behind every layer, width 32, no dropout",
        _adapter("bias", width=None, frozen=False, **WIDE),
    ),
    BEFORE: Arm(
        "embedding, rank 8, dropout 0.1, predictor of width 64 that reads the clock at every step", _adapter()
    ),
    CLOCK: Arm("the clock at the last step alone", _adapter(**LAST)),
    PRESENT: Arm("**the present default**: the same, noise of 0.8 on the node vectors, no dropout", _adapter(**NOISE)),
    "noise-dropout0.1": Arm("the default with dropout 0.1", _adapter(**NOISE | {"dropout": 0.1})),
    "noise0.4": Arm("the default with noise of 0.4", _adapter(**NOISE | {"emb_noise": 0.4})),
    "noise1.2": Arm("the default with noise of 1.2", _adapter(**NOISE | {"emb_noise": 1.2})),
    "noise0": Arm("the default without noise", _adapter(**NOISE | {"emb_noise": 0.0})),
    "noise-predictor": Arm("the default's predictor alone", _adapter(**NOISE, layers=False)),
    "gate": Arm("gates in place of vectors", _adapter("gate")),
    "gate-dropout0": Arm("gates, no dropout: the default before", _adapter("gate", **ZERO)),
    "gate-dropout0-width16": Arm("the same, predictor of width 16", _adapter("gate", width=16, **ZERO)),
    "gate-dropout0-nopredictor": Arm("the same without the predictor", _adapter("gate", width=None, **ZERO)),
    "bias": Arm("a free bias of each node, width 32, no dropout", _adapter("bias", **WIDE)),
    "bias-nopredictor": Arm("the same without the predictor", _adapter("bias", width=None, **WIDE)),
    "dropout0": Arm("no dropout", _adapter(**ZERO)),
    "dropout0.2": Arm("dropout 0.2", _adapter(dropout=0.2)),
    "dropout0.3": Arm("dropout 0.3", _adapter(dropout=0.3)),
    "predictor-dropout0.3": Arm("dropout 0.3 in the predictor alone", _adapter(predictor_dropout=0.3)),
    "rank2": Arm("rank 2, alpha 4", _adapter(rank=2, alpha=4)),
    "rank16": Arm("rank 16, alpha 32", _adapter(rank=16, alpha=32)),
    "alpha32-dropout0": Arm("alpha 32, no dropout", _adapter(alpha=32, **ZERO)),
    "vectors8": Arm("node vectors of width 8", _adapter(emb_size=8)),
    "width16": Arm("predictor of width 16", _adapter(width=16)),
    "width128": Arm("predictor of width 128", _adapter(width=128)),
    "nopredictor": Arm("without the predictor", _adapter(width=None)),
    "predictor": Arm("the predictor alone", _adapter(layers=False)),
    "predictor-dropout0": Arm("the predictor alone, no dropout", _adapter(layers=False, **ZERO)),
    "node-rate3": Arm("node vectors learn three times as fast", _adapter(), node_rate=3.0),
    "node-rate0.3": Arm("node vectors learn at 0.3 of the rate", _adapter(), node_rate=0.3),
    "weight-decay0.1": Arm("weight decay 0.1", _adapter(), weight_decay=0.1),
    "full+embedding-dropout0": Arm("the backbone trained too, no dropout", _adapter(frozen=False, **ZERO)),
    "history-dropout0": Arm(
        "node vectors start from each node's history, no dropout", with_history(settings(emb_size=25, **ZERO))
    ),
    "source-dropout0": Arm(
        "the same, and the maps are pretrained on the source", from_source(settings(emb_size=25, **ZERO))
    ),
    "calibrated": Arm("starts from a calibrated forecast", _calibrated(_adapter())),
    "zero-shot": Arm("the backbone as it is, with the target's scaler", _method("zero-shot"), trained=False),
    "reestimated": Arm("the same, normalised by the target's own statistics", _reestimated, trained=False),
    "zero-shot+": Arm("`embedding`, its predictor fitted in closed form", _closed_form, trained=False),
    "calibration-city": Arm("the same, calibrated for the city", _calibrated(_reestimated, None), trained=False),
    "calibration-node": Arm("the same, for each node", _calibrated(_reestimated), trained=False),
    "window-city": Arm("a linear map of the window and the forecast, for the city", _window(None), trained=False),
    "window-node": Arm("the same, for each node", _window(0.03), trained=False),
}
"""Arms by name. What is not said is that of ``embedding``."""


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
