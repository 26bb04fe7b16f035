"""Whom an adapter belongs to: the backbone's weights and the city's nodes."""

from __future__ import annotations

import copy
import hashlib
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from toys import BACKBONES, Holder, assert_unchanged, pristine, raised, randomised, small_backbone, snapshot

from stlora_peft import STLoraConfig, check_nodes, fingerprint
from stlora_peft.tuner.identity import base_tensors


def test_fingerprint_is_sha256_over_names_shapes_dtypes_and_bytes():
    model = Holder(nn.Linear(2, 3))
    digest = hashlib.sha256()
    for name, value in (("layer.bias", model.layer.bias), ("layer.weight", model.layer.weight)):
        digest.update(f"{name} {tuple(value.shape)} torch.float32\n".encode())
        digest.update(value.detach().numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()


def test_a_lazy_layer_that_is_no_target_is_named():
    model = Holder(nn.Linear(2, 2))
    model.embedding = nn.LazyLinear(3)
    config = STLoraConfig(num_nodes=2, target_modules=["layer"], predictor=None)
    assert raised(lambda: get_peft_model(model, config)) == {
        "where": "the backbone's tensor 'embedding.bias' has no values yet",
        "expected": "a backbone whose weights are there",
        "got": "a lazy layer, which gets its size from its first input",
        "fix": "run the backbone once, or load its weights, before adapting it",
    }
    model.embedding(torch.zeros(1, 4))
    assert get_peft_model(model, config).peft_config["default"].base_fingerprint == fingerprint(model)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("num_nodes", [5, 8])
@pytest.mark.parametrize(
    "options", [{"conditioning": "gate"}, {"conditioning": "embedding", "modules_to_save": ["head"]}]
)
def test_fingerprint_is_the_same_with_adapters(options, num_nodes, name):
    backbone = small_backbone(name)
    if "modules_to_save" in options:
        options |= {"target_modules": ["lstm"] if name == "lstm" else ["conv_1", "_graph_conv"]}
    before = fingerprint(backbone)
    model = randomised(get_peft_model(backbone, STLoraConfig(num_nodes=num_nodes, **options)))
    assert fingerprint(model) == before
    assert fingerprint(model.get_base_model()) == before
    assert model.peft_config["default"].base_fingerprint == before
    model.add_adapter("second", STLoraConfig(num_nodes=num_nodes + 1, target_modules=["lstm", "conv_2"]))
    assert model.peft_config["second"].base_fingerprint == before
    assert fingerprint(model.unload()) == before


@pytest.mark.parametrize("name", BACKBONES)
def test_base_tensors_have_the_names_and_values_of_the_backbone(name):
    backbone = small_backbone(name)
    expected = {key: value.clone() for key, value in backbone.state_dict().items()}
    model = get_peft_model(
        backbone, STLoraConfig(num_nodes=7, modules_to_save=["head"], target_modules=".*(lstm|conv_1)")
    )
    found = dict(base_tensors(model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_fingerprint_changes_with_any_single_value(name):
    backbone = small_backbone(name)
    seen = {fingerprint(backbone)}
    for value in backbone.state_dict().values():
        kept = value.clone()
        entry = value.view(-1)[-1]
        entry.copy_(torch.nextafter(entry, torch.tensor(math.inf)) if value.is_floating_point() else entry + 1)
        seen.add(fingerprint(backbone))
        value.copy_(kept)
    assert len(seen) == 1 + len(backbone.state_dict())
    assert fingerprint(backbone) in seen


def test_fingerprint_changes_with_name_shape_order_and_dtype():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    renamed, reshaped = nn.Module(), copy.deepcopy(layer)
    renamed.other = copy.deepcopy(layer)
    reshaped.weight = nn.Parameter(layer.weight.view(2, 8))
    swapped = copy.deepcopy(layer)
    swapped.weight = nn.Parameter(layer.weight.flip(0))
    typed = copy.deepcopy(layer).to(torch.float64)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    prints = {fingerprint(m) for m in (layer, renamed, reshaped, swapped, typed, half)}
    assert len(prints) == 6
    assert None not in prints


def test_fingerprint_does_not_depend_on_memory_order_or_gradients():
    layer = nn.Linear(4, 3)
    strided = copy.deepcopy(layer)
    strided.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert fingerprint(strided) == fingerprint(layer)
    assert fingerprint(layer.requires_grad_(False)) == fingerprint(strided)


def test_fingerprint_on_the_meta_device_is_unknown():
    assert fingerprint(nn.Linear(2, 2, device="meta")) is None


@pytest.mark.parametrize("name", BACKBONES)
def test_loading_into_another_backbone_is_refused_and_leaves_it_alone(name, tmp_path):
    right, wrong = small_backbone(name, seed=0), small_backbone(name, seed=1)
    randomised(get_peft_model(pristine(right), STLoraConfig(num_nodes=7))).save_pretrained(tmp_path)
    before = snapshot(wrong)
    lines = raised(lambda: PeftModel.from_pretrained(wrong, tmp_path))
    assert lines["where"] == "stlora adapter 'default' belongs to another backbone"
    assert lines["expected"] == f"backbone weights with fingerprint {fingerprint(right)[:16]}..."
    assert lines["got"] == f"backbone weights with fingerprint {fingerprint(wrong)[:16]}..."
    assert lines["fix"] == (
        "load the adapter into the backbone that it was trained on, in the same dtype; to use it on this one all the "
        "same, load its config, set base_fingerprint=None and pass config="
    )
    assert_unchanged(wrong, before)

    config = STLoraConfig.from_pretrained(tmp_path)
    config.base_fingerprint = None
    assert isinstance(PeftModel.from_pretrained(wrong, tmp_path, config=config), PeftModel)


def test_loading_beside_another_citys_adapter_checks_the_backbone_too(tmp_path):
    right, wrong = small_backbone("lstm", seed=0), small_backbone("lstm", seed=1)
    get_peft_model(pristine(right), STLoraConfig(num_nodes=7)).save_pretrained(tmp_path)
    model = get_peft_model(wrong, STLoraConfig(num_nodes=5))
    before = snapshot(model)
    lines = raised(lambda: model.load_adapter(tmp_path, "second"))
    assert lines["where"] == "stlora adapter 'second' belongs to another backbone"
    after = snapshot(model)
    assert (after[0], after[2]) == (before[0], before[2])
    assert list(model.peft_config) == ["default"]


def test_backbone_that_trains_too_has_no_fingerprint():
    model = get_peft_model(small_backbone("lstm"), STLoraConfig(num_nodes=5, freeze_backbone=False))
    assert model.peft_config["default"].base_fingerprint is None


# -- nodes --------------------------------------------------------------------------------------------------


def city_model(node_ids: list[str] | None, num_nodes: int = 3) -> PeftModel:
    return get_peft_model(small_backbone("lstm"), STLoraConfig(num_nodes=num_nodes, node_ids=node_ids))


def test_check_nodes_of_the_adapters_own_passes():
    check_nodes(city_model(["a", "b", "c"]), ("a", "b", "c"))
    check_nodes(city_model(None), ["x", "y", "z"])  # the number is right, the names are not known
    for node_ids in (None, ["a", "b", "c"]):  # the names of the city that it was trained in
        shared = STLoraConfig(conditioning="shared", num_nodes=3, node_ids=node_ids)
        check_nodes(get_peft_model(small_backbone("lstm"), shared), ["any", "number"])


def test_check_nodes_of_a_shared_adapter_with_node_bound_weights_asks_for_its_city():
    config = STLoraConfig(conditioning="shared", num_nodes=2, node_ids=["a", "b"])
    model = get_peft_model(small_backbone("stgcn"), config)
    assert model.peft_config["default"].node_bound
    assert raised(lambda: check_nodes(model, ["a", "c"]))["got"] == "node 'c'"


@pytest.mark.parametrize(
    ("given", "expected", "got"),
    [
        (["a", "c", "b"], "node 'b' at position 1", "node 'c' (the same nodes in another order)"),
        (["a", "b", "d"], "node 'c' at position 2", "node 'd'"),
        (["a", "b"], "3 nodes", "2 nodes"),
        (["a", "b", "c", "d"], "3 nodes", "4 nodes"),
    ],
)
def test_check_nodes_of_others_names_the_first_difference(given, expected, got):
    assert raised(lambda: check_nodes(city_model(["a", "b", "c"]), given)) == {
        "where": "stlora adapter 'default' belongs to other nodes",
        "expected": expected,
        "got": got,
        "fix": "use the adapter of this city, or bring the readings into the adapter's node order",
    }


def test_check_nodes_of_another_number_raises_without_names_too():
    lines = raised(lambda: check_nodes(city_model(None), ["a", "b"]))
    assert (lines["expected"], lines["got"]) == ("3 nodes", "2 nodes")


def test_check_nodes_asks_the_active_adapter():
    model = city_model(["a", "b", "c"])
    model.add_adapter("second", STLoraConfig(num_nodes=2, node_ids=["p", "q"]))
    check_nodes(model, ["a", "b", "c"])
    model.set_adapter("second")
    check_nodes(model, ["p", "q"])
    assert (
        raised(lambda: check_nodes(model, ["a", "b", "c"]))["where"]
        == "stlora adapter 'second' belongs to other nodes"
    )


def test_check_nodes_after_loading_knows_the_names(tmp_path):
    city_model(["a", "b", "c"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(small_backbone("lstm"), tmp_path)
    check_nodes(model, ["a", "b", "c"])
    assert raised(lambda: check_nodes(model, ["b", "a", "c"]))["expected"] == "node 'a' at position 0"
