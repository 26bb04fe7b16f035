"""What a method makes of a backbone: a model that is ready to be trained on a city."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from stlora_peft.baselines import Baseline
from stlora_peft.data import CityData, Windows
from stlora_peft.errors import message
from stlora_peft.evaluation import window_batches
from stlora_peft.sampling import SubGraph, reestimate_parts
from stlora_peft.tuner.calibration import calibrate
from stlora_peft.tuner.config import STLoraConfig
from stlora_peft.tuner.node_bound import rebuild
from stlora_peft.tuner.reestimation import reestimate
from stlora_peft.tuner.spec import BackboneSpec

FRUGAL: dict[str, Any] = {
    "r": 1,
    "lora_alpha": 8,
    "emb_size": 8,
    "predictor": {"width": 16, "num_layers": 1, "r": 2},
}
"""Settings of a small adapter: updates of rank 1, a narrow predictor, and 8 numbers for each node."""
FEW_LAYERS: dict[str, Any] = {
    "r": 1,
    "lora_alpha": 32,
    "emb_size": 4,
    "emb_noise": 0.4,
    "predictor": None,
    "freeze_node_bound": True,
}
"""The same where all layers would be more than a hundredth of a large backbone: rank 1 in the layers that it names for
this, 4 numbers for each node, and half the noise, as so few numbers learn little by heart."""
LATER: dict[str, Any] = {"freeze_node_bound": False}
"""Settings that came after rows had been measured, with what they are in those rows."""
FORMS: dict[str, dict[str, Any]] = {
    "embedding": {},
    "predictor": {"target_modules": []},
    "gate": {"conditioning": "gate"},
    "core": {"conditioning": "core"},
}
"""Settings of the adapters that :mod:`stlora_peft.selection` chooses from, the default first; all have the predictor
where the backbone allows it, and ``"predictor"`` has nothing else."""
DEFAULT_FORM = "embedding"
CALIBRATION_ROWS = 100_000  # windows times nodes: more would tell least absolute deviations nothing new


@dataclass(frozen=True)
class Candidate:
    """A model that is ready to be trained on a city.

    Args:
        model: What is to be trained are the parameters that require gradients.
        implementation: How the method was realised on this backbone.
    """

    model: nn.Module
    implementation: str

    @property
    def recipe(self) -> str:
        """Hash of what the method trains and of its adapter's configuration: rows of one method must share it."""
        trained = {name: list(p.shape) for name, p in self.model.named_parameters() if p.requires_grad}
        adapters = getattr(self.model, "peft_config", {})
        configs = {name: _changed(config.to_dict()) for name, config in adapters.items()}
        content = [self.implementation, trained, configs]
        text = json.dumps(
            content, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


Build = Callable[[nn.Module, CityData], Candidate]
"""Makes an untrained model from a pristine backbone, which it does not change."""


@dataclass(frozen=True)
class Method:
    """A way to bring a backbone to a city.

    Args:
        description: What it does, in one line.
        build: Makes the model; None where the method has none.
        trained: Whether the model is trained.
        baseline: Forecaster without a backbone that is fitted instead.
        chooses: Whether the form of its adapter is one of ``FORMS``, chosen with each seed by
            :func:`stlora_peft.selection.choose_conditioning`. ``build`` makes the default form then.
    """

    description: str
    build: Build | None = None
    trained: bool = True
    baseline: type[Baseline] | None = None
    chooses: bool = False


def _changed(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in LATER or value != LATER[name]}


def frugal(backbone: nn.Module) -> dict[str, Any]:
    """Settings of a small adapter for a backbone.

    Args:
        backbone: The backbone.

    Returns:
        ``FRUGAL``, or ``FEW_LAYERS`` with the layers that the backbone names for it.

    Example:
        >>> from stlora_peft.backbones import build_backbone
        >>> frugal(build_backbone("lstm", in_channels=3)) == FRUGAL
        True
    """
    spec = getattr(backbone, "stlora_spec", None)
    layers = spec.frugal if isinstance(spec, BackboneSpec) else ()
    return {**FEW_LAYERS, "target_modules": list(layers)} if layers else dict(FRUGAL)


def build_adapter(
    backbone: nn.Module,
    data: CityData,
    *,
    same_city: bool = False,
    parts: Sequence[SubGraph] | None = None,
    **settings: Any,
) -> PeftModel:
    """Put a new ST-LoRA adapter for a city on a copy of a backbone.

    Args:
        backbone: The backbone as it was pretrained; it is not changed.
        data: The city. Its nodes, its scaler, window and horizon are noted in the adapter's configuration.
        same_city: The backbone belongs to this city and keeps its node-bound normalisation statistics. Otherwise they
            are re-estimated on the city's training windows.
        parts: Parts of the city's graph, to do so part by part.
        **settings: Arguments of :class:`stlora_peft.STLoraConfig`.

    Returns:
        The model, its adapter without effect so far.

    Raises:
        ValueError: If a setting is out of range, or does not fit the backbone.

    Example:
        >>> from stlora_peft.backbones import build_backbone
        >>> from stlora_peft.data import adaptation_split, prepare, simulate_city
        >>> city = simulate_city(num_nodes=4, days=4, seed=0)
        >>> split = adaptation_split(city.num_steps, city.steps_per_day, days=1)
        >>> data = prepare(city, split, window=12, horizon=12)
        >>> build_adapter(build_backbone("lstm", in_channels=3), data, r=4).peft_config["default"].num_nodes
        4
    """
    known = {
        "num_nodes": data.city.num_nodes,
        "node_ids": list(data.city.node_ids),
        "scaler": data.scaler.to_dict(),
        "window": data.train.window,
        "horizon": data.train.horizon,
    }
    model = get_peft_model(copy.deepcopy(backbone), STLoraConfig(**{**known, **settings}))
    if not same_city and parts is not None:
        reestimate_parts(model, data.train, parts)
    elif not same_city:
        reestimate(model, forward_batches(data.train, data))
    return model


def forward_batches(windows: Windows, data: CityData, batch_size: int = 64) -> Iterator[dict[str, torch.Tensor]]:
    """Gather the arguments of a backbone's ``forward`` batch by batch, as ``reestimate`` takes them.

    Args:
        windows: The windows.
        data: The city they come from, with its graph.
        batch_size: Windows in one batch.

    Yields:
        Keyword arguments ``x``, ``edge_index``, ``edge_weight``.
    """
    for batch in window_batches(windows, batch_size):
        yield {"x": batch["x"], "edge_index": data.edge_index, "edge_weight": data.edge_weight}


def calibrated(model: PeftModel, data: CityData) -> PeftModel:
    """Fit the adapter's predictor to the city's given days in closed form, in place, without training.

    Args:
        model: Untrained adapter with a predictor, see :func:`build_adapter`.
        data: The city. Of a long record every k-th window is read.

    Returns:
        The same model.
    """
    windows = data.given
    step = max(1, len(windows) * data.city.num_nodes // CALIBRATION_ROWS)
    chosen = windows.at(windows.starts[::step])
    edges = {"edge_index": data.edge_index, "edge_weight": data.edge_weight}
    batches = (({"x": batch["x"], **edges}, data.scaler.transform(batch["y"])) for batch in window_batches(chosen, 64))
    calibrate(model, batches)
    return model


def rebuilt(backbone: nn.Module, data: CityData) -> nn.Module:
    """Copy the backbone, make it fit the city and re-estimate its node-bound statistics."""
    model = rebuild(backbone, data.city.num_nodes)
    reestimate(model, forward_batches(data.train, data))
    return model


def backbone_spec(backbone: nn.Module) -> BackboneSpec:
    """Return what the backbone says about its layers."""
    spec = getattr(backbone, "stlora_spec", None)
    if not isinstance(spec, BackboneSpec):
        raise ValueError(
            message(
                f"backbone '{type(backbone).__name__}' does not say which layers these methods train",
                expected="a class attribute stlora_spec of type BackboneSpec",
                got="none",
                fix="add one to the class, or compare zero-shot, full and the methods without a backbone only",
            )
        )
    return spec
