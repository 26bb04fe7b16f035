"""Which of a backbone's layers PEFT's own methods take, and its DoRA on them."""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from stlora_peft.errors import message
from stlora_peft.tuner.spec import BackboneSpec

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16}
"""Rank and scale of PEFT's methods: its default rank, and twice it."""


def peft_targets(backbone: nn.Module, spec: BackboneSpec) -> list[str]:
    """Find the linear layers and convolutions among the layers that a backbone names for adaptation.

    Args:
        backbone: The backbone.
        spec: What it says about its layers.

    Returns:
        Full names of its target modules that are ``nn.Linear`` or ``nn.Conv2d``, in the backbone's order.

    Example:
        >>> spec = BackboneSpec(target_modules=("0", "1"))
        >>> peft_targets(nn.Sequential(nn.GRU(3, 4), nn.Linear(4, 1)), spec)
        ['1']
    """
    named = [(name, backbone.get_submodule(name)) for name in _target_names(backbone, spec)]
    return [name for name, layer in named if isinstance(layer, nn.Linear | nn.Conv2d)]


def low_rank_refusal(layer: nn.Module) -> str | None:
    """Say why PEFT's low-rank update of a convolution is not one of its weight.

    PEFT's ``lora_A`` takes over kernel, stride and padding of the convolution, but not its dilation, groups and
    padding mode. With another dilation the update has another length than the output, and is broadcast to it where
    one of the two lengths is 1.

    Args:
        layer: A layer.

    Returns:
        The reason; None for a convolution without any of them, and for all other layers.

    Example:
        >>> low_rank_refusal(nn.Conv2d(4, 4, kernel_size=(2, 1), dilation=(2, 1)))
        'dilation=(2, 1)'
    """
    if not isinstance(layer, nn.Conv2d):
        return None
    dilated = any(step > 1 and size > 1 for step, size in zip(layer.dilation, layer.kernel_size, strict=True))
    own = {
        "dilation": layer.dilation if dilated else None,
        "groups": layer.groups if layer.groups != 1 else None,
        "padding_mode": layer.padding_mode if layer.padding_mode != "zeros" else None,
    }
    return ", ".join(f"{name}={value}" for name, value in own.items() if value is not None) or None


def dora_model(backbone: nn.Module, spec: BackboneSpec) -> PeftModel:
    r"""Put PEFT's DoRA on the layers of a backbone that it can follow.

    .. math:: W' = m \odot \frac{W + \tfrac{\alpha}{r} B A}{\lVert W + \tfrac{\alpha}{r} B A \rVert}

    with the norm of each row. ``B`` starts at zero and ``m`` at the norms of ``W``, so the forecast starts as that of
    the backbone, up to rounding. Rank and :math:`\alpha` are those of ``LORA``.

    Args:
        backbone: Backbone that fits the city; it is frozen and changed in place. Its layers are those of
            :func:`peft_targets` without a :func:`low_rank_refusal`.
        spec: What it says about its layers; its node-bound modules are trained whole.

    Returns:
        The model; ``len(model.targeted_module_names)`` layers have an update.

    Raises:
        ValueError: If no layer is left.

    Example:
        >>> from stlora_peft.backbones import build_backbone
        >>> backbone = build_backbone("lstm", in_channels=3)
        >>> dora_model(backbone, backbone.stlora_spec).targeted_module_names
        ['head']

    References:
        Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv:2402.09353.
    """
    config = LoraConfig(
        use_dora=True,
        **LORA,
        # A list would also match layers whose names end with one of these.
        target_modules="|".join(re.escape(name) for name in _dora_targets(backbone, spec)),
        modules_to_save=list(spec.node_bound) or None,
    )
    return get_peft_model(backbone, config)


def _dora_targets(backbone: nn.Module, spec: BackboneSpec) -> list[str]:
    """Names of the layers that DoRA can follow.

    Raises:
        ValueError: If there is none.
    """
    targets = [name for name in peft_targets(backbone, spec) if low_rank_refusal(backbone.get_submodule(name)) is None]
    if not targets:
        raise ValueError(
            message(
                f"dora finds nothing to adapt in backbone '{type(backbone).__name__}'",
                expected="an nn.Linear among its target modules, or an nn.Conv2d without dilation, groups and padding "
                "mode",
                got=", ".join(_described(backbone, name) for name in _target_names(backbone, spec)) or "none of them",
                fix="leave dora out",
            )
        )
    return targets


def _target_names(backbone: nn.Module, spec: BackboneSpec) -> list[str]:
    """Full names of the modules whose names end with one of the spec's."""
    names = [name for name, _ in backbone.named_modules()]
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in spec.target_modules)]


def _described(backbone: nn.Module, name: str) -> str:
    """A layer's name, its class and what stands in the way of a low-rank update."""
    layer = backbone.get_submodule(name)
    reason = low_rank_refusal(layer)
    return f"{name} ({type(layer).__name__}{f' with {reason}' if reason else ''})"
