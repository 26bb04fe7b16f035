"""The updates of several layers that read the same input, computed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stlora_peft.tuner.layers import STLoraLayer

_RANK_AXIS = {"gate": 1, "node_bias": 1, "gate_map": 0, "node_bias_map": 0, "node_vector": 1}


def sibling_updates(layers: Sequence[nn.Module], z: Tensor) -> Tensor | None:
    r"""Compute what the adapters of several layers add to their outputs, side by side on the channel axis.

    .. math::
        \Bigl(\tfrac{\alpha}{r} B^{(1)} A_i^{(1)} z_i, \dots, \tfrac{\alpha}{r} B^{(m)} A_i^{(m)} z_i\Bigr)
        = \mathrm{diag}\bigl(\tfrac{\alpha}{r} B^{(1)}, \dots\bigr)
        \begin{bmatrix} A_i^{(1)} \\ \vdots \end{bmatrix} z_i

    Layers whose adapters are of one form are computed in one product each for :math:`A` and :math:`B`, with one mask
    of dropout for their input. Others are computed one by one.

    Args:
        layers: Layers of one kind and one input, each with adapters or without.
        z: Their input, as :meth:`STLoraLayer.update` takes it.

    Returns:
        The updates, or None where no layer has one.
    """
    adapted = [layer for layer in layers if isinstance(layer, STLoraLayer)]
    if len(adapted) == len(layers) and _alike(adapted):
        first, total = adapted[0], None
        for layer in adapted:
            layer.ran_with = layer.active_adapters
        for name in first.active_adapters:
            if name in first.nall_B:
                update = first.update_with(_joined(adapted, name), z, name)
                total = update if total is None else total + update
        return total
    found = [layer.active_update(z) if isinstance(layer, STLoraLayer) else None for layer in layers]
    some = next((update for update in found if update is not None), None)
    if some is None:
        return None
    axis = adapted[0].channel(z.ndim)
    pairs = zip(layers, found, strict=True)
    parts = [_zeros(some, axis, _width(layer)) if update is None else update for layer, update in pairs]
    return torch.cat(parts, axis)


def _alike(layers: Sequence[STLoraLayer]) -> bool:
    """Whether the active adapters of these layers can be computed in one."""
    first = layers[0]
    if any(layer.disable_adapters or layer.merged or layer.stack is not None for layer in layers):
        return False
    names = [name for name in first.active_adapters if name in first.nall_B]
    kinds = [[_kind(layer, name) for name in layer.active_adapters if name in layer.nall_B] for layer in layers]
    joinable = all(first.conditioning[name] != "core" for name in names)
    return joinable and all(None not in kind and kind == kinds[0] for kind in kinds)


def _kind(layer: STLoraLayer, name: str) -> tuple[Any, ...] | None:
    """What must be the same for two layers' adapters to be joined; None where a layer has not found its nodes yet."""
    form = layer.conditioning[name]
    if form != "shared" and name not in layer.layout:
        return None
    dropout = getattr(layer.nall_dropout[name], "p", 0.0)
    return name, type(layer), form, layer.layout.get(name), layer.in_shape, dropout, layer.nall_B[name].dtype


def _joined(layers: Sequence[STLoraLayer], name: str) -> dict[str, Tensor]:
    """Factors of several layers as those of one, whose rank is the sum of theirs."""
    each = [layer.scaled_factors(name) for layer in layers]
    axes = _RANK_AXIS | {"A": 1 if layers[0].conditioning[name] == "full" else 0}
    joined = {factor: torch.cat([own[factor] for own in each], axes[factor]) for factor in each[0] if factor != "B"}
    return joined | {"B": torch.block_diag(*(own["B"] for own in each))}


def _width(layer: nn.Module) -> int:
    """Output width of a layer, adapted or not."""
    if isinstance(layer, STLoraLayer):
        return layer.out_features
    return int(getattr(layer, "out_features", None) or getattr(layer, "out_channels"))  # noqa: B009


def _zeros(like: Tensor, axis: int, width: int) -> Tensor:
    """Nothing, with the axes of an update."""
    shape = list(like.shape)
    shape[axis] = width
    return like.new_zeros(shape)
