"""Half precision, compilation, checkpointing, copies, pickles and other processes."""

from __future__ import annotations

import copy
import io
import multiprocessing
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from contract_toys import CASES, GRID, NODES, Toy, adapted, config, forecast, toy, train_step, window
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import CONDITIONINGS

from stlora_peft import STLoraConfig, STLoraModel
from stlora_peft.tuner.registration import PREFIX, register

HALF = [torch.bfloat16, torch.float16]
PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)
on_every_toy = pytest.mark.parametrize(("name", "conditioning"), GRID)


# -- precision --------------------------------------------------------------------------------------------------------


def half(name: str, conditioning: str, dtype: torch.dtype, autocast_adapter_dtype: bool) -> PeftModel:
    """A toy in half precision with the adapter of :func:`adapted`."""
    backbone = toy(name).to(dtype)
    model = get_peft_model(backbone, config(name, conditioning), autocast_adapter_dtype=autocast_adapter_dtype)
    set_peft_model_state_dict(model, get_peft_model_state_dict(adapted(name, conditioning)))
    return model.eval()


@on_every_toy
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_backbone_works(
    name: str, conditioning: str, dtype: torch.dtype, autocast_adapter_dtype: bool
) -> None:
    model = half(name, conditioning, dtype, autocast_adapter_dtype)
    own = {p.dtype for key, p in model.named_parameters() if PREFIX in key}
    assert own == {torch.float32 if autocast_adapter_dtype else dtype}
    out = model(window().to(dtype))
    assert out.dtype is dtype
    expected = forecast(adapted(name, conditioning))
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1 * float(expected.detach().abs().max()))
    out.sum().backward()
    grads = [p.grad for key, p in model.named_parameters() if PREFIX in key]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_float32_adapter_on_half_precision_backbone_round_trips(
    name: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = half(name, "embedding", torch.bfloat16, autocast_adapter_dtype=True).requires_grad_(False)
    model.save_pretrained(tmp_path)
    base = toy(name).to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    x = window().bfloat16()
    assert torch.equal(loaded(x), model(x))


@on_every_toy
def test_autocast_stays_close_to_float32(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning)
    expected = forecast(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(window())
        out.float().square().mean().backward()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1 * float(expected.abs().max()))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_input_in_another_precision_is_cast_for_the_update() -> None:
    model = adapted("linear").double()
    model.base_model.model.enc.nall_A["default"].data = model.base_model.model.enc.nall_A["default"].data.float()
    enc = adapted("linear").base_model.model.enc.double()
    for name in ("A", "B", "gate", "node_bias"):
        getattr(enc, f"nall_{name}").float()
    x = window().double()
    torch.testing.assert_close(enc(x), adapted("linear").double().base_model.model.enc(x), rtol=0, atol=1e-5)


def test_input_casting_can_be_switched_off() -> None:
    model = adapted("linear")
    enc = model.base_model.model.enc
    for name in ("A", "B", "gate", "node_bias"):
        getattr(enc, f"nall_{name}").half()
    updates: dict[bool, Tensor] = {}
    for active in (False, True):
        with disable_input_dtype_casting(model, active=active):
            updates[active] = enc.update(window(), "default")
    assert updates[False].dtype is torch.float16  # the input goes down to the adapter's precision
    assert updates[True].dtype is torch.float32  # the adapter comes up to the input's
    assert enc.update(window(), "default").dtype is torch.float16
    torch.testing.assert_close(updates[True], updates[False].float(), rtol=0, atol=0.01)


# -- checkpointing and compilation ------------------------------------------------------------------------------------


class Checkpointed(Toy):
    """The toy with a linear layer that is run again in the backward pass."""

    reentrant = False

    def encode(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.enc, x, use_reentrant=self.reentrant)
        return hidden.mean(1)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing(conditioning: str, reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = adapted("linear", conditioning)
        if checkpointed:
            model.base_model.model.__class__ = Checkpointed
            model.base_model.model.reentrant = reentrant
        model(window().requires_grad_()).square().sum().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) > 1
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-5, atol=1e-6)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_gives_the_same_forecast_and_gradients(conditioning: str, backend: str) -> None:
    model = adapted("linear", conditioning)
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    x = window()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    for each in (model, compiled):
        each(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            other = compiled.get_parameter(f"_orig_mod.{key}").grad
            torch.testing.assert_close(other, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["linear", "conv2d", "city"])
def test_compiled_model_follows_a_switch_of_adapters(name: str) -> None:
    model = adapted(name)
    model.add_adapter("oslo", config(name))
    expected = {}
    for adapter in ("default", "oslo"):
        model.set_adapter(adapter)
        expected[adapter] = forecast(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for adapter in ("default", "oslo", "default"):
        model.set_adapter(adapter)
        torch.testing.assert_close(forecast(compiled), expected[adapter], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(forecast(compiled), forecast(toy(name)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forecast(compiled), expected["default"], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_training_step_equals_the_plain_one() -> None:
    model = adapted("linear", "core")
    other = copy.deepcopy(model)
    train_step(model)
    train_step(torch.compile(other, backend="aot_eager"))
    torch.testing.assert_close(forecast(other), forecast(model), rtol=1e-5, atol=1e-5)


# -- copies and pickles -----------------------------------------------------------------------------------------------


@on_every_toy
def test_copy_is_independent(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning)
    before = forecast(model)
    other = copy.deepcopy(model)
    assert torch.equal(forecast(other), before)
    train_step(other)
    assert not torch.equal(forecast(other), before)
    assert torch.equal(forecast(model), before)
    for layer in (m for m in other.modules() if hasattr(m, "node_table") and m.node_table):
        assert layer.node_table["default"] is other.base_model.model.stlora_nodes


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_config_pickles(protocol: int) -> None:
    given = config("city", "core", rank_pattern={"enc": 3})
    found = pickle.loads(pickle.dumps(given, protocol))
    assert found == given
    assert found.peft_type is PeftType.STLORA
    for other in (copy.copy(given), copy.deepcopy(given)):
        assert other.to_dict() == given.to_dict()
        assert other.peft_type is PeftType.STLORA


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("pickler", [pickle.dumps, pickle._dumps], ids=["c", "python"])
def test_bare_type_pickles(protocol: int, pickler: object) -> None:
    member = STLoraConfig().peft_type
    assert pickle.loads(pickler(member, protocol)) is member  # type: ignore[operator]
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(PeftType.LORA, protocol)) is PeftType.LORA


def test_type_is_a_member_like_any_other() -> None:
    member = PeftType.STLORA
    assert PeftType("STLORA") is PeftType["STLORA"] is member
    assert member in list(PeftType)
    assert member == "STLORA"
    assert hash(member) == hash("STLORA")
    assert (member.name, member.value, str(member)) == ("STLORA", "STLORA", "PeftType.STLORA")
    assert len(set(PeftType)) == len(list(PeftType)) == len(PeftType.__members__)


def test_registering_again_changes_nothing() -> None:
    register(STLoraConfig, STLoraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.STLORA] is STLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["STLORA"] is STLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.STLORA] == PREFIX == "nall_"


def test_another_owner_of_the_type_is_not_replaced() -> None:
    class Other:
        pass

    with pytest.raises(ImportError) as caught:
        register(Other, STLoraModel)
    assert str(caught.value).split("\n") == [
        "stlora_peft cannot register with PEFT.",
        "  expected: the adapter type 'STLORA' to be free",
        "  got:      it is registered by stlora_peft.tuner.config.STLoraConfig",
        "  to fix:   do not import both packages in one process",
    ]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.STLORA] is STLoraConfig


# -- other processes --------------------------------------------------------------------------------------------------

FRESH = """
import pickle, sys, torch
member = pickle.loads(bytes.fromhex(sys.argv[1]))  # before anything imported the package
from peft.utils.peft_types import PeftType
assert member is PeftType("STLORA") is PeftType.STLORA
model = torch.load(sys.argv[2], weights_only=False)
expected = torch.load(sys.argv[3])
assert torch.equal(model(expected["x"]), expected["y"])
assert model.peft_config["default"].peft_type is member

import importlib
import stlora_peft, stlora_peft.tuner.config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
old = stlora_peft.STLoraConfig
importlib.reload(stlora_peft.tuner.config)
importlib.reload(stlora_peft)
assert stlora_peft.STLoraConfig is not old
assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is stlora_peft.STLoraConfig
for name in [name for name in sys.modules if name.startswith("stlora_peft")]:
    del sys.modules[name]
import stlora_peft
assert PEFT_TYPE_TO_CONFIG_MAPPING["STLORA"] is stlora_peft.STLoraConfig
assert stlora_peft.STLoraConfig().peft_type is member is PeftType.STLORA
layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
import peft
config = stlora_peft.STLoraConfig(num_nodes=3, target_modules=["0"], conditioning="gate", predictor=None)
print(peft.get_peft_model(layer, config)(torch.ones(1, 3, 2)).shape)
"""


def test_fresh_process_reads_pickles_and_can_reload_the_package(tmp_path: Path) -> None:
    options = {"num_nodes": NODES, "target_modules": ["0"], "conditioning": "gate", "predictor": None}
    model = get_peft_model(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh()), STLoraConfig(lora_dropout=0.0, init_weights=False, **options)
    )
    torch.save(model, tmp_path / "model.pt")
    x = window()
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "expected.pt")
    member = pickle.dumps(PeftType.STLORA).hex()
    paths = os.pathsep.join(path for path in sys.path if path)  # the same PEFT as here
    done = subprocess.run(
        [sys.executable, "-c", FRESH, member, str(tmp_path / "model.pt"), str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 3, 2])"


def test_spawned_process_takes_and_returns_configs() -> None:
    given = config("city", "embedding")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(operator.itemgetter("peft_type"), (given.to_dict(),)) is PeftType.STLORA
        assert pool.apply(operator.methodcaller("to_dict"), (given,)) == given.to_dict()


@on_every_toy
def test_model_saved_whole_comes_back(name: str, conditioning: str) -> None:
    model = adapted(name, conditioning)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(forecast(torch.load(file, weights_only=False)), forecast(model))
