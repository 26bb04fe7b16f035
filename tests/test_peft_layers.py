"""PEFT's DoRA on the backbones, and the layers that it cannot follow."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from toys import Holder, assert_same, raised

from stlora_peft.backbones import Forecaster, new_backbone
from stlora_peft.data import CityData, adaptation_split, prepare, simulate_city
from stlora_peft.measurement import adapter_bytes
from stlora_peft.methods.peft_layers import dora_model, low_rank_refusal, peft_targets
from stlora_peft.training import TrainingOptions, train
from stlora_peft.tuner.spec import BackboneSpec

LAYERS = {"stgcn": 14, "agcrn": 1, "lstm": 1, "gwnet": 26}  # gwnet: without its 8 dilated convolutions


@pytest.fixture(scope="module")
def data() -> CityData:
    city = simulate_city(num_nodes=5, days=4, seed=0)
    return prepare(city, adaptation_split(city.num_steps, city.steps_per_day, days=1), window=12, horizon=12)


def forecast(model: nn.Module, data: CityData) -> Tensor:
    x = data.train.__getitems__([0, 40])["x"]
    with torch.no_grad():
        out: Tensor = model.eval()(x, data.edge_index, data.edge_weight)
    return out


def make(name: str, data: CityData) -> Forecaster:
    sizes = {"gwnet": {"skip_channels": 8, "end_channels": 8}}.get(name, {})
    return new_backbone(name, data, seed=0, **sizes)


class Layers(nn.Module):
    """A backbone with layers of these names."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def test_peft_targets_are_the_linear_layers_and_convolutions_among_the_targets() -> None:
    inner = Layers(conv=nn.Conv2d(2, 2, 1), head=nn.Linear(2, 2), rnn=nn.GRU(2, 2), line=nn.Conv1d(2, 2, 1))
    backbone = Layers(block=inner, head=nn.Linear(2, 2), overhead=nn.Linear(2, 2), other=nn.Linear(2, 2))
    spec = BackboneSpec(target_modules=("conv", "head", "rnn", "line"))
    assert peft_targets(backbone, spec) == ["block.conv", "block.head", "head"]


@pytest.mark.parametrize("name", LAYERS)
def test_dora_untrained_forecasts_as_the_backbone(data: CityData, name: str) -> None:
    backbone = make(name, data)
    model = dora_model(copy.deepcopy(backbone), backbone.stlora_spec)
    assert len(model.targeted_module_names) == LAYERS[name]
    assert_same(forecast(model, data), forecast(backbone, data), tolerance=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_dora_trains_its_own_tensors_and_node_bound_modules_only(data: CityData, name: str) -> None:
    backbone = make(name, data)
    model = dora_model(backbone, backbone.stlora_spec)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    result = train(model, data, TrainingOptions(max_epochs=1, progress=False, learning_rate=3e-3, ema_decay=0.0))
    assert result.best_epoch == 1
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    bound = {key for key in changed if ".modules_to_save." in key}
    parts = {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert {part for key in changed - bound for part in key.split(".")[-4:] if part.startswith("lora")} == parts
    assert all(".lora_" in key for key in changed - bound)
    assert bool(bound) is bool(backbone.stlora_spec.node_bound)
    assert adapter_bytes(model) > 0


def test_dora_of_a_linear_layer_matches_its_formula() -> None:
    torch.manual_seed(0)
    backbone = Holder(nn.Linear(4, 3).double())
    weight, bias = backbone.layer.weight.detach().clone(), backbone.layer.bias.detach()
    model = dora_model(backbone, BackboneSpec(target_modules=("layer",))).double()
    layer = model.base_model.model.layer
    with torch.no_grad():
        for parameter in (layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight):
            parameter.add_(torch.rand_like(parameter))
    A, B, m = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    assert A.shape == (8, 4)
    x, rows = torch.randn(5, 4, dtype=torch.float64), []
    for o in range(3):
        row = weight[o] + 16 / 8 * (B[o] @ A)
        rows.append(m[o] * row / row.norm())
    assert_same(model(x), x @ torch.stack(rows).T + bias)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(2, 2), None),
        (nn.GRU(2, 2), None),
        (nn.Conv2d(2, 2, (3, 1), stride=2, padding=1), None),
        (nn.Conv2d(2, 2, 1, dilation=3), None),
        (nn.Conv2d(2, 2, (2, 1), dilation=(2, 1)), "dilation=(2, 1)"),
        (nn.Conv2d(2, 2, (2, 1), dilation=(1, 2)), None),
        (nn.Conv2d(2, 2, 1, groups=2), "groups=2"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "padding_mode=circular"),
        (nn.Conv2d(2, 2, 3, dilation=2, groups=2), "dilation=(2, 2), groups=2"),
    ],
)
def test_low_rank_refusal_names_what_peft_leaves_out(layer: nn.Module, reason: str | None) -> None:
    assert low_rank_refusal(layer) == reason


@pytest.mark.parametrize("use_dora", [True, False])
def test_peft_update_of_a_dilated_convolution_has_the_wrong_length(use_dora: bool) -> None:
    """Why such a layer is refused; where this fails, PEFT has learned dilation and the refusal can go."""
    layer, x = nn.Conv2d(2, 2, (2, 1), dilation=(2, 1)), torch.randn(1, 2, 3, 5)
    assert layer(x).shape == (1, 2, 1, 5)
    model = get_peft_model(Holder(layer), LoraConfig(target_modules=["layer"], use_dora=use_dora))
    assert model(x).shape == (1, 2, 2, 5)


def test_dora_leaves_out_a_layer_whose_name_ends_with_that_of_another() -> None:
    backbone = Layers(conv=nn.Conv2d(2, 2, 1), block=Layers(conv=nn.Conv2d(2, 2, 2, dilation=2)))
    model = dora_model(backbone, BackboneSpec(target_modules=("conv",)))
    assert model.targeted_module_names == ["conv"]


def test_dora_without_a_layer_that_it_can_follow_raises_and_leaves_the_backbone() -> None:
    backbone = Layers(rnn=nn.GRU(3, 4), grouped=nn.Conv2d(4, 4, 1, groups=2), other=nn.Linear(4, 1))
    assert raised(lambda: dora_model(backbone, BackboneSpec(target_modules=("rnn", "grouped")))) == {
        "where": "dora finds nothing to adapt in backbone 'Layers'",
        "expected": "an nn.Linear among its target modules, or an nn.Conv2d without dilation, groups and padding mode",
        "got": "rnn (GRU), grouped (Conv2d with groups=2)",
        "fix": "leave dora out",
    }
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert raised(lambda: dora_model(backbone, BackboneSpec(target_modules=("absent",))))["got"] == "none of them"
