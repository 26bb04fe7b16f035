"""Small backbones, cities and adapters that the tests of the tuner share."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from stlora_peft import STLoraConfig
from stlora_peft.backbones import BACKBONES as ALL_BACKBONES
from stlora_peft.backbones import build_backbone

torch.set_num_threads(1)  # ten times faster on tensors as small as these

CONDITIONINGS = ("gate", "core", "full", "embedding", "bias", "shared")
BACKBONES = ("lstm", "stgcn")
NODES = {"num_nodes": 5}
NARROW = {"hidden_channels": 4}
SIZES: dict[str, dict[str, Any]] = dict.fromkeys(ALL_BACKBONES, NARROW) | {
    "lstm": {"hidden_size": 6},
    "stgcn": NODES | NARROW | {"head_channels": 6},
    "agcrn": NODES | NARROW | {"emb_size": 3},
    "aagcn": NODES | {"hidden_channels": 8},
    "astgcn": NODES | NARROW,
    "dnntsp": NODES | NARROW | {"heads": 2},
    "gman": NODES | {"heads": 2, "head_size": 8, "steps_per_day": 24},
    "mtgnn": NODES | NARROW | {"skip_channels": 3, "end_channels": 6, "num_layers": 2, "neighbours": 3, "emb_size": 4},
    "gwnet": NODES | NARROW | {"skip_channels": 3, "end_channels": 6, "num_blocks": 2, "num_layers": 2, "emb_size": 4},
    "staeformer": NODES | NARROW | {"emb_size": 6, "num_layers": 1, "heads": 2, "steps_per_day": 24},
    "d2stgnn": NODES | NARROW | {"forecast_channels": 6, "head_channels": 6, "num_layers": 2, "heads": 2},
}
"""Sizes of a narrow network of each class, beside those that all have."""


class Holder(nn.Module):
    """A backbone of one layer, called ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(x, *args, **kwargs)


def adapted(layer: nn.Module, num_nodes: int | None, **options: Any) -> PeftModel:
    """A one-layer backbone in float64 with an adapter without predictor, every factor random."""
    defaults = {"conditioning": "gate", "r": 2, "lora_alpha": 5, "lora_dropout": 0.0, "emb_size": 3, "predictor": None}
    options = {"target_modules": ["layer"]} | defaults | options
    model = get_peft_model(Holder(layer.double()).eval(), STLoraConfig(num_nodes=num_nodes, **options))
    return randomised(model.eval())


def randomised(model: PeftModel, seed: int = 1) -> PeftModel:
    """Give every parameter of the adapters a random value, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "nall_" in name and "nall_node_bound" not in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.5 * noise)
    return model


def factors_of(model: PeftModel, path: str = "base_model.model.layer", adapter: str = "default") -> dict[str, Tensor]:
    """The factors of one layer by name, and the node vectors as ``emb``: the model's own tensors, not copies."""
    found = {}
    for name, parameter in model.named_parameters():
        if match := re.fullmatch(rf"{re.escape(path)}\.nall_(\w+)\.{adapter}", name):
            found[match[1]] = parameter
        if name.endswith(f"stlora_nodes.nall_emb.{adapter}"):
            found["emb"] = parameter
    return found


def leaves(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float64 copies that collect gradients of their own."""
    return {name: value.detach().double().clone().requires_grad_() for name, value in factors.items()}


def graph(num_nodes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A connected symmetric graph without self-loops that no relabelling maps onto itself, and its weights."""
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.arange(num_nodes)
    pairs = torch.stack([nodes[:-1], nodes[1:]])
    if num_nodes > 3:
        pairs = torch.cat([pairs, torch.tensor([[0, 0], [2, 3]])], dim=1)
    weight = 0.2 + torch.rand(pairs.shape[1], generator=generator, dtype=torch.float64)
    return torch.cat([pairs, pairs.flip(0)], dim=1), torch.cat([weight, weight])


def small_backbone(name: str, num_nodes: int = 5, seed: int = 0, **options: Any) -> nn.Module:
    """A narrow backbone of the package in float32, its normalisation statistics those of a used network."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"in_channels": 3, "window": 9, "horizon": 4} | SIZES[name]
    if "num_nodes" in sizes:
        sizes["num_nodes"] = num_nodes
    backbone = build_backbone(name, **(sizes | options))
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for value in (module.weight, module.bias, module.running_mean, module.running_var):
                    value.add_(torch.rand_like(value))
    return backbone


def windows(num_nodes: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Input of :func:`small_backbone`, ``b t n c``."""
    return torch.randn(batch, 9, num_nodes, 3, generator=torch.Generator().manual_seed(seed))


def call(model: nn.Module, num_nodes: int, **options: Any) -> Tensor:
    """Forecast of a backbone, adapted or not, for the windows and the graph of ``num_nodes`` nodes."""
    edge_index, edge_weight = graph(num_nodes)
    out: Tensor = model(windows(num_nodes, **options), edge_index, edge_weight.float())
    return out


def snapshot(model: nn.Module) -> tuple[dict[str, type], dict[str, Tensor], set[str]]:
    """Module classes, tensors and trainable names of a model, to compare before and after."""
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: value.clone() for name, value in model.state_dict().items()},
        {name for name, parameter in model.named_parameters() if parameter.requires_grad},
    )


def assert_unchanged(model: nn.Module, before: tuple[dict[str, type], dict[str, Tensor], set[str]]) -> None:
    """Fail unless ``model`` has the modules, tensors, trainable names and hooks of the snapshot."""
    classes, tensors, trainable = snapshot(model)
    assert classes == before[0]
    assert trainable == before[2]
    assert tensors.keys() == before[1].keys()
    for name, value in tensors.items():
        assert torch.equal(value, before[1][name]), f"'{name}' changed"
    assert not model._forward_hooks, "a hook was left behind"
    assert not hasattr(model, "peft_config"), "peft_config was left behind"


def largest(x: Tensor) -> float:
    """Largest magnitude in a tensor, 1 at least."""
    return max(1.0, *x.detach().abs().flatten().tolist(), 0.0)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Fail unless two whole tensors agree to ``tolerance``, relative to the largest entry."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest(expected))


def error_lines(error: BaseException) -> dict[str, str]:
    """An error message as its four parts: where, expected, got, fix."""
    where, *rest = str(error).split("\n")
    labels = ("  expected: ", "  got:      ", "  to fix:   ")
    assert len(rest) == 3, f"not four lines: {error}"
    assert all(line.startswith(label) for line, label in zip(rest, labels, strict=True)), f"not labelled: {error}"
    parts = [line.removeprefix(label) for line, label in zip(rest, labels, strict=True)]
    assert where.endswith("."), f"no full stop: {where}"
    return dict(zip(("where", "expected", "got", "fix"), (where[:-1], *parts), strict=True))


def raised(action: Callable[[], Any], kind: type[Exception] = ValueError) -> dict[str, str]:
    """The four lines of the error that ``action`` raises."""
    try:
        action()
    except kind as error:
        return error_lines(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def pristine(backbone: nn.Module) -> nn.Module:
    """A copy with the same weights, as if loaded from its file."""
    return copy.deepcopy(backbone)
