"""Which tensors an adapter has on a backbone, compared with those that were saved, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from stlora_peft.errors import message
from stlora_peft.tuner.conditioning import factor_shapes
from stlora_peft.tuner.config import PredictorConfig, STLoraConfig
from stlora_peft.tuner.hosts import layer_sizes
from stlora_peft.tuner.identity import base_tensors
from stlora_peft.tuner.node_bound import adapted_module
from stlora_peft.tuner.nodes import TABLE_ATTRIBUTE
from stlora_peft.tuner.predictor import ATTRIBUTE, NodePredictor

_ROOT = "base_model.model."
_MARK = ".nall_"

Shapes = dict[str, tuple[int, ...]]


def expected_tensors(
    config: STLoraConfig, layers: Mapping[str, tuple[nn.Module, int]], node_bound: Mapping[str, nn.Module]
) -> Shapes:
    """Shapes of an adapter's own tensors by the names that they are saved under.

    Args:
        config: Configuration with every default filled in.
        layers: Name to layer and rank.
        node_bound: Name to node-bound module.

    Returns:
        Name to shape.
    """
    shapes: Shapes = {}
    num_nodes = config.num_nodes or 0
    for key, (layer, r) in layers.items():
        in_shape, out_features = layer_sizes(layer)
        for name, shape in factor_shapes(
            config.conditioning,
            r=r,
            num_nodes=num_nodes,
            in_shape=in_shape,
            out_features=out_features,
            emb_size=config.emb_size,
        ).items():
            shapes[f"{key}{_MARK}{name}"] = shape
    if config.conditioning == "embedding":
        shapes[f"{TABLE_ATTRIBUTE}{_MARK}emb"] = (num_nodes, config.emb_size)
    if isinstance(config.predictor, PredictorConfig):
        predictor = NodePredictor(config.predictor, config, torch.empty(0, device="meta"))
        for name, parameter in predictor.named_parameters():
            shapes[f"{ATTRIBUTE}{_MARK}predictor.{name}"] = tuple(parameter.shape)
    for key, module in node_bound.items():
        made = adapted_module(module, num_nodes, key, whole=not config.freeze_backbone)
        for name, value in made.state_dict().items():
            shapes[f"{key}{_MARK}node_bound.{name}"] = tuple(value.shape)
    return shapes


def check_tensors(backbone: nn.Module, saved: Mapping[str, list[int]], expected: Shapes, adapter_name: str) -> None:
    """Raise unless the saved tensors are those that the adapter will have on this backbone.

    Args:
        backbone: The backbone, with or without other adapters.
        saved: Name to shape of the saved tensors.
        expected: From :func:`expected_tensors`.
        adapter_name: Name of the adapter, for the error.

    Raises:
        ValueError: Naming the first tensor that does not fit.
    """
    first: dict[int, str] = {}
    # A layer under two parents is saved under both names.
    names = {name: first.setdefault(id(m), name) for name, m in backbone.named_modules(remove_duplicate=False)}
    base = dict(base_tensors(backbone))
    found: Shapes = {}
    wanted = dict(expected)
    for key, shape in saved.items():
        path, mark, rest = key.removeprefix(_ROOT).partition(_MARK)
        name = f"{names.get(path, path)}{mark}{rest}"
        found[name] = tuple(shape)
        if not mark and path in base:  # modules_to_save
            wanted[name] = tuple(base[path].shape)
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            _refuse(adapter_name, f"'{_ROOT}{name}'", wanted.get(name), found.get(name))


def _refuse(adapter_name: str, name: str, wanted: tuple[int, ...] | None, found: tuple[int, ...] | None) -> None:
    raise ValueError(
        message(
            f"stlora adapter '{adapter_name}' does not fit its configuration or this backbone",
            expected=f"no tensor {name}" if wanted is None else f"{name} of shape {wanted}",
            got="no such tensor" if found is None else f"shape {found}",
            fix="copy adapter_config.json and adapter_model.safetensors of one adapter into the folder; to make a new "
            "adapter from a saved configuration, set its tensors to None",
        )
    )
