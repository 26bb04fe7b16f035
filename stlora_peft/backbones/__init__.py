"""Forecasters with one signature, built from torch and torch-geometric-temporal layers.

All but ``lstm`` need torch-geometric-temporal and are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stlora_peft.backbones import attention, recurrent
from stlora_peft.backbones.base import Forecaster
from stlora_peft.backbones.lstm import LSTMForecaster
from stlora_peft.errors import message

if TYPE_CHECKING:
    from stlora_peft.backbones.stgcn import STGCN

_CLASSES = {
    "lstm": ("lstm", "LSTMForecaster"),
    "stgcn": ("stgcn", "STGCN"),
    "heterogclstm": ("hetero", "HeteroGCLSTM"),
    **{name: (f"recurrent.{file}", found) for name, (file, found) in recurrent.CLASSES.items()},
    **{name: (f"attention.{file}", found) for name, (file, found) in attention.CLASSES.items()},
}

BACKBONES = tuple(sorted(_CLASSES))
"""Names that :func:`build_backbone` knows."""

__all__ = ["BACKBONES", "STGCN", "Forecaster", "LSTMForecaster", "backbone_class", "build_backbone"]


def backbone_class(name: str) -> type[Forecaster]:
    """Class of the backbone called ``name``, imported on demand.

    Args:
        name: One of :data:`BACKBONES`.

    Raises:
        ValueError: If no backbone has this name.
        ImportError: If the backbone needs a package that is not installed.

    Example:
        >>> backbone_class("lstm").__name__
        'LSTMForecaster'
    """
    if name not in _CLASSES:
        raise ValueError(
            message(
                f"backbone '{name}' is unknown",
                expected=f"one of {', '.join(BACKBONES)}",
                got=f"'{name}'",
                fix="take a name of the list, or hand your own nn.Module to get_peft_model directly",
            )
        )
    file, attribute = _CLASSES[name]
    found: type[Forecaster] = getattr(importlib.import_module(f"{__name__}.{file}"), attribute)
    return found


def build_backbone(name: str, **hyperparameters: Any) -> Forecaster:
    """Build the backbone called ``name``.

    ``build_backbone(model.name, **model.hyperparameters)`` builds a network of the same shape as ``model``.

    Args:
        name: One of :data:`BACKBONES`.
        **hyperparameters: Arguments of its class.

    Raises:
        ValueError: If no backbone has this name, or if an argument is out of range.
        ImportError: If the backbone needs a package that is not installed.

    Example:
        >>> model = build_backbone("lstm", in_channels=3, hidden_size=16)
        >>> build_backbone(model.name, **model.hyperparameters).horizon
        12
    """
    return backbone_class(name)(**hyperparameters)


def __getattr__(name: str) -> Any:
    """Import ``STGCN``, and with it torch-geometric-temporal, only when somebody asks for it."""
    if name == "STGCN":
        return backbone_class("stgcn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
