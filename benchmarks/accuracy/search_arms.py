"""What was trained in the search for defaults: every setting is said here, so a later default changes no arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from history import Calibrated, WindowCalibrated, from_source, with_history
from search_small import Build, half, hashed, tied
from torch import nn

from stlora_peft.data import City, CityData
from stlora_peft.methods import METHODS, build_adapter, calibrated
from stlora_peft.storage import SavedBackbone
from stlora_peft.tuner.config import PredictorConfig

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
    depth: int = 2,
    predictor_rank: int | None = None,
    predictor_dropout: float | None = None,
    emb_size: int = 16,
    emb_noise: float = 0.0,
    history_channels: int | None = ALL,
    frozen: bool = True,
    layers: bool | str = True,
    node_bound: bool = True,
) -> dict[str, Any]:
    """Arguments of :class:`stlora_peft.STLoraConfig`, none left to its defaults.

    Args:
        conditioning: How a node takes part.
        rank: Rank of the layers.
        alpha: Numerator of the scale.
        dropout: Dropout in the layers.
        width: Width of the predictor; None leaves it out.
        depth: Layers of the predictor.
        predictor_rank: Its rank; None takes that of the layers.
        predictor_dropout: Dropout in the predictor; None takes that of the layers.
        emb_size: Width of the node vectors.
        emb_noise: Deviation of the noise on them.
        history_channels: Channels that the predictor reads at every step; None takes the readings alone.
        frozen: Whether the backbone is frozen.
        layers: Adapt the layers that the backbone names, or those of an expression; False is the predictor alone.
        node_bound: Train what is bound to the nodes.

    Example:
        >>> settings(width=None)["predictor"] is None
        True
    """
    dropouts = dropout if predictor_dropout is None else predictor_dropout
    predictor = (
        None
        if width is None
        else PredictorConfig(
            width=width,
            num_layers=depth,
            r=predictor_rank or rank,
            dropout=dropouts,
            history_channels=history_channels,
        )
    )
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
        "freeze_node_bound": not node_bound,
        "target_modules": layers if isinstance(layers, str) else None if layers else [],
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
NARROW = {"width": 16, "depth": 1, "predictor_rank": 2}
SMALL = {**NOISE, **NARROW, "rank": 1, "alpha": 8, "emb_size": 8}
TINY = {**NOISE, "width": None, "rank": 1, "alpha": 16, "emb_size": 4, "node_bound": False}
RANK4 = {"rank": 4, "alpha": 64, "emb_noise": 0.0}
HASHED = 2750
"""Numbers that the entries of ``tiny-hashed`` share."""

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
    "frugal": Arm(
        "**the present frugal adapter**: rank 1, alpha 8, vectors of 8, a predictor of one layer of 16",
        _adapter(**SMALL),
    ),
    "frugal-vectors4": Arm("the same, vectors of 4", _adapter(**SMALL | {"emb_size": 4})),
    "frugal-noise0.4": Arm("`frugal` with noise of 0.4", _adapter(**SMALL | {"emb_noise": 0.4})),
    "frugal-nopredictor": Arm("`frugal` without the predictor", _adapter(**SMALL | {"width": None})),
    "frugal-predictor": Arm(
        "its predictor alone, vectors of 4: the frugal adapter before",
        _adapter(**SMALL | {"rank": 2, "alpha": 4, "emb_size": 4}, layers=False),
    ),
    "tiny": Arm(
        "rank 1, alpha 16, vectors of 4, noise of 0.8, skip layers alone, no predictor, "
        "what is bound to nodes is not trained",
        _adapter(**TINY, layers=".*skip_conv"),
    ),
    "tiny-alpha32": Arm("`tiny` with alpha 32", _adapter(**TINY | {"alpha": 32}, layers=".*skip_conv")),
    "tiny-alpha32-noise0.4": Arm(
        "`tiny` with both: the present frugal adapter, in a few layers",
        _adapter(**TINY | {"alpha": 32, "emb_noise": 0.4}, layers=".*skip_conv"),
    ),
    "tiny-noise0.4": Arm("`tiny` with noise of 0.4", _adapter(**TINY | {"emb_noise": 0.4}, layers=".*skip_conv")),
    "tiny-noise0": Arm("`tiny` without noise", _adapter(**TINY | {"emb_noise": 0.0}, layers=".*skip_conv")),
    "tiny-node-bound": Arm(
        "`tiny`, what is bound to nodes too", _adapter(**TINY | {"node_bound": True}, layers=".*skip_conv")
    ),
    "tiny-predictor": Arm(
        "`tiny`, and a predictor of width 8", _adapter(**TINY | NARROW | {"width": 8}, layers=".*skip_conv")
    ),
    "tiny-gates": Arm("`tiny`, in the gated convolutions", _adapter(**TINY, layers=".*(filter|gate)_conv")),
    "tiny-graphs": Arm("`tiny`, in the graph convolutions", _adapter(**TINY, layers=".*mix")),
    "tiny-ends": Arm("`tiny`, in the first layer and the last two", _adapter(**TINY, layers="(start|end)_conv.*")),
    "tiny-all": Arm("`tiny`, in all layers", _adapter(**TINY)),
    "tiny-half": Arm(
        "`tiny-all`, the larger matrix of each update fixed at a singular vector", half(settings(**TINY))
    ),
    "tiny-half-rank2": Arm("the same of rank 2, alpha 16", half(settings(**TINY | {"rank": 2}))),
    "tiny-tied": Arm("`tiny-all`, repeated layers share their matrices", tied(settings(**TINY))),
    "tiny-rank4": Arm("`tiny-all` of rank 4, alpha 64, no noise", _adapter(**TINY | RANK4)),
    "tiny-hashed": Arm(
        f"`tiny-rank4`, its entries moved by {HASHED:,} numbers that are shared by lot",
        hashed(settings(**TINY | RANK4), HASHED),
    ),
    "tiny-hashed-noise0.4": Arm(
        "the same with noise of 0.4", hashed(settings(**TINY | RANK4 | {"emb_noise": 0.4}), HASHED)
    ),
    "tiny-hashed-1375": Arm("`tiny-hashed` with half as many numbers", hashed(settings(**TINY | RANK4), HASHED // 2)),
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
