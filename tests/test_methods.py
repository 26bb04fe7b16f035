from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small_city import small_city, small_data
from torch import nn
from toys import raised

from stlora_peft.backbones import Forecaster, build_backbone
from stlora_peft.data import CityData
from stlora_peft.evaluation import evaluate
from stlora_peft.methods import METHODS, Candidate, build_adapter, find_methods, frugal
from stlora_peft.methods.candidates import FEW_LAYERS, FRUGAL
from stlora_peft.tuner.spec import BackboneSpec

BUILT = [name for name, method in METHODS.items() if method.build is not None]
TRAINED = [name for name in BUILT if METHODS[name].trained]


@pytest.fixture(scope="module")
def data() -> CityData:
    return small_data(small_city(num_nodes=5))


def make(name: str) -> Forecaster:
    torch.manual_seed(0)
    if name == "lstm":
        return build_backbone("lstm", in_channels=3, hidden_size=4)
    backbone = build_backbone("stgcn", num_nodes=3, in_channels=3, hidden_channels=4, head_channels=4)
    with torch.no_grad():
        backbone.block1._batch_norm.running_mean += torch.arange(3.0)
    return backbone


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("backbone", ["lstm", "stgcn"])
@pytest.mark.parametrize("method", BUILT)
def test_build_gives_a_model_of_the_city_and_leaves_the_backbone(data: CityData, backbone: str, method: str) -> None:
    pristine = make(backbone)
    candidate = METHODS[method].build(pristine, data)
    batch = data.train.__getitems__([0, 1])["x"]
    assert candidate.model(batch, data.edge_index, data.edge_weight).shape == (2, 12, 5, 1)
    for name, value in make(backbone).state_dict().items():
        assert torch.equal(pristine.state_dict()[name], value), name
    assert all(parameter.requires_grad for parameter in pristine.parameters())


@pytest.mark.parametrize("method", [name for name in TRAINED if name not in ("full", "scratch")])
def test_build_starts_every_trained_method_from_the_same_forecast(data: CityData, method: str) -> None:
    full = METHODS["full"].build(make("stgcn"), data).model
    other = METHODS[method].build(make("stgcn"), data).model
    assert evaluate(other, data.val, data).mae == pytest.approx(evaluate(full, data.val, data).mae, rel=1e-5)


def test_zero_shot_keeps_the_mean_statistics_and_the_others_re_estimate_them(data: CityData) -> None:
    zero, full = (METHODS[name].build(make("stgcn"), data).model for name in ("zero-shot", "full"))
    assert torch.equal(zero.block1._batch_norm.running_mean, torch.ones(5))
    assert not torch.equal(full.block1._batch_norm.running_mean, torch.ones(5))


def test_head_trains_head_and_node_bound_modules_only(data: CityData) -> None:
    names = trainable(METHODS["head"].build(make("stgcn"), data).model)
    assert names == {
        f"{module}.{kind}"
        for module in ("block1._batch_norm", "block2._batch_norm", "head.hidden", "head.output")
        for kind in ("weight", "bias")
    }


def test_norm_trains_normalisation_layers_biases_and_node_bound_modules_only(data: CityData) -> None:
    names = trainable(METHODS["norm"].build(make("stgcn"), data).model)
    every = {name for name, _ in make("stgcn").named_parameters()}
    assert names == {name for name in every if name.endswith("bias") or "_batch_norm" in name}
    recurrent = trainable(METHODS["norm"].build(make("lstm"), data).model)
    assert recurrent == {"lstm.bias_ih_l0", "lstm.bias_hh_l0", "head.bias"}


def test_ia3_scales_the_linear_and_convolution_targets_and_copies_what_is_bound(data: CityData) -> None:
    candidate = METHODS["ia3"].build(make("stgcn"), data)
    assert candidate.implementation == "peft.IA3Config on 14 linear and convolution layers"
    names = trainable(candidate.model)
    scaled = {name for name in names if "ia3_l" in name}
    assert len(scaled) == 14
    assert names - scaled == {
        f"base_model.model.{block}._batch_norm.modules_to_save.default.{kind}"
        for block in ("block1", "block2")
        for kind in ("weight", "bias")
    }


def test_ia3_without_a_layer_that_peft_takes_is_refused(data: CityData) -> None:
    class Recurrent(nn.Module):
        stlora_spec = BackboneSpec(target_modules=("rnn",))

        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 1)

    assert raised(lambda: METHODS["ia3"].build(Recurrent(), data)) == {
        "where": "ia3 finds nothing to scale in backbone 'Recurrent'",
        "expected": "an nn.Linear or nn.Conv2d among its target modules, all that PEFT's IA3 takes",
        "got": "rnn",
        "fix": "leave ia3 out",
    }


def test_scratch_has_the_citys_nodes_and_random_weights_that_follow_from_the_seed(data: CityData) -> None:
    pristine, found = make("stgcn"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = METHODS["scratch"].build(pristine, data).model
        assert trainable(model) == {name for name, _ in model.named_parameters()}
        assert model.hyperparameters == pristine.hyperparameters | {"num_nodes": 5}
        found.append(model.head.hidden.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], pristine.head.hidden.weight)
    error = raised(lambda: METHODS["scratch"].build(nn.Linear(3, 1), data))
    assert error["where"] == "backbone 'Linear' cannot be built anew"


def test_full_st_lora_trains_backbone_and_adapter_but_not_what_the_adapters_copies_replace(data: CityData) -> None:
    names = trainable(METHODS["full+st-lora"].build(make("stgcn"), data).model)
    adapter = trainable(METHODS["st-lora"].build(make("stgcn"), data).model)
    assert adapter < names
    own = {name.replace("base_layer.", "").removeprefix("base_model.model.") for name in names - adapter}
    assert own == {name for name, _ in make("stgcn").named_parameters() if "_batch_norm" not in name}


def test_full_trains_everything(data: CityData) -> None:
    model = METHODS["full"].build(make("stgcn").requires_grad_(False), data).model
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_lora_says_which_implementation_it_is(data: CityData) -> None:
    candidate = METHODS["lora"].build(make("stgcn"), data)
    assert candidate.implementation == 'STLoraConfig(conditioning="shared", predictor=None)'
    config = candidate.model.peft_config["default"]
    assert (config.conditioning, config.r, config.lora_alpha, config.lora_dropout) == ("shared", 8, 16, 0.0)


def test_lora_is_pefts_own_where_peft_accepts_every_target(data: CityData) -> None:
    class Linears(nn.Module):
        from stlora_peft.tuner.spec import BackboneSpec

        stlora_spec = BackboneSpec(target_modules=("hidden", "head"), head=("head",))

        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, *edges: torch.Tensor) -> torch.Tensor:
            return self.head(self.hidden(x))

    candidate = METHODS["lora"].build(Linears(), data)
    assert candidate.implementation == "peft.LoraConfig"
    config = candidate.model.peft_config["default"]
    assert str(config.peft_type.value) == "LORA"
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.0)
    assert all("lora_" in name for name in trainable(candidate.model))


def test_lora_is_not_pefts_where_its_update_of_a_convolution_has_another_length(data: CityData) -> None:
    sizes = {"num_nodes": 5, "in_channels": 3, "hidden_channels": 4, "skip_channels": 3, "end_channels": 6}
    candidate = METHODS["lora"].build(build_backbone("gwnet", **sizes), data)
    assert candidate.implementation == 'STLoraConfig(conditioning="shared", predictor=None)'
    batch = data.train.__getitems__([0])["x"]
    assert candidate.model(batch, data.edge_index, data.edge_weight).shape == (1, 12, 5, 1)


def test_full_with_node_embedding_trains_the_backbone_and_a_vector_of_each_node_behind_every_target(
    data: CityData,
) -> None:
    candidate = METHODS["full+node-embedding"].build(make("stgcn"), data)
    names = {name.removeprefix("base_model.model.") for name in trainable(candidate.model)}
    vectors = {name.partition(".nall_")[0] for name in names if name.endswith("nall_node_vector.default")}
    assert len(vectors) == 16  # of two blocks: 2 x 3 convolutions and a graph convolution each; 2 of the head
    assert names >= {f"{layer}.nall_B.default" for layer in vectors}
    assert not any("nall_A" in name or "stlora_predictor" in name for name in names)
    own = {name.replace("base_layer.", "") for name in names if "nall_" not in name}
    assert own == {name for name, _ in make("stgcn").named_parameters() if "_batch_norm" not in name}
    sizes = {tuple(p.shape) for n, p in candidate.model.named_parameters() if n.endswith("nall_node_vector.default")}
    assert sizes == {(5, 32)}


def test_predictor_alone_trains_nothing_inside_the_backbone_but_what_is_bound_to_the_nodes(
    data: CityData, tmp_path: Path
) -> None:
    candidate = METHODS["st-lora-predictor"].build(make("stgcn"), data)
    names = {name.removeprefix("base_model.model.") for name in trainable(candidate.model)}
    assert {name.partition(".")[0] for name in names} == {"stlora_predictor", "stlora_nodes", "block1", "block2"}
    assert all("nall_node_bound" in name for name in names if name.startswith("block"))
    with torch.no_grad():
        for name, parameter in candidate.model.named_parameters():
            if "stlora_predictor" in name:
                parameter.add_(0.1)
    candidate.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("stgcn"), tmp_path)
    batch = data.train.__getitems__([0])["x"]
    expected, found = (m.eval()(batch, data.edge_index, data.edge_weight) for m in (candidate.model, loaded))
    assert torch.equal(found, expected)


def test_frugal_adapter_has_rank_one_and_a_narrow_predictor(data: CityData) -> None:
    model = METHODS["st-lora-frugal"].build(make("lstm"), data).model
    assert {name.split(".")[2] for name in trainable(model)} == {"lstm", "head", "stlora_predictor", "stlora_nodes"}
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers = (4 + 4) + (4 + 12) + 2 * 2 * 8  # the LSTM's state, the head, and two maps of the node vectors in each
    hidden, out = (16 * width + width + 16 + 2 * 16 + width * 2 + 2 * 2 * 8 for width in (16, 12))
    assert count == layers + (12 + 2 + 12 + 1) * 16 + hidden + out + 8 * 5


def test_frugal_adapter_has_the_layers_that_a_backbone_names_for_it_or_all(data: CityData) -> None:
    backbone = build_backbone("gwnet", num_nodes=9, in_channels=3)
    assert frugal(backbone) == FRUGAL
    backbone.stlora_spec = replace(backbone.stlora_spec, frugal=("skip_conv",))
    assert frugal(backbone) == {**FEW_LAYERS, "target_modules": ["skip_conv"]}
    assert frugal(nn.Linear(3, 2)) == FRUGAL


@pytest.mark.parametrize(("name", "layer"), [("d2stgnn", "forecast"), ("staeformer", "attention")])
def test_frugal_adapter_of_a_large_backbone_is_a_hundredth_of_it(data: CityData, name: str, layer: str) -> None:
    backbone = build_backbone(name, num_nodes=9, in_channels=3)
    candidate = METHODS["st-lora-frugal"].build(backbone, data)
    names = trainable(candidate.model) - {"base_model.model.stlora_nodes.nall_emb.default"}
    assert names
    assert all(layer in name for name in names)
    count = sum(parameter.numel() for parameter in candidate.model.parameters() if parameter.requires_grad)
    assert count < 0.01 * sum(parameter.numel() for parameter in backbone.parameters())
    assert "freeze_node_bound=True" in candidate.implementation


def test_recipe_counts_a_later_setting_only_where_it_is_changed(data: CityData) -> None:
    adapters = [build_adapter(make("stgcn"), data, freeze_node_bound=frozen) for frozen in (False, False, True)]
    for adapter in adapters:
        adapter.requires_grad_(False)  # what is trained counts too
    later = adapters[1].peft_config["default"]
    to_dict = later.to_dict
    later.to_dict = lambda: {k: v for k, v in to_dict().items() if k != "freeze_node_bound"}  # as it was before
    first, before, frozen = (Candidate(adapter, "adapter").recipe for adapter in adapters)
    assert first == before != frozen


def test_every_form_of_st_lora_is_a_method_with_and_without_the_predictor(data: CityData) -> None:
    for form in ("gate", "core", "full", "embedding", "bias"):
        whole, layers = (METHODS[f"st-lora-{form}{end}"].build(make("lstm"), data).model for end in ("", "-layers"))
        assert whole.peft_config["default"].conditioning == layers.peft_config["default"].conditioning == form
        assert trainable(layers) == {name for name in trainable(whole) if "stlora_predictor" not in name}


def test_build_adapter_knows_the_city(data: CityData) -> None:
    model = build_adapter(make("lstm"), data, r=3, conditioning="core")
    config = model.peft_config["default"]
    assert isinstance(model, PeftModel)
    assert (config.num_nodes, config.r, config.conditioning) == (5, 3, "core")
    assert config.node_ids == list(data.city.node_ids)
    assert config.scaler == data.scaler.to_dict()
    assert (config.window, config.horizon) == (12, 12)


def test_methods_of_a_backbone_without_spec_say_what_is_missing(data: CityData) -> None:
    with pytest.raises(ValueError, match="does not say which layers") as error:
        METHODS["head"].build(nn.Linear(3, 1), data)
    assert str(error.value).splitlines()[1] == "  expected: a class attribute stlora_spec of type BackboneSpec"


@pytest.mark.parametrize(
    ("names", "problem", "got"), [(["full", "magic"], "unknown method", "magic"), ([], "no method was given", "none")]
)
def test_find_methods_refuses(names: list[str], problem: str, got: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        find_methods(names)
    assert str(error.value).splitlines() == [
        f"{problem}.",
        "  expected: names of " + ", ".join(METHODS),
        f"  got:      {got}",
        "  to fix:   correct the list of methods",
    ]
