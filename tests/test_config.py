"""Ranges and combinations of the configuration, checked before any tensor exists."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from toys import CONDITIONINGS, Holder, assert_unchanged, call, raised, small_backbone, snapshot

from stlora_peft import PredictorConfig, STLoraConfig

WHOLE = "a whole number of 1 or more"


@pytest.mark.parametrize("name", ["r", "emb_size", "num_nodes", "window", "horizon"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4"])
def test_number_out_of_range_raises(name, value):
    assert raised(lambda: STLoraConfig(**{name: value})) == {
        "where": f"STLoraConfig.{name} is out of range",
        "expected": WHOLE,
        "got": repr(value),
        "fix": "correct it",
    }


def test_number_that_must_be_there_raises_for_none():
    assert raised(lambda: STLoraConfig(emb_size=None)) == {
        "where": "STLoraConfig.emb_size is out of range",
        "expected": WHOLE,
        "got": "None",
        "fix": "correct it",
    }


def test_rank_of_a_pattern_out_of_range_names_the_layer():
    lines = raised(lambda: STLoraConfig(rank_pattern={"head": 2, "lstm": 0}))
    assert lines["where"] == "STLoraConfig.rank_pattern['lstm'] is out of range"
    assert (lines["expected"], lines["got"]) == (WHOLE, "0")
    assert raised(lambda: STLoraConfig(rank_pattern={"lstm": None}))["got"] == "None"


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan"), "0.1"])
@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda p: STLoraConfig(lora_dropout=p), "STLoraConfig.lora_dropout"),
        (lambda p: PredictorConfig(dropout=p), "PredictorConfig.dropout"),
    ],
    ids=["adapter", "predictor"],
)
def test_dropout_out_of_range_raises(make, where, value):
    lines = raised(lambda: make(value))
    assert lines["where"] == f"{where} is out of range"
    assert (lines["expected"], lines["got"]) == ("a probability in [0, 1)", repr(value))


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_dropout_left_open_is_a_tenth_and_none_where_node_vectors_have_noise(conditioning, noise):
    model = get_peft_model(wide(SMALL), line(conditioning=conditioning, emb_noise=noise))
    expected = 0.0 if noise and conditioning == "embedding" else 0.1
    assert model.peft_config["default"].lora_dropout == expected
    assert getattr(model.get_base_model().layer.nall_dropout["default"], "p", 0.0) == expected
    model = get_peft_model(wide(SMALL), line(conditioning=conditioning, emb_noise=noise, lora_dropout=0.3))
    assert model.peft_config["default"].lora_dropout == 0.3


def test_another_form_of_a_configuration_has_the_dropout_of_that_form():
    config = dataclasses.replace(STLoraConfig(num_nodes=3), conditioning="gate")
    assert config.lora_dropout is None
    assert PredictorConfig().dropout is None


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1", None])
def test_noise_of_node_vectors_out_of_range_raises(value):
    assert raised(lambda: STLoraConfig(emb_noise=value)) == {
        "where": "STLoraConfig.emb_noise is out of range",
        "expected": "a finite number >= 0",
        "got": repr(value),
        "fix": "correct it",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("lora_alpha", "alpha_pattern") for value in (float("nan"), float("inf"), "16")]
    + [("alpha_pattern", None)],  # lora_alpha=None is twice the rank
)
def test_alpha_that_is_no_finite_number_raises(name, value):
    given, where = (value, name) if name == "lora_alpha" else ({"lstm": value}, "alpha_pattern['lstm']")
    lines = raised(lambda: STLoraConfig(**{name: given}))
    assert lines["where"] == f"STLoraConfig.{where} is out of range"
    assert (lines["expected"], lines["got"]) == ("a finite number", repr(value))


def test_conditioning_auto_says_what_chooses():
    assert raised(lambda: STLoraConfig(conditioning="auto")) == {
        "where": "STLoraConfig.conditioning cannot be chosen without data",
        "expected": "'gate', 'core', 'full', 'embedding', 'bias', 'shared'",
        "got": "'auto'",
        "fix": "choose by stlora_peft.selection.choose_conditioning, or adapt by 'stlora adapt --conditioning auto'",
    }


def test_unknown_conditioning_lists_the_known():
    assert raised(lambda: STLoraConfig(conditioning="gates")) == {
        "where": "STLoraConfig.conditioning is unknown",
        "expected": "'gate', 'core', 'full', 'embedding', 'bias', 'shared'",
        "got": "'gates'",
        "fix": "choose one of them; 'embedding' is the default",
    }


@pytest.mark.parametrize("value", ["on", True, 3])
def test_unknown_predictor_raises(value):
    lines = raised(lambda: STLoraConfig(predictor=value))
    assert lines["where"] == "STLoraConfig.predictor is unknown"
    assert (lines["expected"], lines["got"]) == ("'auto', a PredictorConfig or None", repr(value))


@pytest.mark.parametrize("name", ["width", "num_layers", "r", "window", "horizon", "in_channels", "out_channels"])
def test_predictor_number_out_of_range_raises(name):
    lines = raised(lambda: PredictorConfig(**{name: 0}))
    assert (lines["where"], lines["expected"]) == (f"PredictorConfig.{name} is out of range", WHOLE)


def test_predictor_number_that_must_be_there_raises_for_none():
    assert raised(lambda: PredictorConfig(num_layers=None))["got"] == "None"


@pytest.mark.parametrize("name", ["input_layout", "output_layout"])
@pytest.mark.parametrize("layout", ["b t n", "b t n n c", "(b t) n c", ""])
def test_predictor_layout_must_be_an_order_of_four_axes(name, layout):
    lines = raised(lambda: PredictorConfig(**{name: layout}))
    assert lines == {
        "where": f"PredictorConfig.{name} cannot be read",
        "expected": "some order of the four axes 'b t n c'",
        "got": repr(layout),
        "fix": "write e.g. 'b t n c' or 'b n c t'",
    }


def test_wrong_node_layout_raises_in_the_configuration():
    assert raised(lambda: STLoraConfig(node_layout={"lstm": "b t c"}))["got"] == "no node axis 'n'"


def test_layers_pattern_alone_raises():
    lines = raised(lambda: STLoraConfig(layers_pattern="layers"))
    assert lines["where"] == "STLoraConfig.layers_pattern has no effect alone"
    assert lines["got"] == "layers_pattern='layers' and no layers_to_transform"


def test_layers_to_transform_with_an_expression_raises():
    lines = raised(lambda: STLoraConfig(target_modules=".*lin", layers_to_transform=[0]))
    assert lines["where"] == "STLoraConfig.layers_to_transform cannot be used here"
    assert lines["got"] == "the expression '.*lin'"


def test_node_ids_of_another_number_raise():
    lines = raised(lambda: STLoraConfig(num_nodes=3, node_ids=["a", "b"]))
    assert lines["where"] == "STLoraConfig.node_ids does not fit num_nodes"
    assert (lines["expected"], lines["got"]) == ("3 names", "2 names")


@pytest.mark.parametrize("name", ["node_bound", "modules_to_save"])
def test_one_name_instead_of_a_list_raises(name):
    lines = raised(lambda: STLoraConfig(**{name: "norm"}))
    assert lines["where"] == f"STLoraConfig.{name} is no list"
    assert (lines["expected"], lines["got"]) == ("a list of names", "'norm'")
    assert lines["fix"] == f"write {name}=['norm']"


# -- what is valid ------------------------------------------------------------------------------------------


def test_config_without_arguments_is_valid():
    config = STLoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (None, None, None)
    assert (config.conditioning, config.emb_size, config.emb_noise, config.num_nodes) == ("embedding", 16, 0.8, None)


def test_config_is_json_and_reads_back_as_it_was(tmp_path):
    config = STLoraConfig(
        num_nodes=3,
        target_modules=["b", "a"],
        exclude_modules=["c"],
        conditioning="core",
        predictor=PredictorConfig(width=8, output_layout="b n t c"),
        node_layout={"a": "(b n) t c"},
        node_bound=["norm"],
        rank_pattern={"a": 2},
        alpha_pattern={"a": 0.5},
        node_ids=["x", "y", "z"],
        scaler={"mean": [1.5], "std": [2.5]},
        window=12,
        horizon=3,
        base_fingerprint="ab",
    )
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "STLORA"
    for found in (STLoraConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(str(tmp_path))):
        assert type(found) is STLoraConfig
        left, right = config.to_dict(), found.to_dict()
        changed = {key for key in left if left[key] != right[key]}
        assert changed <= {"inference_mode"}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_config_survives_pickle_and_deepcopy(protocol):
    config = STLoraConfig(num_nodes=3, predictor=PredictorConfig(width=8))
    assert pickle.loads(pickle.dumps(config, protocol)) == config
    assert copy.deepcopy(config) == config
    assert copy.deepcopy(config).peft_type is config.peft_type


def test_config_used_for_two_backbones_fits_both():
    config = STLoraConfig(num_nodes=5)
    before = config.to_dict()
    for seed in (0, 1):
        for name in ("lstm", "stgcn"):
            model = get_peft_model(small_backbone(name, seed=seed), config)
            assert call(model, 5).shape == (2, 4, 5, 1)
    after = config.to_dict()
    assert {key for key in before if before[key] != after[key]} <= {"base_model_name_or_path"}


# -- rank and alpha that are left open ----------------------------------------------------------------------

SMALL, LARGE = (3, 83_333), (500, 500)  # weights of 249,999 and of 250,000 numbers


def wide(size: tuple[int, int]) -> Holder:
    return Holder(nn.Linear(*size, bias=False))


def line(**options: Any) -> STLoraConfig:
    return STLoraConfig(**({"num_nodes": 3, "target_modules": ["layer"], "predictor": None} | options))


def resolved(model: nn.Module, adapter: str = "default") -> tuple[int, float]:
    """Rank and alpha of an adapter, after a check that the layer has the same."""
    config, layer = model.peft_config[adapter], model.get_base_model().layer
    assert (layer.r[adapter], layer.lora_alpha[adapter]) == (config.r, config.lora_alpha)
    assert layer.nall_B[adapter].shape[1] == config.r
    assert layer.scaling[adapter] == config.lora_alpha / config.r
    return config.r, config.lora_alpha


@pytest.mark.parametrize(("size", "expected"), [((4, 5), (8, 16)), (SMALL, (8, 16)), (LARGE, (2, 4))])
def test_rank_left_open_is_8_and_2_on_a_backbone_of_250_000_numbers(size, expected):
    assert resolved(get_peft_model(wide(size), line())) == expected


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"r": 4}, (4, 8)),
        ({"r": 4, "lora_alpha": 3}, (4, 3)),
        ({"r": 8, "lora_alpha": 16}, (8, 16)),
        ({"r": 4, "lora_alpha": 0}, (4, 0)),
    ],
)
def test_rank_and_alpha_that_are_given_are_kept_on_every_backbone(given, expected, size):
    assert resolved(get_peft_model(wide(size), line(**given))) == expected


@pytest.mark.parametrize(("size", "rank"), [(SMALL, 8), (LARGE, 2)])
def test_alpha_that_is_given_alone_is_kept_beside_the_rank_that_is_filled_in(size, rank):
    assert resolved(get_peft_model(wide(size), line(lora_alpha=3))) == (rank, 3)


def test_rank_left_open_scales_as_the_same_rank_written_out():
    outs = []
    for given in ({}, {"r": 8, "lora_alpha": 16}):
        torch.manual_seed(1)
        model = get_peft_model(Holder(nn.Linear(4, 5)), line(init_weights=False, use_rslora=True, **given)).eval()
        outs.append(model(torch.linspace(-1, 1, 12).view(1, 3, 4)))
    assert torch.equal(outs[0], outs[1])
    assert model.get_base_model().layer.scaling["default"] == 16 / 8**0.5


def test_adapters_that_are_there_already_do_not_count_as_the_backbone():
    model = get_peft_model(wide(SMALL), line(r=64))
    assert sum(parameter.numel() for parameter in model.parameters()) > 5_000_000
    model.add_adapter("second", line())
    assert (resolved(model), resolved(model, "second")) == ((64, 128), (8, 16))


def test_copies_of_an_adapter_do_not_count_as_the_backbone():
    class City(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(30_000)  # 60,000 weights, as many statistics and a counter
            self.layer, self.head = nn.Linear(2, 2), nn.Linear(300, 300, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.norm(x))

    options = {"num_nodes": 30_000, "conditioning": "shared", "node_bound": ["norm"], "modules_to_save": ["head"]}
    model = get_peft_model(City(), line(**options))
    model.add_adapter("second", line(**options))
    assert resolved(model) == resolved(model, "second") == (8, 16)


def test_what_is_no_parameter_and_what_two_names_share_counts_once_at_most():
    class Tied(Holder):
        def __init__(self) -> None:
            super().__init__(nn.Linear(*SMALL, bias=False))
            self.again = self.layer
            self.register_buffer("adjacency", torch.zeros(600, 600))

    assert resolved(get_peft_model(Tied(), line(target_modules="^layer$"))) == (8, 16)


@pytest.mark.parametrize(("name", "options"), [("stgcn", {}), ("lstm", {"hidden_size": 250})])
def test_rank_and_width_left_open_count_for_the_predictor_too(name, options):
    model = get_peft_model(small_backbone(name, **options), STLoraConfig(num_nodes=5, lora_dropout=0.2))
    config, rank = model.peft_config["default"], 8 if name == "stgcn" else 2
    predictor = model.get_base_model().stlora_predictor.nall_predictor["default"]
    assert (config.r, config.lora_alpha, predictor.r, predictor.scaling) == (rank, 2 * rank, rank, 2.0)
    assert predictor.B_out.shape[1] == rank
    assert config.predictor.width == predictor.weight_in.shape[0] == (64 if name == "stgcn" else 48)
    assert predictor.dropout == config.lora_dropout == 0.2


@pytest.mark.parametrize(("size", "rank"), [((4, 5), 8), (LARGE, 2)])
def test_rank_pattern_holds_beside_a_rank_left_open_and_alpha_follows_the_open_one(size, rank):
    backbone = wide(size)
    backbone.other = nn.Linear(2, 2)
    options = {"target_modules": ["layer", "other"], "rank_pattern": {"other": 5}, "conditioning": "gate"}
    model = get_peft_model(backbone, line(**options))
    assert resolved(model) == (rank, 2 * rank)
    other = model.get_base_model().other
    assert other.nall_gate["default"].shape == (3, 5)
    assert (other.r["default"], other.lora_alpha["default"], other.scaling["default"]) == (5, 2 * rank, 2 * rank / 5)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_resolved_numbers_are_saved_and_loading_keeps_them(tmp_path, size):
    backbone = wide(size)
    before = copy.deepcopy(backbone)
    model = get_peft_model(backbone, line(init_weights=False)).eval()
    expected = resolved(model)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"]) == expected
    assert resolved(PeftModel.from_pretrained(before, tmp_path)) == expected


def test_saved_rank_is_that_of_the_file_and_not_that_of_the_backbone(tmp_path):
    """Files from before ranks could be left open have 8 and 16, on large backbones too."""
    backbone = wide(LARGE)
    before = copy.deepcopy(backbone)
    get_peft_model(backbone, line(r=8, lora_alpha=16)).save_pretrained(tmp_path)
    assert resolved(PeftModel.from_pretrained(before, tmp_path)) == (8, 16)


def test_config_left_open_prints_and_reads_back_as_it_was(tmp_path):
    config = STLoraConfig(num_nodes=3)
    assert "r=None, lora_alpha=None, lora_dropout=None" in repr(config)
    assert STLoraConfig(**config.to_dict()) == config
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] is None
    found = STLoraConfig.from_pretrained(tmp_path)
    assert (found.r, found.lora_alpha) == (None, None)
    assert found.to_dict() | {"inference_mode": False} == config.to_dict()


def test_config_left_open_stays_open_and_is_resolved_for_each_backbone():
    config = line()
    before = config.to_dict()
    models = [get_peft_model(wide(size), config) for size in (LARGE, SMALL)]
    models[0].add_adapter("second", config)
    injected = inject_adapter_in_model(config, wide(LARGE))
    assert [resolved(model) for model in models] == [(2, 4), (8, 16)]
    assert resolved(models[0], "second") == (2, 4)
    assert injected.layer.r == {"default": 2}
    assert config.to_dict() == before | {"base_model_name_or_path": config.base_model_name_or_path}
    assert (config.r, config.lora_alpha) == (None, None)


# -- what can only be checked beside a backbone -------------------------------------------------------------


def unknown(holder: nn.Module, **options: Any) -> dict[str, str]:
    before = snapshot(holder)
    lines = raised(lambda: get_peft_model(holder, STLoraConfig(**options)))
    assert_unchanged(holder, before)
    return lines


def test_number_of_nodes_is_needed_by_every_conditioning_but_shared():
    for conditioning in ("gate", "core", "full", "embedding", "bias"):
        assert unknown(Holder(nn.Linear(2, 2)), target_modules=["layer"], conditioning=conditioning) == {
            "where": "stlora adapter 'default': the number of nodes is not known",
            "expected": "STLoraConfig(num_nodes=<N>)",
            "got": "num_nodes=None",
            "fix": "pass the number of nodes (sensors) of the city",
        }
    model = get_peft_model(Holder(nn.Linear(2, 2)), STLoraConfig(target_modules=["layer"], conditioning="shared"))
    assert model(torch.zeros(3, 2)).shape == (3, 2)


def test_targets_are_needed_for_a_backbone_without_defaults():
    assert unknown(Holder(nn.Linear(2, 2)), num_nodes=3) == {
        "where": "Please specify `target_modules` in STLoraConfig",
        "expected": "names of layers, or a backbone with defaults of its own",
        "got": "target_modules=None on a Holder",
        "fix": "pass target_modules=[<names from backbone.named_modules()>] or 'all-linear'",
    }


def test_defaults_of_a_known_backbone_are_filled_in():
    model = get_peft_model(small_backbone("stgcn"), STLoraConfig(num_nodes=5))
    config = model.peft_config["default"]
    assert config.target_modules == {"conv_1", "conv_2", "conv_3", "_graph_conv", "head.hidden", "head.output"}
    assert config.node_bound == ["block1._batch_norm", "block2._batch_norm"]
    assert len(config.base_fingerprint) == 64


@pytest.mark.parametrize(("name", "layers"), [("lstm", {"head"}), ("stgcn", {"head.hidden", "head.output", "lins"})])
def test_all_linear_takes_linear_layers_of_torch_and_pyg(name, layers):
    model = get_peft_model(small_backbone(name), STLoraConfig(num_nodes=5, target_modules="all-linear"))
    found = model.peft_config["default"].target_modules
    assert {key.rpartition(".lins")[1].strip(".") or key for key in found} == layers
    assert call(model, 5).shape == (2, 4, 5, 1)


def test_patterns_give_layers_their_own_rank_and_alpha():
    config = STLoraConfig(num_nodes=5, r=4, rank_pattern={"head.*": 2}, alpha_pattern={"conv_1": 3}, predictor=None)
    model = get_peft_model(small_backbone("stgcn"), config)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "nall_B")}
    assert layers
    for name, layer in layers.items():
        rank, alpha = 2 if "head" in name else 4, 3 if name.endswith("conv_1") else 8
        assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, alpha)
        assert layer.scaling["default"] == alpha / rank
        assert layer.nall_B["default"].shape[1] == rank


def test_excluded_and_numbered_layers_are_left_out():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(2, 2)}) for _ in range(4))
            self.encoder = nn.ModuleDict({"layers": layers})

    def found(**options: Any) -> set[str]:
        model = get_peft_model(Stack(), STLoraConfig(num_nodes=3, target_modules=["lin"], predictor=None, **options))
        return {name.split(".")[4] for name, module in model.named_modules() if hasattr(module, "nall_B")}

    assert found() == {"0", "1", "2", "3"}
    assert found(exclude_modules=["layers.1.lin"]) == {"0", "2", "3"}
    assert found(layers_to_transform=[0, 2], layers_pattern="layers") == {"0", "2"}
