"""The node-specific predictor against a float64 loop over nodes, and when it is on."""

from __future__ import annotations

import copy
import logging

import pytest
import reference
import torch
from einops import rearrange
from peft import get_peft_model
from torch import Tensor, nn
from toys import (
    CONDITIONINGS,
    assert_same,
    assert_unchanged,
    call,
    leaves,
    raised,
    randomised,
    small_backbone,
    snapshot,
)

from stlora_peft import PredictorConfig, STLoraConfig
from stlora_peft.tuner.conditioning import factor_shapes

N, T, H, C_IN, C_OUT = 5, 6, 4, 3, 2
R, ALPHA, WIDTH = 2, 5, 7


class Line(nn.Module):
    """A backbone of our own: the last steps of the window, scaled, in any order of axes."""

    def __init__(self, input_layout: str = "b t n c", output_layout: str = "b t n c") -> None:
        super().__init__()
        self.lin = nn.Linear(C_IN, C_OUT).double()
        self.input_layout, self.output_layout = input_layout, output_layout

    def forward(self, window: Tensor, horizon: int = H) -> Tensor:
        x = rearrange(window, f"{self.input_layout} -> b t n c")
        return rearrange(self.lin(x[:, -horizon:]), f"b t n c -> {self.output_layout}")


def config(conditioning: str = "gate", **options: object) -> STLoraConfig:
    predictor = {"width": WIDTH, "window": T, "horizon": H, "in_channels": C_IN, "out_channels": C_OUT}
    predictor |= options.pop("predictor", {})
    defaults = {"r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "emb_size": 3, "node_layout": {"lin": "b t n c"}}
    return STLoraConfig(
        num_nodes=N,
        conditioning=conditioning,
        target_modules=["lin"],
        predictor=PredictorConfig(**predictor),
        **(defaults | options),
    )


def window() -> Tensor:
    x = torch.randn(2, T, N, C_IN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return x.requires_grad_()


def parts(model: nn.Module) -> tuple[dict[str, Tensor], Tensor | None]:
    """The predictor's tensors by name, and the node vectors."""
    start = "base_model.model.stlora_predictor.nall_predictor.default."
    named = dict(model.named_parameters())
    weights = {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}
    return weights, named.get("base_model.model.stlora_nodes.nall_emb.default")


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("layouts", [("b t n c", "b t n c"), ("b n c t", "b c t n")])
@pytest.mark.parametrize("options", [{}, {"r": 3, "num_layers": 1}, {"history_channels": 1}, {"history_channels": 9}])
def test_correction_and_gradients_match_per_node_loop(options, layouts, conditioning):
    sizes = {"input_layout": layouts[0], "output_layout": layouts[1]} | options
    node_layout = {"lin": "b t n c"}
    model = get_peft_model(Line(*layouts), config(conditioning, predictor=sizes, node_layout=node_layout)).eval()
    randomised(model)
    weights, emb = parts(model)
    layer = model.base_model.model.stlora_predictor
    x = window()
    forecast = torch.randn(2, H, N, C_OUT, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = layer(rearrange(x, f"b t n c -> {layouts[0]}"), rearrange(forecast, f"b t n c -> {layouts[1]}"))
    found = rearrange(found, f"{layouts[1]} -> b t n c")

    theirs, their_x = leaves(weights), window()
    vectors = None if emb is None else emb.detach().clone().requires_grad_()
    scale = reference.scale_of(ALPHA, options.get("r", R))
    layers, history = options.get("num_layers", 2), min(options.get("history_channels", C_OUT), C_IN)
    expected = forecast + reference.predictor_correction(
        their_x, forecast, theirs, conditioning, scale, layers, vectors, history
    )
    assert_same(found, expected)
    assert (found - forecast).abs().max() > 0.1

    (found**2).sum().backward()
    (expected**2).sum().backward()
    assert_same(x.grad, their_x.grad, 1e-11)
    for name, weight in weights.items():
        assert_same(weight.grad, theirs[name].grad, 1e-11)
    if emb is not None:
        assert_same(emb.grad, vectors.grad, 1e-11)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_forecast_is_backbone_plus_correction(conditioning):
    backbone = Line().requires_grad_(False)
    model = randomised(get_peft_model(copy.deepcopy(backbone), config(conditioning)).eval())
    weights, emb = parts(model)
    x = window()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lin.nall_B.default"):
                parameter.zero_()
        forecast = backbone(x)
        correction = reference.predictor_correction(x, forecast, weights, conditioning, ALPHA / R, 2, emb, C_OUT)
        assert_same(model(x), forecast + correction)
        with model.disable_adapter():
            assert torch.equal(model(x), forecast)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_correction_starts_as_exactly_zero_and_learns(conditioning):
    model = get_peft_model(Line(), config(conditioning))
    layer, x = model.base_model.model.stlora_predictor, window()
    forecast = torch.randn(2, H, N, C_OUT, dtype=torch.float64)
    correction = layer.nall_predictor["default"](x, forecast, lambda: parts(model)[1])
    assert torch.equal(correction, torch.zeros_like(forecast))
    (layer(x, forecast) - 1).abs().sum().backward()
    assert parts(model)[0]["weight_out"].grad.abs().max() > 0


def test_parameter_count_equals_the_formula():
    model = get_peft_model(Line(), config())
    inputs, outputs = T * C_OUT + (C_IN - C_OUT) + H * C_OUT, H * C_OUT

    def layer(width: int) -> int:
        shapes = factor_shapes("gate", r=R, num_nodes=N, in_shape=(WIDTH,), out_features=width, emb_size=0)
        assert shapes.keys() == {"A", "B", "gate", "node_bias"}
        return WIDTH * width + width + WIDTH + 2 * N * R + R * (WIDTH + width)

    count = sum(weight.numel() for weight in parts(model)[0].values())
    assert count == inputs * WIDTH + WIDTH + 2 * layer(WIDTH) + layer(outputs)


@pytest.mark.parametrize("dropout", [{"predictor": {"dropout": 0.5}}, {"predictor": {}, "lora_dropout": 0.5}])
def test_dropout_acts_in_training_only(dropout):
    model = randomised(get_peft_model(Line(), config(**dropout)))
    x = window()
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_rank_stabilised_scale_is_used():
    plain, stable = (randomised(get_peft_model(Line(), config(use_rslora=flag))) for flag in (False, True))
    scales = [model.base_model.model.stlora_predictor.nall_predictor["default"].scaling for model in (plain, stable)]
    assert scales == [ALPHA / R, ALPHA / R**0.5]


# -- when it is on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "stgcn"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_auto_is_on_for_known_backbones_and_off_for_plain_lora(name, conditioning):
    model = get_peft_model(small_backbone(name), STLoraConfig(num_nodes=5, conditioning=conditioning))
    found = model.peft_config["default"].predictor
    assert hasattr(model.base_model.model, "stlora_predictor") is (conditioning != "shared")
    if conditioning != "shared":
        assert (found.window, found.horizon, found.in_channels, found.out_channels) == (9, 4, 3, 1)
        assert (model.peft_config["default"].window, model.peft_config["default"].horizon) == (9, 4)


def test_auto_is_off_for_an_unknown_backbone_and_says_how_to_switch_it_on(caplog):
    with caplog.at_level(logging.WARNING, logger="stlora_peft"):
        model = get_peft_model(Line(), STLoraConfig(num_nodes=N, target_modules=["lin"]))
    assert not hasattr(model.base_model.model, "stlora_predictor")
    assert [record.message for record in caplog.records] == [
        "The node-specific predictor is off: the output layout of Line is not known. Switch it on with "
        "STLoraConfig(predictor=PredictorConfig(window=..., horizon=..., in_channels=..., out_channels=...))."
    ]


def test_none_is_off_without_a_word(caplog):
    model = get_peft_model(Line(), STLoraConfig(num_nodes=N, target_modules=["lin"], predictor=None))
    assert not hasattr(model.base_model.model, "stlora_predictor")
    assert not caplog.records


@pytest.mark.parametrize("missing", ["window", "horizon", "in_channels", "out_channels"])
def test_unknown_size_raises_before_anything_is_touched(missing):
    backbone = Line()
    before = snapshot(backbone)
    lines = raised(lambda: get_peft_model(backbone, config(predictor={missing: None})))
    assert lines == {
        "where": f"PredictorConfig.{missing} is not known",
        "expected": f"a backbone with an attribute '{missing}', or the number itself",
        "got": "neither",
        "fix": f"pass predictor=PredictorConfig({missing}=<number>, ...)",
    }
    assert_unchanged(backbone, before)


def test_sizes_come_from_the_backbones_attributes():
    backbone = Line()
    backbone.window, backbone.horizon, backbone.in_channels, backbone.out_channels = T, H, C_IN, C_OUT
    options = {"target_modules": ["lin"], "node_layout": {"lin": "b t n c"}}
    model = get_peft_model(backbone, STLoraConfig(num_nodes=N, predictor=PredictorConfig(), **options))
    assert model(window()).shape == (2, H, N, C_OUT)
    assert model.peft_config["default"].predictor.out_channels == C_OUT


@pytest.mark.parametrize("root", [nn.Sequential, nn.ModuleList])
def test_bare_container_is_refused_before_anything_is_touched(root):
    backbone = root([nn.Linear(C_IN, C_OUT)]) if root is nn.ModuleList else root(nn.Linear(C_IN, C_OUT))
    before = snapshot(backbone)
    sizes = PredictorConfig(window=T, horizon=T, in_channels=C_IN, out_channels=C_OUT)
    lines = raised(lambda: get_peft_model(backbone, STLoraConfig(num_nodes=N, target_modules=["0"], predictor=sizes)))
    assert lines["where"] == f"a {root.__name__} cannot hold node vectors or a predictor"
    assert lines["expected"] == "a backbone with a forward of its own"
    assert "wrap it in an nn.Module" in lines["fix"]
    assert_unchanged(backbone, before)


# -- calls --------------------------------------------------------------------------------------------------


def test_window_given_by_keyword_is_found():
    model = randomised(get_peft_model(Line(), config()).eval())
    assert torch.equal(model(window=window()), model(window()))


def test_forward_called_directly_on_the_peft_model_is_corrected_too():
    model = randomised(get_peft_model(Line(), config()).eval())
    assert torch.equal(model.forward(window()), model(window()))


WHERE = "stlora adapter 'default': the {} does not fit the node-specific predictor"
FIX = "use data of this window, horizon and number of nodes, or build the adapter for these sizes"


@pytest.mark.parametrize("shape", [(2, T + 1, N, C_IN), (2, T, N + 1, C_IN), (2, T, N, C_IN + 1), (T, N, C_IN)])
def test_window_of_another_size_raises(shape):
    model = get_peft_model(Line(), config())
    layer = model.base_model.model.stlora_predictor
    lines = raised(lambda: layer(torch.zeros(shape), torch.zeros(2, H, N, C_OUT)))
    assert lines == {
        "where": WHERE.format("window"),
        "expected": f"n={N}, t={T}, c={C_IN} in layout 'b t n c'",
        "got": f"shape {shape}",
        "fix": FIX,
    }


def test_forecast_of_another_horizon_raises():
    model = get_peft_model(Line(), config())
    lines = raised(lambda: model(window(), H - 1))
    assert lines == {
        "where": WHERE.format("forecast"),
        "expected": f"n={N}, t={H}, c={C_OUT} in layout 'b t n c'",
        "got": f"shape (2, {H - 1}, {N}, {C_OUT})",
        "fix": FIX,
    }


def test_forecast_that_is_no_tensor_raises():
    class Pair(Line):
        def forward(self, window: Tensor) -> tuple[Tensor, None]:
            return super().forward(window), None

    lines = raised(lambda: get_peft_model(Pair(), config())(window()))
    assert lines["where"] == WHERE.format("forecast")
    assert lines["got"] == "tuple"


def test_two_active_adapters_add_their_corrections():
    model = get_peft_model(Line(), config())
    model.add_adapter("second", config("core"))
    randomised(model).eval()
    x = window()
    frozen = model.base_model.model.stlora_predictor
    forecast = torch.randn(2, H, N, C_OUT, dtype=torch.float64)
    alone = []
    for name in ("default", "second"):
        model.set_adapter(name)
        alone.append(frozen(x, forecast) - forecast)
    model.base_model.set_adapter(["default", "second"])
    assert_same(frozen(x, forecast), forecast + alone[0] + alone[1])


def test_hook_goes_with_the_last_adapter():
    backbone = small_backbone("lstm").eval().requires_grad_(False)
    before, expected = snapshot(backbone), call(backbone, 5)
    model = randomised(get_peft_model(backbone, STLoraConfig(num_nodes=5)).eval())
    assert not torch.equal(call(model, 5), expected)
    unloaded = model.unload()
    assert unloaded is backbone
    assert_unchanged(unloaded, before)
    assert torch.equal(call(unloaded, 5), expected)
