"""One forward for the nodes of many cities."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stlora_peft.serving.members import Member
from stlora_peft.serving.stacks import ADAPTER, LayerStack, PredictorStack
from stlora_peft.serving.tiles import Tiles
from stlora_peft.tuner.bare_layers import STLoraGCLSTM
from stlora_peft.tuner.hosts import host_class
from stlora_peft.tuner.layout import parse_layout

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def sharing_copy(module: AnyModule) -> AnyModule:
    """Copy a module tree whose parameters and buffers stay the very tensors of the original."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


class Joined(nn.Module):
    """A backbone on the union of several cities' graphs, every node with its own city's adapter.

    The frozen weights are those of ``backbone`` itself and run once over all nodes. No edge leads from one city to
    another, so what each city's nodes hear is what they hear alone.

    Args:
        backbone: The frozen backbone. It is not changed.
        members: The cities, all of one kind.

    Shapes:
        - **x:** ``[b t n c]``, the cities side by side as ``tiles`` has them
        - **output:** ``[b t n c]``
    """

    def __init__(self, backbone: nn.Module, members: Sequence[Member]) -> None:
        super().__init__()
        device = members[0].place.edge_index.device
        self.tiles = Tiles.pack([member.place.num_nodes for member in members], device)
        self.net = sharing_copy(backbone)
        modules = dict(self.net.named_modules())
        vectors = [member.parts.vectors for member in members]
        for name in members[0].parts.layers:
            factors = [member.parts.layers[name] for member in members]
            layer = cast(Any, host_class(modules[name]))(modules[name], name)
            holder = layer.gates if isinstance(layer, STLoraGCLSTM) else layer
            holder.num_nodes[ADAPTER] = self.tiles.num_slots
            if factors[0].layout is not None:
                holder.layout[ADAPTER] = parse_layout(factors[0].layout)
            holder.stack = LayerStack(factors, vectors, self.tiles, holder.in_shape)
            _replace(self.net, modules[name], layer)
        for name in members[0].parts.bound:
            parts = [member.parts.bound[name] for member in members]
            _replace(self.net, modules[name], _join_bound(parts, self.tiles))
        predictors = [member.parts.predictor for member in members if member.parts.predictor is not None]
        self.predictor = PredictorStack(predictors, vectors, self.tiles) if predictors else None
        pairs = list(zip(members, self.tiles.starts, strict=True))
        self.register_buffer("edge_index", torch.cat([each.place.edge_index + start for each, start in pairs], 1))
        self.register_buffer("edge_weight", torch.cat([each.place.edge_weight for each in members]))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Forecast all cities."""
        forecast: Tensor = self.net(x, self.edge_index, self.edge_weight)
        return forecast if self.predictor is None else forecast + self.predictor(x, forecast)


class Alone(nn.Module):
    """A city's own forecaster, called as :class:`Joined` is.

    Args:
        member: The city.
    """

    def __init__(self, member: Member) -> None:
        super().__init__()
        place = member.place
        self.tiles = Tiles.pack([place.num_nodes], place.edge_index.device)
        self.model = cast(nn.Module, member.model)
        self.edge_index, self.edge_weight = place.edge_index, place.edge_weight

    def forward(self, x: Tensor) -> Tensor:
        """Forecast the city."""
        forecast: Tensor = self.model(x, self.edge_index, self.edge_weight)
        return forecast


def _replace(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in place of another under every parent that holds it."""
    for module in list(net.modules()):
        for name, held in list(module._modules.items()):
            if held is old and module is not new:
                setattr(module, name, new)


def _join_bound(parts: Sequence[nn.Module], tiles: Tiles) -> nn.Module:
    """One node-bound module for the nodes of all cities."""
    joined = copy.deepcopy(parts[0])
    if isinstance(joined, _BatchNorm):
        for name, fill in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            value = tiles.join([getattr(part, name).detach() for part in parts], fill=fill)
            is_buffer = name in joined._buffers
            setattr(joined, name, value if is_buffer else nn.Parameter(value, requires_grad=False))
        joined.num_features = tiles.num_slots
    else:
        table = cast(nn.Embedding, joined)
        rows = tiles.join([cast(nn.Embedding, part).weight.detach() for part in parts])
        table.weight = nn.Parameter(rows, requires_grad=False)
        table.num_embeddings = tiles.num_slots
    return joined
