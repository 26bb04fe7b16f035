"""Ways to bring a pretrained backbone to another city, each as the model that it would train."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from stlora_peft.backbones import Forecaster, build_backbone
from stlora_peft.baselines import BASELINES, Baseline
from stlora_peft.data import CityData, Windows
from stlora_peft.errors import message
from stlora_peft.evaluation import window_batches
from stlora_peft.tuner.config import STLoraConfig
from stlora_peft.tuner.node_bound import rebuild
from stlora_peft.tuner.reestimation import reestimate
from stlora_peft.tuner.spec import BackboneSpec

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


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
        content = [self.implementation, trained, {name: config.to_dict() for name, config in adapters.items()}]
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
    """

    description: str
    build: Build | None = None
    trained: bool = True
    baseline: type[Baseline] | None = None


def build_adapter(backbone: nn.Module, data: CityData, *, same_city: bool = False, **settings: Any) -> PeftModel:
    """Put a new ST-LoRA adapter for a city on a copy of a backbone.

    Args:
        backbone: The backbone as it was pretrained; it is not changed.
        data: The city. Its nodes, its scaler, window and horizon are noted in the adapter's configuration.
        same_city: The backbone belongs to this city and keeps its node-bound normalisation statistics. Otherwise they
            are re-estimated on the city's training windows.
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
    if not same_city:
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


def _zero_shot(backbone: nn.Module, data: CityData) -> Candidate:
    return Candidate(rebuild(backbone, data.city.num_nodes), "as pretrained")


def _head(backbone: nn.Module, data: CityData) -> Candidate:
    spec, model = _spec(backbone), _rebuilt(backbone, data)
    model.requires_grad_(False)
    for name in (*spec.head, *spec.node_bound):
        model.get_submodule(name).requires_grad_(True)
    return Candidate(model, f"layers {', '.join(spec.head)}")


def _full(backbone: nn.Module, data: CityData) -> Candidate:
    return Candidate(_rebuilt(backbone, data).requires_grad_(True), "every parameter")


def _scratch(backbone: nn.Module, data: CityData) -> Candidate:
    if not isinstance(backbone, Forecaster):
        raise ValueError(
            message(
                f"backbone '{type(backbone).__name__}' cannot be built anew",
                expected="a backbone of this package, which knows its hyperparameters",
                got="another nn.Module",
                fix="leave scratch out, or train a fresh model of your own on the city",
            )
        )
    sizes = cast(Forecaster, rebuild(backbone, data.city.num_nodes)).hyperparameters
    return Candidate(build_backbone(backbone.name, **sizes), "every parameter, from random weights")


def _norm(backbone: nn.Module, data: CityData) -> Candidate:
    spec, model = _spec(backbone), _rebuilt(backbone, data)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        is_norm = isinstance(model.get_submodule(owner), NORMALISATIONS)
        parameter.requires_grad_(is_norm or own.startswith("bias"))
    for name in spec.node_bound:
        model.get_submodule(name).requires_grad_(True)
    return Candidate(model, "normalisation layers and every bias")


def _ia3(backbone: nn.Module, data: CityData) -> Candidate:
    spec, model = _spec(backbone), _rebuilt(backbone, data)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(f".{name}".endswith(f".{t}") for t in spec.target_modules)
    ]
    if not targets:
        raise ValueError(
            message(
                f"ia3 finds nothing to scale in backbone '{type(backbone).__name__}'",
                expected="an nn.Linear or nn.Conv2d among its target modules, all that PEFT's IA3 takes",
                got=", ".join(spec.target_modules),
                fix="leave ia3 out",
            )
        )
    config = IA3Config(target_modules=targets, feedforward_modules=[], modules_to_save=list(spec.node_bound) or None)
    return Candidate(get_peft_model(model, config), f"peft.IA3Config on {len(targets)} linear and convolution layers")


def _lora(backbone: nn.Module, data: CityData) -> Candidate:
    spec = _spec(backbone)
    default = STLoraConfig()
    config = LoraConfig(
        r=default.r,
        lora_alpha=int(default.lora_alpha),
        target_modules=list(spec.target_modules),
        modules_to_save=list(spec.node_bound) or None,
    )
    try:
        return Candidate(get_peft_model(_rebuilt(backbone, data), config), "peft.LoraConfig")
    except ValueError:  # PEFT refuses a target: graph convolutions and recurrent layers are not its own
        model = build_adapter(backbone, data, conditioning="shared", predictor=None)
        return Candidate(model, 'STLoraConfig(conditioning="shared", predictor=None)')


def _st_lora(backbone: nn.Module, data: CityData) -> Candidate:
    return Candidate(build_adapter(backbone, data), "STLoraConfig(num_nodes=N)")


def _full_st_lora(backbone: nn.Module, data: CityData) -> Candidate:
    return Candidate(build_adapter(backbone, data, freeze_backbone=False), "STLoraConfig(freeze_backbone=False)")


METHODS: dict[str, Method] = {
    "zero-shot": Method("the backbone as it is, with the new city's scaler", _zero_shot, trained=False),
    "persistence": Method("the last reading, at every step; no model", trained=False),
    "ha": Method("historical average by time of day", trained=False, baseline=BASELINES["ha"]),
    "var": Method("vector autoregression of all nodes", trained=False, baseline=BASELINES["var"]),
    "svr": Method("linear support vector regression of each node", trained=False, baseline=BASELINES["svr"]),
    "scratch": Method("train a new backbone on the city alone", _scratch),
    "head": Method("train the layers that make the forecast from the last hidden state", _head),
    "norm": Method("train normalisation layers and biases", _norm),
    "full": Method("train every parameter", _full),
    "ia3": Method("train a factor for each output of the adapted layers, PEFT's IA3", _ia3),
    "lora": Method("train low-rank updates that all nodes share", _lora),
    "st-lora": Method("train node-conditioned low-rank updates and the node-specific predictor", _st_lora),
    "full+st-lora": Method("the same, and train the backbone too: what freezing costs", _full_st_lora),
}
"""Methods by name. Every trained method re-estimates and trains the modules that are bound to the number of nodes."""


def find_methods(names: Iterable[str]) -> dict[str, Method]:
    """Look methods up.

    Args:
        names: Names of :data:`METHODS`.

    Returns:
        The methods by name, in the order given.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> list(find_methods(["full", "st-lora"]))
        ['full', 'st-lora']
    """
    names = list(names)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(
            message(
                "unknown method" if unknown else "no method was given",
                expected=f"names of {', '.join(METHODS)}",
                got=", ".join(unknown) or "none",
                fix="correct the list of methods",
            )
        )
    return {name: METHODS[name] for name in names}


def _rebuilt(backbone: nn.Module, data: CityData) -> nn.Module:
    """Copy the backbone, make it fit the city and re-estimate its node-bound statistics."""
    model = rebuild(backbone, data.city.num_nodes)
    reestimate(model, forward_batches(data.train, data))
    return model


def _spec(backbone: nn.Module) -> BackboneSpec:
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
