"""Forecasters with one signature, built from torch and torch-geometric-temporal layers.

Each is imported when it is first asked for; most need torch-geometric-temporal.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stlora_peft.backbones import attention, recurrent
from stlora_peft.backbones.base import Forecaster
from stlora_peft.backbones.lstm import LSTMForecaster
from stlora_peft.errors import message

if TYPE_CHECKING:
    from stlora_peft.backbones.stgcn import STGCN
    from stlora_peft.data import CityData

_CLASSES = {
    "lstm": ("lstm", "LSTMForecaster"),
    "stgcn": ("stgcn", "STGCN"),
    "heterogclstm": ("hetero", "HeteroGCLSTM"),
    "d2stgnn": ("d2stgnn.model", "D2STGNN"),
    "staeformer": ("staeformer", "STAEformer"),
    "gwnet": ("gwnet", "GraphWaveNet"),
    **{name: (f"recurrent.{file}", found) for name, (file, found) in recurrent.CLASSES.items()},
    **{name: (f"attention.{file}", found) for name, (file, found) in attention.CLASSES.items()},
}

BACKBONES = tuple(sorted(_CLASSES))
"""Names that :func:`build_backbone` knows."""

__all__ = ["BACKBONES", "STGCN", "Forecaster", "LSTMForecaster", "backbone_class", "build_backbone", "new_backbone"]


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
    from stlora_peft.acceleration import accelerate  # it stands on this package

    backbone = backbone_class(name)(**hyperparameters)
    accelerate(backbone, cells=False)
    return backbone


def new_backbone(name: str, data: CityData | Sequence[CityData], *, seed: int, **sizes: Any) -> Forecaster:
    """Build an untrained backbone for a city.

    Args:
        name: One of :data:`BACKBONES`.
        data: The city that it is going to be trained on: nodes, channels, window, horizon and clock are its own. Of
            several cities the nodes are those of all, one city after the other, the rest those of the first.
        seed: Seed of the first weights.
        **sizes: Other arguments of its class, its own defaults where absent.

    Returns:
        The backbone.

    Raises:
        ValueError: If no backbone has this name, it has no such size, or the size does not fit it.
        ImportError: If the backbone needs a package that is not installed.

    Example:
        >>> from stlora_peft.data import adaptation_split, prepare, simulate_city
        >>> city = simulate_city(num_nodes=4, days=4, seed=0)
        >>> data = prepare(city, adaptation_split(city.num_steps, city.steps_per_day))
        >>> new_backbone("lstm", data, seed=0, hidden_size=8).in_channels
        3
    """
    import torch

    accepted = inspect.signature(backbone_class(name)).parameters
    unknown = sorted(sizes.keys() - accepted.keys())
    if unknown:
        raise ValueError(
            message(
                f"backbone '{name}' has no size {', '.join(unknown)}",
                expected=f"of {', '.join(accepted)}",
                got=", ".join(f"{key} = {sizes[key]}" for key in unknown),
                fix="leave it out, or give sizes of this network",
            )
        )
    cities = data if isinstance(data, Sequence) else [data]
    data = cities[0]
    of_city: dict[str, Any] = {
        "num_nodes": sum(one.city.num_nodes for one in cities),
        "in_channels": data.train.series.shape[-1],
        "out_channels": data.city.num_channels,
        "window": data.train.window,
        "horizon": data.train.horizon,
        "time_features": data.time_features,
        "steps_per_day": max(1, round(data.city.steps_per_day)),
    }
    torch.manual_seed(seed)
    return build_backbone(name, **{key: value for key, value in of_city.items() if key in accepted} | sizes)


def __getattr__(name: str) -> Any:
    """Import ``STGCN``, and with it torch-geometric-temporal, only when somebody asks for it."""
    if name == "STGCN":
        return backbone_class("stgcn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
