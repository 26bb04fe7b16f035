"""Updates of several layers computed together, against each layer's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from toys import CONDITIONINGS, assert_same, randomised

from stlora_peft import STLoraConfig
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.siblings import sibling_updates

B, T, N, C = 2, 6, 5, 3
NAMES = ("first", "second", "third")


class Siblings(nn.Module):
    """Three layers of one input, their outputs side by side."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        for name, width in zip(NAMES, (4, 2, 3), strict=True):
            layer = nn.Linear(C, width) if kind == "linear" else nn.Conv2d(C, width, (1, 3))
            setattr(self, name, layer)

    def layers(self) -> list[Any]:
        return [getattr(self, name) for name in NAMES]

    def view(self, x: Tensor) -> Tensor:
        return x if self.kind == "linear" else x.permute(0, 3, 2, 1)  # [b c n t], its memory [b t n c]

    def forward(self, x: Tensor) -> Tensor:
        z = self.view(x)
        return torch.cat([layer(z) for layer in self.layers()], -1 if self.kind == "linear" else 1)


def adapted(kind: str, conditioning: str, targets: Sequence[str] = NAMES, **options: Any) -> Any:
    layout = "b t n c" if kind == "linear" else "b c n t"
    config = STLoraConfig(
        num_nodes=N,
        conditioning=conditioning,
        target_modules=list(targets),
        predictor=None,
        node_layout=dict.fromkeys(targets, layout),
        rank_pattern={"second": 3},
        **options,
    )
    torch.manual_seed(0)
    model = Siblings(kind).double()
    return randomised(get_peft_model(model, config)).eval()


def parts(model: Any) -> tuple[Siblings, Tensor, Tensor]:
    siblings = model.base_model.model
    x = torch.randn(B, T, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return siblings, x, siblings.view(x)


def one_by_one(siblings: Siblings, z: Tensor) -> Tensor:
    axis = -1 if siblings.kind == "linear" else 1
    found = []
    for layer in siblings.layers():
        base = layer.base_layer if isinstance(layer, STLoraLayer) else layer
        found.append(layer(z) - base(z))
    return torch.cat(found, axis)


def gradients(model: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"x": x}
    return dict(zip(named, torch.autograd.grad((y * weight).sum(), list(named.values())), strict=True))


def products(siblings: Siblings, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that make a product with B from here on."""
    calls: list[str] = []
    for layer in siblings.layers():
        if isinstance(layer, STLoraLayer):
            up = layer._up
            monkeypatch.setattr(layer, "_up", lambda u, w, up=up, name=layer.name: (calls.append(name), up(u, w))[1])
    return calls


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_joined_updates_and_gradients_are_those_of_each_layer(
    kind: str, conditioning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(kind, conditioning)
    siblings, x, z = parts(model)
    expected = one_by_one(siblings, z)
    wanted = gradients(model, x, expected)
    calls = products(siblings, monkeypatch)
    update = sibling_updates(siblings.layers(), z)
    assert calls == (list(NAMES) if conditioning == "core" else ["first"])
    assert_same(update, expected)
    found = gradients(model, x, update)
    for name, value in wanted.items():
        assert_same(found[name], value)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_layer_without_an_adapter_adds_nothing(kind: str) -> None:
    siblings, _, z = parts(adapted(kind, "gate", targets=["first", "third"]))
    update = sibling_updates(siblings.layers(), z)
    assert_same(update, one_by_one(siblings, z))
    assert not update.narrow(-1 if kind == "linear" else 1, 4, 2).any()


def test_layers_that_have_not_found_their_nodes_yet_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = STLoraConfig(num_nodes=N, target_modules=list(NAMES), predictor=None)
    model = randomised(get_peft_model(Siblings("linear").double(), config)).eval()
    siblings, _, z = parts(model)
    calls = products(siblings, monkeypatch)
    first, second = (sibling_updates(siblings.layers(), z) for _ in range(2))
    assert calls == [*NAMES, "first"]
    assert_same(second, first)


def test_several_active_adapters_add_up() -> None:
    model = adapted("linear", "gate")
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    randomised(model).eval()
    siblings, _, z = parts(model)
    assert_same(sibling_updates(siblings.layers(), z), one_by_one(siblings, z))


def test_layers_of_different_active_adapters_are_computed_one_by_one() -> None:
    model = adapted("linear", "gate", targets=["first", "second"])
    config = copy.deepcopy(model.peft_config["default"])
    config.target_modules, config.conditioning = {"second", "third"}, "bias"
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    randomised(model).eval()
    siblings, _, z = parts(model)
    assert_same(sibling_updates(siblings.layers(), z), one_by_one(siblings, z))


def test_nothing_where_no_adapter_is_in_force() -> None:
    model = adapted("linear", "shared")
    siblings, _, z = parts(model)
    assert sibling_updates(Siblings("linear").layers(), z) is None
    with model.disable_adapter():
        assert sibling_updates(siblings.layers(), z) is None
    model.merge_adapter()
    assert sibling_updates(siblings.layers(), z) is None


def test_siblings_have_one_mask_of_dropout() -> None:
    model = adapted("linear", "shared", lora_dropout=0.5).train()
    siblings, _, z = parts(model)
    for layer in siblings.layers():
        torch.nn.init.ones_(layer.nall_A["default"])
        torch.nn.init.ones_(layer.nall_B["default"])
    first, second, third = sibling_updates(siblings.layers(), z).split([4, 2, 3], -1)
    scales = [layer.scaling["default"] * layer.r["default"] for layer in siblings.layers()]
    alone = sibling_updates(siblings.layers()[:1], z)
    assert_same(first[..., 0] / scales[0], second[..., 0] / scales[1])
    assert_same(first[..., 0] / scales[0], third[..., 0] / scales[2])
    assert not torch.allclose(alone, first)
