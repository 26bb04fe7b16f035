"""Folding a shared adapter into the backbone's weights, and refusing to fold what belongs to a node."""

from __future__ import annotations

import pytest
import torch
from contract_toys import CASES, adapted, config, forecast, toy
from peft import PeftModel
from torch import nn
from toys import CONDITIONINGS, raised

from stlora_peft.tuner.layers import STLoraLayer

MERGEABLE = [name for name, case in CASES.items() if case.mergeable]
OTHERS = [name for name, case in CASES.items() if not case.mergeable]
FIX = "keep the adapter beside the backbone: call the model as it is, or unload() to get the backbone"


def two(name: str) -> PeftModel:
    """A toy with two shared adapters, the first of them active."""
    model = adapted(name, "shared")
    model.add_adapter("oslo", config(name, "shared", r=3))
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_output_equals_unmerged(name: str, safe_merge: bool) -> None:
    model = adapted(name, "shared")
    expected = forecast(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert model.get_model_status().merged_adapters == ["default"]
    torch.testing.assert_close(forecast(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []
    torch.testing.assert_close(forecast(model), expected, rtol=0, atol=1e-5)
    bare = model.merge_and_unload(safe_merge=safe_merge)
    assert not [m for m in bare.modules() if isinstance(m, STLoraLayer)]
    assert not torch.allclose(forecast(bare), forecast(toy(name)), atol=1e-4)
    torch.testing.assert_close(forecast(bare), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_adapter_can_be_disabled(name: str) -> None:
    model = adapted(name, "shared")
    expected = forecast(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(forecast(model), forecast(toy(name)), rtol=0, atol=1e-5)
    torch.testing.assert_close(forecast(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MERGEABLE)
def test_several_adapters_merge_as_they_add_up(name: str) -> None:
    model = two(name)
    model.base_model.set_adapter(["default", "oslo"])
    both = forecast(model)
    model.merge_adapter()
    torch.testing.assert_close(forecast(model), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging oslo"):
        model.merge_adapter(adapter_names=["oslo"])
    torch.testing.assert_close(forecast(model), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(forecast(model), both, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", ["default", "oslo"])
def test_named_adapter_is_merged_whichever_is_active(adapter: str) -> None:
    model = two("linear")
    model.set_adapter(adapter)
    expected = forecast(model)
    model.set_adapter("default")
    bare = model.merge_and_unload(adapter_names=[adapter])
    torch.testing.assert_close(forecast(bare), expected, rtol=0, atol=1e-5)


def test_merging_twice_warns_and_changes_nothing() -> None:
    model = adapted("linear", "shared")
    model.merge_adapter()
    before = weights(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_unmerging_an_unmerged_model_changes_nothing(name: str) -> None:
    model = adapted(name, "embedding")
    before = weights(model)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_safe_merge_refuses_infinite_weights_and_changes_nothing() -> None:
    model = adapted("linear", "shared", target_modules=["enc", "head"])
    with torch.no_grad():
        model.base_model.model.head.nall_A["default"].fill_(float("inf"))
    before = weights(model)
    assert raised(lambda: model.merge_adapter(safe_merge=True)) == {
        "where": "adapter 'default' cannot be merged into 'head'",
        "expected": "finite weights",
        "got": "NaN or infinity",
        "fix": "train the adapter again with a smaller learning rate",
    }
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("conditioning", [c for c in CONDITIONINGS if c != "shared"])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_a_node_conditioned_adapter_is_refused(name: str, conditioning: str, method: str) -> None:
    model = adapted(name, conditioning, modules_to_save=["head"])
    before, modules, expected = weights(model), [type(m) for m in model.modules()], forecast(model)
    assert raised(getattr(model, method)) == {
        "where": "adapter 'default' cannot be merged into 'enc'",
        "expected": "an update that is the same for every node (conditioning='shared')",
        "got": f"its update depends on the node (conditioning='{conditioning}'): one weight cannot hold N of them",
        "fix": FIX,
    }
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(forecast(model), expected)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_where_no_weight_equals_the_update_is_refused(name: str, method: str) -> None:
    model = adapted(name, "shared")
    before, modules = weights(model), [type(m) for m in model.modules()]
    lines = raised(getattr(model, method))
    reason = {
        "lstm": "LSTM has no weight that equals the update",
        "gru": "GRU has no weight that equals the update",
        "gcn": "GCNConv has no weight that equals the update",
        "city": "the node-specific predictor is a network of its own",
    }
    assert lines["got"] == reason[name]
    assert lines["fix"] == FIX
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merging_one_shared_adapter_beside_a_node_conditioned_one() -> None:
    model = adapted("linear", "shared")
    expected = forecast(model)
    model.add_adapter("oslo", config("linear", "gate"))
    assert raised(lambda: model.merge_adapter(adapter_names=["default", "oslo"]))["fix"] == FIX
    model.merge_adapter(adapter_names=["default"])
    torch.testing.assert_close(forecast(model), expected, rtol=0, atol=1e-5)


def test_shared_adapter_merges_while_a_node_conditioned_one_is_active() -> None:
    model = adapted("linear", "shared")
    expected = forecast(model)
    model.add_adapter("oslo", config("linear", "gate"))
    model.set_adapter("oslo")
    bare = model.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(forecast(bare), expected, rtol=0, atol=1e-5)


def test_two_cities_cannot_be_merged_into_one_backbone() -> None:
    model = adapted("city", "shared", predictor=None)
    model.add_adapter("oslo", config("city", "shared", predictor=None))
    before = weights(model)
    lines = raised(lambda: model.merge_and_unload(adapter_names=["default", "oslo"]))
    assert lines["where"] == "node-bound module 'norm' belongs to one city"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merged_city_without_predictor_keeps_its_own_normalisation() -> None:
    model = adapted("city", "shared", predictor=None)
    with torch.no_grad():
        model.base_model.model.norm.nall_node_bound["default"].bias.add_(1.0)
    expected = forecast(model)
    model.add_adapter("oslo", config("city", "shared", predictor=None))
    model.set_adapter("oslo")
    bare = model.merge_and_unload(adapter_names=["default"])
    assert type(bare.norm) is nn.BatchNorm2d
    torch.testing.assert_close(forecast(bare), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(forecast(bare), forecast(toy("city")), atol=1e-3)
