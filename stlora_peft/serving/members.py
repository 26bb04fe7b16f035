"""What a city brings along: its adapter taken apart, its graph and its scaler."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stlora_peft.data import Scaler
from stlora_peft.serving.stacks import FAMILIES, Factors
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.node_bound import NodeBoundLayer
from stlora_peft.tuner.nodes import TABLE_ATTRIBUTE
from stlora_peft.tuner.predictor import ATTRIBUTE, NodePredictor


@dataclass(frozen=True, eq=False)
class Place:
    """A city's graph, clock and scaler.

    Args:
        num_nodes: Number of nodes.
        edge_index: Edges, source above target.
        edge_weight: Their weights.
        interval_minutes: Minutes between two readings.
        scaler: Statistics of its readings.
    """

    num_nodes: int
    edge_index: Tensor
    edge_weight: Tensor
    interval_minutes: int
    scaler: Scaler


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors of a city's adapter, apart from any model.

    Args:
        layers: Factors by the name of the adapted layer.
        vectors: Node vectors of ``conditioning="embedding"``.
        predictor: The node-specific predictor.
        bound: Node-bound modules by name.
        refusal: Why they cannot be stacked with those of other cities, or an empty text.
    """

    layers: Mapping[str, Factors]
    vectors: Tensor | None
    predictor: NodePredictor | None
    bound: Mapping[str, nn.Module]
    refusal: str

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same for two cities to share a forward."""
        layers = tuple((name, factors.kind) for name, factors in sorted(self.layers.items()))
        return layers, _predictor_kind(self.predictor), tuple(sorted(self.bound))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = chain.from_iterable(factors.tensors.values() for factors in self.layers.values())
        modules = [module for module in (self.predictor, *self.bound.values()) if module is not None]
        states = chain.from_iterable(module.state_dict().values() for module in modules)
        rest = [] if self.vectors is None else [self.vectors]
        return sum(tensor.nbytes for tensor in chain(tensors, states, rest))


@dataclass(frozen=True, eq=False)
class Member:
    """A city that is served.

    Args:
        name: Its name.
        place: Its graph, clock and scaler.
        parts: Its adapter.
        model: Its own forecaster, where it is served alone; else None.
        num_bytes: Bytes of its adapter.
        seconds: Time that loading it took.
    """

    name: str
    place: Place
    parts: Parts
    model: PeftModel | None
    num_bytes: int
    seconds: float

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same for two cities to share a forward."""
        return (self.name,) if self.model is not None else self.parts.kind


def take_apart(model: PeftModel, name: str, device: torch.device) -> Parts:
    """Copy the tensors of an adapter out of a model.

    Args:
        model: Model with the adapter.
        name: The adapter's name.
        device: Where the copies are made.
    """

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().to(device)

    base = model.get_base_model()
    layers = {
        layer.name: Factors(
            {key: copied(value) for key, value in layer.factors(name).items()},
            layer.conditioning[name],
            layer.scaling[name],
            layer.layout[name].pattern if name in layer.layout else None,
        )
        for layer in base.modules()
        if isinstance(layer, STLoraLayer) and name in layer.nall_B
    }
    table, predictors = getattr(base, TABLE_ATTRIBUTE, None), getattr(base, ATTRIBUTE, None)
    vectors = copied(table.nall_emb[name]) if table is not None and name in table.nall_emb else None
    predictor = None
    if predictors is not None and name in predictors.nall_predictor:
        predictor = copy.deepcopy(predictors.nall_predictor[name]).requires_grad_(False).to(device)
    bound = {
        layer.name: copy.deepcopy(layer.nall_node_bound[name]).requires_grad_(False).to(device).eval()
        for layer in base.modules()
        if isinstance(layer, NodeBoundLayer) and name in layer.nall_node_bound
    }
    return Parts(layers, vectors, predictor, bound, _refusal(base, name, bound))


def _refusal(base: nn.Module, name: str, bound: Mapping[str, nn.Module]) -> str:
    """Why an adapter cannot be stacked, as far as its modules tell."""
    for key, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in getattr(module, "modules_to_save", {}):
            return f"its '{key}' is trained whole (modules_to_save)"
    for key, module in bound.items():
        normalises = isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None
        if not (normalises or type(module) is nn.Embedding):
            return f"its node-bound '{key}' is a {type(module).__name__}, which cannot be joined"
    return ""


def _predictor_kind(predictor: NodePredictor | None) -> tuple[Any, ...]:
    if predictor is None:
        return ()
    sizes = predictor.predictor
    numbers = (predictor.width, sizes.num_layers, sizes.window, sizes.horizon, sizes.in_channels, sizes.out_channels)
    layouts = (predictor.history_channels, sizes.input_layout, sizes.output_layout)
    family, dtype = FAMILIES[predictor.config.conditioning], next(predictor.parameters()).dtype
    return (*numbers, *layouts, predictor.r, family, dtype)
