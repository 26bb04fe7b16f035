"""Adapters whose matrices have fewer free numbers than entries, for the search."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stlora_peft.data import City, CityData
from stlora_peft.methods import build_adapter
from stlora_peft.storage import SavedBackbone
from stlora_peft.tuner.layers import STLoraLayer

Build = Callable[[SavedBackbone, CityData, City], nn.Module]
"""Makes a model of a backbone, the target's data and the source."""

FACTORS = ("nall_A", "nall_B", "nall_gate_map", "nall_node_bias_map")
"""What an update of a layer consists of, but for the node vectors."""


def half(settings: dict[str, Any]) -> Build:
    """Build an adapter of whose two matrices only the smaller is trained, the other being singular vectors."""
    rank = settings["r"]

    def build(saved: SavedBackbone, data: CityData, source: City) -> nn.Module:
        model = build_adapter(saved.backbone, data, **settings)
        for layer in _plain_layers(model):
            left, _, right = torch.linalg.svd(layer.base_layer.weight.detach().flatten(1), full_matrices=False)
            a, b = layer.nall_A["default"], layer.nall_B["default"]
            kept, values = (a, right[:rank]) if a.numel() > b.numel() else (b, left[:, :rank])
            with torch.no_grad():
                a.zero_(), b.zero_()
                kept.copy_(values.reshape(kept.shape)).requires_grad_(False)
        return model

    return build


def tied(settings: dict[str, Any]) -> Build:
    """Build an adapter in which repeated layers share their matrices, each with maps of the vectors of its own."""

    def build(saved: SavedBackbone, data: CityData, source: City) -> nn.Module:
        model = build_adapter(saved.backbone, data, **settings)
        first: dict[tuple[Any, ...], nn.Module] = {}
        for layer in _plain_layers(model):
            kind = re.sub(r"\d+", "*", layer.name), tuple(layer.base_layer.weight.shape)
            like = first.setdefault(kind, layer)
            layer.nall_A["default"], layer.nall_B["default"] = like.nall_A["default"], like.nall_B["default"]
        return model

    return build


def hashed(settings: dict[str, Any], count: int) -> Build:
    """Build an adapter in which every entry of the updates is its start and one of ``count`` trained numbers, by lot.

    References:
        Li et al., Uni-LoRA: One Vector is All You Need, NeurIPS 2025, arXiv:2506.00799: all matrices of LoRA from one
        vector; Chen et al., Compressing Neural Networks with the Hashing Trick, ICML 2015.
    """

    def build(saved: SavedBackbone, data: CityData, source: City) -> nn.Module:
        model = build_adapter(saved.backbone, data, **settings)
        factors = [getattr(layer, name) for layer in _plain_layers(model) for name in FACTORS]
        sizes = [factor["default"].numel() for factor in factors]
        lot = torch.Generator().manual_seed(torch.initial_seed())
        index = torch.randperm(sum(sizes), generator=lot) % count
        sign = torch.randint(2, (sum(sizes),), generator=lot) * 2.0 - 1.0
        values = nn.Parameter(torch.zeros(count))
        for factor, *own in zip(factors, index.split(sizes), sign.split(sizes), strict=True):
            factor["default"].requires_grad_(False)
            parametrize.register_parametrization(factor, "default", _Hashed(values, *own))
        return model

    return build


class _Hashed(nn.Module):
    """Adds to a frozen tensor what it shares with others.

    Args:
        values: Trained numbers, shared by all.
        index: Which of them each entry takes.
        sign: Its sign.
    """

    index: Tensor
    sign: Tensor

    def __init__(self, values: nn.Parameter, index: Tensor, sign: Tensor) -> None:
        super().__init__()
        self.values = values
        self.register_buffer("index", index)
        self.register_buffer("sign", sign)

    def forward(self, start: Tensor) -> Tensor:
        return start + (self.sign * self.values[self.index]).view_as(start)


def _plain_layers(model: nn.Module) -> list[Any]:
    found = [module for module in model.modules() if isinstance(module, STLoraLayer) and "default" in module.nall_A]
    return [layer for layer in found if isinstance(layer.base_layer, (nn.Conv2d, nn.Linear))]
