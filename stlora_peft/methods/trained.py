"""The methods that train something, each as the function that builds its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from stlora_peft.backbones import Forecaster, build_backbone
from stlora_peft.data import CityData
from stlora_peft.errors import message
from stlora_peft.methods import node_inputs as at_input
from stlora_peft.methods.candidates import (
    FORMS,
    Build,
    Candidate,
    backbone_spec,
    build_adapter,
    calibrated,
    frugal,
    rebuilt,
)
from stlora_peft.methods.node_inputs import NodeInputs
from stlora_peft.methods.peft_layers import LORA, dora_model, low_rank_refusal, peft_targets
from stlora_peft.tuner.node_bound import rebuild

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

CHOSEN = f"the one of {', '.join(FORMS)} with the lowest error on given days that are held back in turn"


def zero_shot(backbone: nn.Module, data: CityData) -> Candidate:
    """Leave the backbone as it is; what is bound to the nodes is rebuilt for theirs."""
    return Candidate(rebuild(backbone, data.city.num_nodes), "as pretrained")


def zero_shot_plus(backbone: nn.Module, data: CityData) -> Candidate:
    """Fit an adapter's predictor to the given days in closed form, without training."""
    model = calibrated(build_adapter(backbone, data), data)
    return Candidate(model, "STLoraConfig(num_nodes=N), the predictor calibrated in closed form")


def head(backbone: nn.Module, data: CityData) -> Candidate:
    """Train the layers that make the forecast from the last hidden state."""
    spec, model = backbone_spec(backbone), rebuilt(backbone, data)
    model.requires_grad_(False)
    for name in (*spec.head, *spec.node_bound):
        model.get_submodule(name).requires_grad_(True)
    return Candidate(model, f"layers {', '.join(spec.head)}")


def full(backbone: nn.Module, data: CityData) -> Candidate:
    """Train every parameter."""
    return Candidate(rebuilt(backbone, data).requires_grad_(True), "every parameter")


def scratch(backbone: nn.Module, data: CityData) -> Candidate:
    """Train a new backbone of the same sizes.

    Raises:
        ValueError: If the backbone is not one of this package.
    """
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


def norm(backbone: nn.Module, data: CityData) -> Candidate:
    """Train the normalisation layers and every bias."""
    spec, model = backbone_spec(backbone), rebuilt(backbone, data)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        is_norm = isinstance(model.get_submodule(owner), NORMALISATIONS)
        parameter.requires_grad_(is_norm or own.startswith("bias"))
    for name in spec.node_bound:
        model.get_submodule(name).requires_grad_(True)
    return Candidate(model, "normalisation layers and every bias")


def ia3(backbone: nn.Module, data: CityData) -> Candidate:
    """Train PEFT's IA3.

    Raises:
        ValueError: If no target is a linear layer or a convolution.
    """
    spec, model = backbone_spec(backbone), rebuilt(backbone, data)
    targets = peft_targets(model, spec)
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


def dora(backbone: nn.Module, data: CityData) -> Candidate:
    """Train PEFT's DoRA.

    Raises:
        ValueError: If it can follow none of the targets.
    """
    model = dora_model(rebuilt(backbone, data), backbone_spec(backbone))
    layers = len(model.targeted_module_names)
    return Candidate(model, f"peft.LoraConfig(use_dora=True) on {layers} linear and convolution layers")


def lora(backbone: nn.Module, data: CityData) -> Candidate:
    """Train PEFT's LoRA, or the same update by this package where PEFT cannot follow a target."""
    spec = backbone_spec(backbone)
    model = rebuilt(backbone, data)
    config = LoraConfig(
        **LORA,
        target_modules=list(spec.target_modules),
        modules_to_save=list(spec.node_bound) or None,
    )
    try:
        if not any(low_rank_refusal(model.get_submodule(name)) for name in peft_targets(model, spec)):
            return Candidate(get_peft_model(model, config), "peft.LoraConfig")
    except ValueError:  # PEFT refuses a target: graph convolutions and recurrent layers are not its own
        pass
    model = build_adapter(backbone, data, conditioning="shared", predictor=None, lora_dropout=0.0, **LORA)
    return Candidate(model, 'STLoraConfig(conditioning="shared", predictor=None)')


def node_inputs(wrap: Callable[[nn.Module, int], NodeInputs], implementation: str) -> Build:
    """Train numbers of each node that are added to the input of the frozen backbone."""

    def build(backbone: nn.Module, data: CityData) -> Candidate:
        model = wrap(rebuilt(backbone, data), data.city.num_nodes)
        for name in backbone_spec(backbone).node_bound:
            model.backbone.get_submodule(name).requires_grad_(True)
        return Candidate(model, implementation)

    return build


def adapter(**settings: Any) -> Build:
    """Train an ST-LoRA adapter with these settings, the others at their defaults."""

    def build(backbone: nn.Module, data: CityData) -> Candidate:
        words = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return Candidate(build_adapter(backbone, data, **settings), f"STLoraConfig({words or 'num_nodes=N'})")

    return build


def frugal_adapter(backbone: nn.Module, data: CityData) -> Candidate:
    """Train a small ST-LoRA adapter."""
    return adapter(**frugal(backbone))(backbone, data)


def auto(backbone: nn.Module, data: CityData) -> Candidate:
    """Train the form of adapter that is best on held-out days; this is the default one, to search the rate with."""
    return Candidate(build_adapter(backbone, data), CHOSEN)


node_embedding = node_inputs(at_input.node_embedding, "a free vector of each node added to the input")
node_prompt = node_inputs(at_input.node_prompt, "a rank-6 prompt of each node added to the input's values")
