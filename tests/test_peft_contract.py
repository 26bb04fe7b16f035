"""What PEFT promises of an adapter's life - making, training, saving, loading, switching - for every host layer."""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contract_toys import CASES, CITY_OPTIONS, GRID, NODES, CityToy, adapted, config, forecast, toy, train_step, window
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import CONDITIONINGS, assert_unchanged, raised, snapshot

from stlora_peft import STLoraConfig
from stlora_peft.tuner.host_layers import STLoraLinear
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.registration import PREFIX

on_every_toy = pytest.mark.parametrize(("name", "conditioning"), GRID)
on_city = pytest.mark.parametrize("conditioning", CONDITIONINGS)
on_both_memory_modes = pytest.mark.parametrize("low_cpu_mem_usage", [False, True])


def shifts(model: nn.Module, name: str) -> bool:
    """Whether the output differs from the pristine toy's."""
    return not torch.allclose(forecast(model), forecast(toy(name)), atol=1e-4)


# -- making and training ----------------------------------------------------------------------------------------------


@on_every_toy
def test_new_adapter_leaves_output_bitwise_as_it_was(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning, init_weights=True)
    assert torch.equal(forecast(model), forecast(toy(name)))


@on_every_toy
def test_random_adapter_changes_output(name: str, conditioning: str) -> None:
    assert shifts(adapted(name, conditioning), name)


@on_every_toy
def test_training_step_moves_every_adapter_tensor_and_no_other(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning, modules_to_save=["head"])
    before = copy.deepcopy(model.state_dict())
    train_step(model)
    parameters = {key for key, _ in model.named_parameters()}
    for key, value in model.state_dict().items():
        own = PREFIX in key or "modules_to_save" in key
        if key in parameters or not own:
            assert torch.equal(value, before[key]) is not own, key


@on_every_toy
def test_trainable_parameters_are_those_of_the_adapter(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning, modules_to_save=["head"])
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    expected = {key for key, _ in model.named_parameters() if PREFIX in key or "modules_to_save" in key}
    assert trainable == expected
    assert all(".default" in key for key in trainable)


def test_print_trainable_parameters_counts_the_formula(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("linear", "gate", r=4)
    model.print_trainable_parameters()
    count = 2 * NODES * 4 + 4 * (3 + 8)
    total = count + sum(p.numel() for p in toy("linear").parameters())
    share = f"{100 * count / total:.4f}"
    assert capsys.readouterr().out == (
        f"trainable params: {count:,d} || all params: {total:,d} || trainable%: {share}\n"
    )


def test_adapter_module_names_its_kind() -> None:
    assert repr(adapted("linear").base_model.model.enc).startswith("stlora.STLoraLinear(")


@pytest.mark.parametrize("name", CASES)
def test_adapter_module_answers_for_its_layer(name: str) -> None:
    model = adapted(name, "embedding")
    enc = model.base_model.model.enc
    plain = toy(name).enc
    for attribute in ("weight", "bias", "in_features", "kernel_size", "hidden_size", "batch_first", "K"):
        if hasattr(plain, attribute):
            value = getattr(plain, attribute)
            if isinstance(value, Tensor):
                assert torch.equal(getattr(enc, attribute), value)
            else:
                assert getattr(enc, attribute) == value
    for module in model.modules():
        if hasattr(module, "adapter_layer_names"):
            assert isinstance(module.in_features, int)
            assert isinstance(module.out_features, int)
    with pytest.raises(AttributeError, match="no_such_thing"):
        enc.no_such_thing  # noqa: B018


def test_dropout_acts_in_training_only() -> None:
    model = adapted("city", lora_dropout=0.5)
    model.add_adapter("oslo", config("city", lora_dropout=0.5))  # in evaluation mode, as the model is
    model.set_adapter("oslo")
    assert torch.equal(forecast(model), forecast(model))
    model.train()
    assert not torch.equal(forecast(model), forecast(model))


# -- files ------------------------------------------------------------------------------------------------------------


@on_every_toy
@on_both_memory_modes
def test_from_pretrained_gives_the_saved_output(
    name: str, conditioning: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = adapted(name, conditioning, modules_to_save=["head"])
    train_step(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    model.requires_grad_(False)  # torch lets it choose how a transposed input is multiplied
    assert torch.equal(forecast(loaded), forecast(model))
    assert not any(parameter.is_meta for parameter in loaded.parameters())


@on_every_toy
def test_saved_folder_holds_readme_config_and_adapter_tensors_only(
    name: str, conditioning: str, tmp_path: Path
) -> None:
    model = adapted(name, conditioning)
    model.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = [key for key in model.state_dict() if PREFIX in key]
    assert len(saved) == len(own)
    assert all(key.startswith("base_model.model.") and PREFIX in key and "default" not in key for key in saved)


@on_every_toy
def test_state_dict_goes_from_one_model_to_another(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning, modules_to_save=["head"])
    other = adapted(name, conditioning, seed=2, modules_to_save=["head"])
    assert not torch.allclose(forecast(other), forecast(model), atol=1e-4)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(forecast(other), forecast(model))


def test_config_comes_back_from_its_file(tmp_path: Path) -> None:
    model = adapted("city", "core", modules_to_save=["head"], rank_pattern={"enc": 3})
    model.save_pretrained(tmp_path)
    found = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(found, STLoraConfig)
    assert found.peft_type is PeftType.STLORA
    assert found.rank_pattern == {"enc": 3}
    assert found.target_modules == {"enc"}
    assert found.predictor == CITY_OPTIONS["predictor"]
    assert found.node_bound == ["norm"]


@on_city
def test_adapters_are_saved_apart(conditioning: str, tmp_path: Path) -> None:
    model = adapted("city", conditioning, modules_to_save=["head"])
    keys = set(get_peft_model_state_dict(model))
    names = ("default2", "other_default", "efaul")  # parts of one another
    for name in names:
        model.add_adapter(name, config("city", conditioning, modules_to_save=["head"]))
    model.save_pretrained(tmp_path)
    model.requires_grad_(False)
    for name in ("default", *names):
        folder = tmp_path if name == "default" else tmp_path / name
        assert set(load_file(folder / "adapter_model.safetensors")) == keys
        model.set_adapter(name)
        model.requires_grad_(False)
        assert torch.equal(forecast(PeftModel.from_pretrained(toy("city"), folder)), forecast(model))


@on_both_memory_modes
def test_load_adapter_reports_no_missing_key(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted("city", "embedding", seed=7)
    model.save_pretrained(tmp_path)
    other = adapted("city", "embedding", seed=8)
    result = other.load_adapter(tmp_path, adapter_name="oslo", low_cpu_mem_usage=low_cpu_mem_usage)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    other.set_adapter("oslo")
    assert torch.equal(forecast(other), forecast(model))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_leaves_training_as_asked(is_trainable: bool, tmp_path: Path) -> None:
    adapted("city", "embedding", modules_to_save=["head"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(toy("city"), tmp_path, is_trainable=is_trainable)
    model.load_adapter(tmp_path, adapter_name="oslo", is_trainable=is_trainable)
    for key, parameter in model.named_parameters():
        if ".oslo" not in key:
            assert parameter.requires_grad is (is_trainable and ".default" in key), key
    model.set_adapter("oslo")
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad is (".oslo" in key), key


def test_loading_keeps_the_config_object_that_was_passed(tmp_path: Path) -> None:
    adapted("linear").save_pretrained(tmp_path)
    given = config("linear")
    model = PeftModel.from_pretrained(toy("linear"), tmp_path, config=given)
    assert model.peft_config["default"] is given


def test_one_config_object_serves_two_backbones() -> None:
    given = config("linear", target_modules="all-linear")
    get_peft_model(toy("linear", seed=0), given)
    get_peft_model(toy("linear", seed=5), given)
    assert given.target_modules == "all-linear"
    assert given.base_fingerprint is None


def test_batch_norm_in_modules_to_save_keeps_its_statistics(tmp_path: Path) -> None:
    model = adapted("city", node_bound=[], modules_to_save=["batch_norm"])
    before = model.base_model.model.batch_norm.modules_to_save["default"].running_mean.clone()
    train_step(model)
    assert not torch.equal(model.base_model.model.batch_norm.modules_to_save["default"].running_mean, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy("city"), tmp_path)
    assert torch.equal(forecast(loaded), forecast(model))


# -- several adapters -------------------------------------------------------------------------------------------------


@on_every_toy
def test_second_adapter_leaves_the_first_untouched(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning)
    first = forecast(model)
    model.add_adapter("oslo", config(name, conditioning))
    assert torch.equal(forecast(model), first)
    model.set_adapter("oslo")
    assert not torch.allclose(forecast(model), first, atol=1e-4)
    train_step(model)
    model.set_adapter("default")
    assert torch.equal(forecast(model), first)


@on_every_toy
def test_disabled_adapter_gives_the_backbone_back(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning, modules_to_save=["head"])
    train_step(model)
    enabled = forecast(model)
    with model.disable_adapter():
        assert torch.equal(forecast(model), forecast(toy(name)))
    assert torch.equal(forecast(model), enabled)
    model.base_model.disable_adapter_layers()
    assert torch.equal(forecast(model), forecast(toy(name)))
    model.base_model.enable_adapter_layers()
    assert torch.equal(forecast(model), enabled)


@on_every_toy
def test_deleting_an_adapter_leaves_the_others(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning)
    for other in ("oslo", "rome"):
        model.add_adapter(other, config(name, conditioning))
    model.set_adapter("rome")
    rome = forecast(model)
    model.delete_adapter("oslo")
    assert torch.equal(forecast(model), rome)
    model.delete_adapter("rome")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert not [key for key in model.state_dict() if "oslo" in key or "rome" in key]
    assert shifts(model, name)
    model.delete_adapter("default")
    assert torch.equal(forecast(model.base_model.model), forecast(toy(name)))


def test_deleting_an_unknown_adapter_raises() -> None:
    with pytest.raises(ValueError, match="Adapter oslo does not exist"):
        adapted("linear").delete_adapter("oslo")


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("lstm", "gru", "city")])
@on_city
def test_several_active_adapters_add_up(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning)
    model.add_adapter("oslo", config(name, conditioning, r=3))
    hidden = {}
    for adapters in (("default",), ("oslo",), ("default", "oslo")):
        model.base_model.set_adapter(list(adapters))
        hidden[adapters] = model.base_model.model.encode(window())
    base = toy(name).encode(window())
    expected = hidden["default",] + hidden["oslo",] - base
    torch.testing.assert_close(hidden["default", "oslo"], expected, rtol=0, atol=1e-5)


@on_city
def test_adapters_of_two_cities_are_switched(conditioning: str) -> None:
    model = adapted("city", conditioning)
    small = forecast(model)
    model.add_adapter("rome", config("city", conditioning, num_nodes=7))
    model.set_adapter("rome")
    assert forecast(model, 7).shape == (2, 2, 7, 1)
    model.set_adapter("default")
    assert torch.equal(forecast(model), small)
    lines = raised(lambda: forecast(model, 7))
    assert "wrong number of nodes" in lines["where"]
    assert "N=5" in lines["expected"]
    assert "N=7" in lines["got"]


def test_two_cities_cannot_be_active_at_once_on_a_node_bound_module() -> None:
    model = adapted("city")
    model.add_adapter("rome", config("city"))
    model.base_model.set_adapter(["default", "rome"])
    assert raised(lambda: forecast(model)) == {
        "where": "node-bound module 'norm' belongs to one city",
        "expected": "one active adapter",
        "got": "the active adapters ['default', 'rome']",
        "fix": "call set_adapter('default')",
    }


@pytest.mark.parametrize("disabled", [False, True])
def test_adapter_names_of_a_batch_are_refused(disabled: bool) -> None:
    model = adapted("linear")
    if disabled:
        model.base_model.disable_adapter_layers()
    assert raised(lambda: model(window(), adapter_names=["default", "__base__"])) == {
        "where": "adapters cannot be mixed in one batch",
        "expected": "one active adapter for the whole batch",
        "got": "adapter_names=['default', '__base__']",
        "fix": "call set_adapter(<city>) and pass that city's rows; cities differ in their nodes",
    }
    assert model(window(), adapter_names=None).shape == (2, 2, NODES, 1)


def test_base_model_runs_the_predictor_too() -> None:
    model = adapted("city")
    assert torch.equal(forecast(model.base_model), forecast(model))


def test_status_tells_layers_and_adapters() -> None:
    model = adapted("linear")
    model.add_adapter("oslo", config("linear", target_modules=["enc", "head"]))
    enc, head = model.get_layer_status()
    assert (enc.name, head.name) == ("model.enc", "model.head")
    assert enc.module_type == head.module_type == "stlora.STLoraLinear"
    assert enc.available_adapters == ["default", "oslo"]
    assert head.available_adapters == ["oslo"]
    assert enc.requires_grad == {"default": True, "oslo": False}
    status = model.get_model_status()
    assert status.peft_types == {"default": "STLORA", "oslo": "STLORA"}
    assert status.adapter_model_type == "STLoraModel"
    assert status.active_adapters == ["default"]
    assert status.num_adapter_layers == 2
    assert status.enabled is True
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_status_of_a_city_is_of_one_mind() -> None:
    model = adapted("city", "embedding", modules_to_save=["head"])
    status = model.get_model_status()
    assert status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]}
    assert status.merged_adapters == []
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def test_adapter_name_with_a_dot_is_refused_before_anything_changes() -> None:
    model = toy("linear")
    before = snapshot(model)
    assert raised(lambda: get_peft_model(model, config("linear"), adapter_name="city.one")) == {
        "where": "stlora adapter 'city.one' cannot have this name",
        "expected": "a name without dots",
        "got": "'city.one'",
        "fix": "name the adapter after its city, e.g. 'shenzhen'",
    }
    assert_unchanged(model, before)


def test_only_adapter_may_be_named_like_a_module(tmp_path: Path) -> None:
    model = get_peft_model(toy("linear"), config("linear"), adapter_name="enc").eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy("linear"), tmp_path / "enc", adapter_name="head")
    assert torch.equal(forecast(loaded), forecast(model))


@pytest.mark.parametrize(("first", "second"), [("default", "enc"), ("enc", "oslo")])
def test_one_of_several_adapters_named_like_a_module_is_refused(first: str, second: str) -> None:
    model = get_peft_model(toy("linear"), config("linear"), adapter_name=first).eval()
    expected = forecast(model)
    assert raised(lambda: model.add_adapter(second, config("linear"))) == {
        "where": "stlora adapter 'enc' cannot have this name beside other adapters",
        "expected": "a name that no part of the backbone has",
        "got": "the name of module 'enc'",
        "fix": "name the adapter after its city, e.g. 'shenzhen'",
    }
    assert list(model.peft_config) == [first]
    assert torch.equal(forecast(model), expected)


# -- without a PeftModel ----------------------------------------------------------------------------------------------


@on_every_toy
def test_injected_adapter_round_trips(name: str, conditioning: str) -> None:
    model = inject_adapter_in_model(config(name, conditioning), toy(name)).eval()
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(config(name, conditioning), toy(name), low_cpu_mem_usage=True).eval()
    assert all(value.is_meta for key, value in other.named_parameters() if PREFIX in key and "norm" not in key)
    result = set_peft_model_state_dict(other, state, low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    assert torch.equal(forecast(other), forecast(model))


@on_city
@on_both_memory_modes
def test_injection_from_a_state_dict_finds_the_same_layers(conditioning: str, low_cpu_mem_usage: bool) -> None:
    state = get_peft_model_state_dict(inject_adapter_in_model(config("linear", conditioning), toy("linear")))
    model = inject_adapter_in_model(
        config("linear", conditioning), toy("linear"), state_dict=state, low_cpu_mem_usage=low_cpu_mem_usage
    )
    found = get_peft_model_state_dict(model)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in state.items()}
    assert {value.is_meta for value in found.values()} == {low_cpu_mem_usage}


# -- the backbone's own state -----------------------------------------------------------------------------------------


def test_statistics_of_a_frozen_backbone_do_not_drift() -> None:
    model = adapted("city")
    frozen = model.base_model.model.batch_norm
    before = copy.deepcopy(frozen.state_dict())
    train_step(model)
    model.train()
    assert not frozen.training
    assert model.base_model.model.enc.training
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key])


def test_statistics_of_a_node_bound_module_follow_the_city() -> None:
    model = adapted("city")
    norm = model.base_model.model.norm
    base, own = norm.base_layer.running_mean.clone(), norm.nall_node_bound["default"].running_mean.clone()
    train_step(model)
    assert torch.equal(norm.base_layer.running_mean, base)
    assert not torch.equal(norm.nall_node_bound["default"].running_mean, own)


def test_injected_backbone_holds_its_statistics_until_it_is_set_to_train() -> None:
    model = inject_adapter_in_model(config("city"), toy("city").train())
    before = model.batch_norm.running_mean.clone()
    forecast(model)
    assert torch.equal(model.batch_norm.running_mean, before)
    model.train()  # the backbone's own method, which knows nothing of adapters
    forecast(model)
    assert not torch.equal(model.batch_norm.running_mean, before)


def test_joint_training_moves_backbone_and_adapter() -> None:
    model = adapted("city", freeze_backbone=False, modules_to_save=["head"])
    before = copy.deepcopy(model.state_dict())
    train_step(model)
    for key in ("enc.base_layer.weight", "batch_norm.running_mean", "batch_norm.weight", "enc.nall_A.default"):
        key = f"base_model.model.{key}"
        assert not torch.equal(model.state_dict()[key], before[key]), key
    key = "base_model.model.head.original_module.weight"
    assert torch.equal(model.state_dict()[key], before[key])


def test_backbone_trains_only_while_a_joint_adapter_is_active() -> None:
    model = adapted("linear")
    model.add_adapter("joint", config("linear", freeze_backbone=False))
    weight = model.base_model.model.enc.base_layer.weight
    assert not weight.requires_grad
    model.set_adapter("joint")
    assert weight.requires_grad
    model.set_adapter("default")
    assert not weight.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_unload_gives_the_pristine_backbone_back(name: str) -> None:
    model = adapted(name, "embedding", modules_to_save=["head"])
    train_step(model)
    bare = model.unload()
    assert not [m for m in bare.modules() if isinstance(m, (STLoraLayer, ModulesToSaveWrapper))]
    assert {key: type(m) for key, m in bare.named_modules()} == {key: type(m) for key, m in toy(name).named_modules()}
    assert not bare._forward_hooks
    assert not hasattr(bare, "peft_config")
    if name != "city":  # the head was trained, and PEFT's unload keeps what was trained whole
        bare.head = toy(name).head
        assert torch.equal(forecast(bare), forecast(toy(name)))


def test_unloaded_backbone_takes_a_new_adapter_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    bare = adapted("city", "embedding").unload()
    get_peft_model(bare, config("city", "embedding"))
    assert not [str(w.message) for w in recwarn if "modify a model" in str(w.message)]


def test_shared_module_is_adapted_under_both_parents(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleDict({"lin": nn.Linear(3, 3)})
            self.right = nn.ModuleDict({"lin": self.left["lin"]})

        def forward(self, x: Tensor) -> Tensor:
            return self.right["lin"](self.left["lin"](x))

    torch.manual_seed(0)
    backbone = Twice()
    pristine = copy.deepcopy(backbone)
    options = {"num_nodes": NODES, "target_modules": ["lin"], "conditioning": "gate", "predictor": None}
    model = get_peft_model(backbone, STLoraConfig(lora_dropout=0.0, init_weights=False, **options))
    assert isinstance(model.base_model.model.left["lin"], STLoraLinear)
    assert model.base_model.model.right["lin"] is model.base_model.model.left["lin"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path)
    assert torch.equal(forecast(loaded), forecast(model))
    bare = model.unload()
    assert bare.right["lin"] is bare.left["lin"]
    assert torch.equal(forecast(bare), forecast(pristine))


def test_sequential_backbone_works_and_refuses_what_it_would_call_as_a_layer() -> None:
    backbone = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    before = snapshot(backbone)
    lines = raised(
        lambda: get_peft_model(backbone, STLoraConfig(num_nodes=NODES, target_modules=["0"], conditioning="embedding"))
    )
    assert lines["where"] == "a Sequential cannot hold node vectors or a predictor"
    assert_unchanged(backbone, before)
    base = forecast(backbone)
    options = {"num_nodes": NODES, "target_modules": ["0", "2"], "conditioning": "gate", "predictor": None}
    model = get_peft_model(backbone, STLoraConfig(**options))
    assert torch.equal(forecast(model), base)
    assert isinstance(model.base_model.model[0], STLoraLinear)


@pytest.mark.parametrize("value", [{"a": 1}, argparse.Namespace(a=1), None], ids=["dict", "namespace", "none"])
def test_backbone_with_a_config_of_its_own_is_adapted(value: object, tmp_path: Path) -> None:
    backbone = toy("linear")
    backbone.config = value
    model = get_peft_model(backbone, config("linear"))
    model.save_pretrained(tmp_path)
    assert torch.equal(forecast(PeftModel.from_pretrained(toy("linear"), tmp_path)), forecast(model))


def test_backbone_with_a_config_that_peft_cannot_save_is_refused() -> None:
    backbone = toy("linear")
    backbone.config = SimpleNamespace(a=1)
    before = snapshot(backbone)
    assert raised(lambda: get_peft_model(backbone, config("linear"))) == {
        "where": "the attribute 'config' of the backbone cannot be read by PEFT, which does so when it saves",
        "expected": "a dict, a dataclass, an argparse.Namespace or an object with to_dict()",
        "got": "a SimpleNamespace",
        "fix": "backbone.config = vars(backbone.config), or give the attribute another name",
    }
    assert_unchanged(backbone, before)
    backbone.config = vars(backbone.config)
    assert get_peft_model(backbone, config("linear"))(window()).shape == (2, 2, NODES, 1)


def test_number_of_nodes_is_asked_for_before_anything_changes() -> None:
    model = toy("linear")
    before = snapshot(model)
    assert raised(lambda: get_peft_model(model, STLoraConfig(target_modules=["enc"]))) == {
        "where": "stlora adapter 'default': the number of nodes is not known",
        "expected": "STLoraConfig(num_nodes=<N>)",
        "got": "num_nodes=None",
        "fix": "pass the number of nodes (sensors) of the city",
    }
    assert_unchanged(model, before)


def test_mixed_model_is_refused_by_peft() -> None:
    with pytest.raises(ValueError, match=re.escape("not compatible with the `PeftMixedModel`")):
        get_peft_model(toy("linear"), config("linear"), mixed=True)


def test_city_toy_is_of_the_size_of_its_city() -> None:
    assert CityToy(nn.Linear(3, 8), 7)(window(num_nodes=7)).shape == (2, 2, 7, 1)
