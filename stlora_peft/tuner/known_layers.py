"""Axis patterns of layers inside known classes of torch-geometric(-temporal), by class and attribute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import nn

from stlora_peft.tuner.node_bound import spec_of

_TGT = "torch_geometric_temporal.nn"
_PYG = "torch_geometric.nn.conv"
_ROWS = "... (b n) c"

# Looked up by class name, so that neither package is imported for it.
KNOWN_LAYOUTS: Final[Mapping[str, Mapping[str, str]]] = {
    f"{_TGT}.attention.stgcn.TemporalConv": dict.fromkeys(("conv_1", "conv_2", "conv_3"), "b c n t"),
    f"{_TGT}.recurrent.temporalgcn.TGCN": dict.fromkeys(("linear_z", "linear_r", "linear_h"), "(b n) c"),
    f"{_TGT}.recurrent.temporalgcn.TGCN2": dict.fromkeys(("linear_z", "linear_r", "linear_h"), "b n c"),
    f"{_PYG}.gcn_conv.GCNConv": {"lin": _ROWS},
    f"{_PYG}.cheb_conv.ChebConv": {"lins": _ROWS},
}


def layer_layout(model: nn.Module, node_layout: Mapping[str, str], key: str) -> str | None:
    """Axis pattern of the input of the layer ``key``: what the user says, else the backbone, else its known class.

    Args:
        model: The backbone.
        node_layout: What the user says: name of a layer, or its last parts, to a pattern.
        key: Full name of the layer.

    Returns:
        The pattern, or None where nobody says it.
    """
    spec = spec_of(model)
    for patterns in (node_layout, spec.node_layout if spec else {}):
        for name, pattern in patterns.items():
            if key == name or key.endswith(f".{name}"):
                return pattern
    return known_layout(model, key)


def known_layout(model: nn.Module, key: str) -> str | None:
    """Axis pattern of the layer ``key`` by the class of the module that holds it, or None.

    Args:
        model: The backbone.
        key: Full name of the layer; the number of a layer in a list is passed over (``conv.lins.0``).

    Returns:
        The pattern.
    """
    path = key.split(".")
    while path and path[-1].isdigit():
        path.pop()
    if not path:
        return None
    owner = model.get_submodule(".".join(path[:-1]))
    for cls in type(owner).__mro__:
        layouts = KNOWN_LAYOUTS.get(f"{cls.__module__}.{cls.__qualname__}", {})
        if path[-1] in layouts:
            return layouts[path[-1]]
    return None
