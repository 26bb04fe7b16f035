"""The factors of many cities side by side, and the updates that they make in one batched product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.serving.tiles import Tiles
from stlora_peft.tuner.conditioning import condition
from stlora_peft.tuner.predictor import NodePredictor
from stlora_peft.tuner.products import nodewise

ADAPTER = "cities"
"""Name under which a layer keeps the layout of the cities' common node axis."""

FAMILIES: Final[Mapping[str, str]] = {
    "gate": "gate",
    "embedding": "gate",
    "bias": "gate",
    "core": "core",
    "full": "full",
    "shared": "shared",
}
"""Forms of conditioning that are the same computation once the node vectors have been read."""

_NODEWISE = ("core", "gate", "node_bias")


@dataclass(frozen=True, eq=False)
class Factors:
    """What a city's adapter has for one layer.

    Args:
        tensors: Factors by name, ``"B"`` among them.
        conditioning: How a node takes part.
        scaling: Scale of the update.
        layout: Axis pattern of the layer's input; None where the adapter does not know it yet.
    """

    tensors: Mapping[str, Tensor]
    conditioning: str
    scaling: float
    layout: str | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same for factors to be stacked."""
        family, up = FAMILIES[self.conditioning], self.tensors["B"]
        return family, tuple(up.shape), up.dtype, self.layout


def read_vectors(
    tensors: Mapping[str, Tensor], vectors: Tensor | None, num_nodes: int, in_shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """Factors without node vectors: gates and biases of each node in their place.

    Args:
        tensors: A layer's factors by name.
        vectors: Node vectors of ``"embedding"``, shape (N, emb_size).
        num_nodes: Number of nodes :math:`N`.
        in_shape: Input width of the layer, followed by the kernel for a convolution.

    Returns:
        The factors ``"A"`` and ``"B"``, and ``"core"``, or ``"gate"`` and ``"node_bias"``, where the form has them.
    """
    up = tensors["B"]
    if "node_vector" in tensors:
        ones, zeros = up.new_ones(num_nodes, up.shape[1]), up.new_zeros(up.shape[1], *in_shape)
        return {"A": zeros, "B": up, "gate": ones, "node_bias": tensors["node_vector"]}
    if "gate_map" in tensors:
        known = cast(Tensor, vectors).to(up.dtype)
        gate, bias = 1.0 + known @ tensors["gate_map"].mT, known @ tensors["node_bias_map"].mT
        return {"A": tensors["A"], "B": up, "gate": gate, "node_bias": bias}
    return dict(tensors)


class LayerStack(nn.Module):
    r"""Updates of one layer for all cities: node :math:`i` of city :math:`c` gets :math:`s_c B_c A_{c,i} z_i`.

    Each city keeps its own :math:`B_c` and :math:`A_c`. A product with them is one batched product over the tiles.

    Args:
        factors: The layer's factors in each city, all of one kind.
        vectors: Node vectors of each city, where it has them.
        tiles: Where the cities lie.
        in_shape: Input width of the layer, followed by the kernel for a convolution.
    """

    def __init__(
        self, factors: Sequence[Factors], vectors: Sequence[Tensor | None], tiles: Tiles, in_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.tiles = tiles
        self.nodewise = factors[0].conditioning == "full"
        known = zip(factors, vectors, tiles.sizes, strict=True)
        read = [read_vectors(each.tensors, rows, size, in_shape) for each, rows, size in known]
        down = [tensors["A"] for tensors in read]
        self.register_buffer("down", tiles.join(down) if self.nodewise else torch.stack(down))
        scaled = [tensors["B"] * each.scaling for tensors, each in zip(read, factors, strict=True)]
        self.register_buffer("up", torch.stack(scaled))
        self.names = [name for name in _NODEWISE if name in read[0]]
        for name in self.names:
            self.register_buffer(name, tiles.join([tensors[name] for tensors in read]))

    def forward(self, layer: Any, z: Tensor) -> Tensor:
        """Compute the update of a layer.

        Args:
            layer: The :class:`stlora_peft.tuner.layers.STLoraLayer` that the update belongs to.
            z: What the update reads, in the layer's layout, all cities on its node axis.

        Returns:
            Tensor to be added to the wrapped layer's output.
        """
        down, up = cast(Tensor, self.down), cast(Tensor, self.up)
        z, slots = z.to(up.dtype), self.tiles.num_slots
        layout = layer._checked_layout(z, ADAPTER)
        _, node, channel = layout.split(z, slots)
        u = layer._down_full(z, down if self.nodewise else self.tiles.matrices(down), layout, slots)
        u = condition(u, {name: cast(Tensor, getattr(self, name)) for name in self.names}, None, node, channel)
        out = nodewise(u, self.tiles.matrices(up), node, channel)
        axis = layout.node_axis(z.ndim)
        return out.flatten(axis, axis + 1) if layout.folded else out


class PredictorStack(NodePredictor):
    """The node-specific predictors of all cities as one network on their common node axis.

    Args:
        predictors: The predictor of each city, all of one kind.
        vectors: Node vectors of each city, where it has them.
        tiles: Where the cities lie.
    """

    def __init__(self, predictors: Sequence[NodePredictor], vectors: Sequence[Tensor | None], tiles: Tiles) -> None:
        nn.Module.__init__(self)  # the parameters are not new ones
        first = predictors[0]
        self.predictor, self.config = first.predictor, first.config
        self.r, self.width = first.r, first.width
        self.history_channels = first.history_channels
        self.scaling = 1.0  # it differs from city to city, so it is part of B
        self.tiles = tiles
        self.nodewise = (*_NODEWISE, "A") if first.config.conditioning == "full" else _NODEWISE
        layers = [*map(str, range(self.predictor.num_layers)), "out"]
        for name in ("weight_in", "bias_in", *(f"{key}_{k}" for k in layers for key in ("weight", "bias", "norm"))):
            self.register_buffer(name, torch.stack([each._tensor(name).detach() for each in predictors]))
        for layer in layers:
            self._stack_factors(layer, predictors, vectors)

    def _stack_factors(
        self, layer: str, predictors: Sequence[NodePredictor], vectors: Sequence[Tensor | None]
    ) -> None:
        """Register the factors of one node-adaptive layer."""
        read = []
        for each, rows, size in zip(predictors, vectors, self.tiles.sizes, strict=True):
            tensors = {key: each._tensor(f"{key}_{layer}").detach() for key in each.factor_names}
            factors = read_vectors(tensors, rows, size, (self.width,))
            read.append(factors | {"B": factors["B"] * each.scaling})
        self.factor_names = tuple(read[0])
        for key in self.factor_names:
            values = [factors[key] for factors in read]
            joined = self.tiles.join(values) if key in self.nodewise else torch.stack(values)
            self.register_buffer(f"{key}_{layer}", joined)

    def _tensor(self, name: str) -> Tensor:
        """Look up a tensor: matrices tile by tile, everything else slot by slot."""
        value, key = super()._tensor(name), name.rpartition("_")[0]
        if key in self.nodewise:
            return value
        return self.tiles.matrices(value) if key in ("weight", "A", "B") else self.tiles.entries(value)

    def _activated(self, h: Tensor, name: str) -> Tensor:
        return F.leaky_relu(F.rms_norm(h, h.shape[-1:]) * self._tensor(f"norm_{name}").to(h.dtype), 0.1)

    def _affine(self, h: Tensor, name: str) -> Tensor:
        return self._product(h, self._tensor(f"weight_{name}")) + self._tensor(f"bias_{name}")
