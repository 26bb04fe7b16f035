"""Noise of the node vectors in training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from toys import adapted, randomised, small_backbone

from stlora_peft import STLoraConfig
from stlora_peft.serving.members import take_apart

N, SIGMA, SEED = 5, 0.7, 3
EDGES = torch.tensor([[0, 1, 2], [1, 2, 3]])


def city(emb_noise: float = SIGMA, backbone: str = "lstm") -> PeftModel:
    config = STLoraConfig(num_nodes=N, r=2, emb_size=3, emb_noise=emb_noise, lora_dropout=0.0)
    return randomised(get_peft_model(small_backbone(backbone).double(), config)).double()


def window() -> Tensor:
    return torch.rand(2, 9, N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def table(model: PeftModel, name: str = "default") -> Tensor:
    return model.get_base_model().stlora_nodes.nall_emb[name]


@contextmanager
def moved_by_the_noise_of(model: PeftModel, seed: int) -> Iterator[None]:
    """Add to the vectors what the first pass after this seed adds in training."""
    torch.manual_seed(seed)
    noise = SIGMA * torch.randn_like(table(model))
    with torch.no_grad():
        table(model).add_(noise)
    yield
    with torch.no_grad():
        table(model).sub_(noise)


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(window(), EDGES).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_pass_in_training_is_that_of_vectors_which_the_same_noise_has_moved_in_all_layers():
    model = city().train()
    torch.manual_seed(SEED)
    found = model(window(), EDGES)
    torch.manual_seed(SEED)
    found_gradients = gradients(model)
    with moved_by_the_noise_of(model.eval(), SEED):
        assert torch.equal(found, model(window(), EDGES))
        expected = gradients(model)
    assert found_gradients.keys() == expected.keys()
    assert {name for name in expected if "nall_emb" in name}
    for name, gradient in expected.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_every_pass_in_training_has_its_own_noise_and_evaluation_has_none():
    model, without = city().train(), city(emb_noise=0.0).eval()
    assert not torch.equal(model(window(), EDGES), model(window(), EDGES))
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(window(), EDGES), without(window(), EDGES))
    assert torch.equal(state, torch.get_rng_state())


def test_noise_has_the_deviation_of_the_configuration():
    nodes = city().train().get_base_model().stlora_nodes
    drawn = []
    for _ in range(4000):
        nodes.forget_noise()
        drawn.append((nodes.vectors("default") - nodes.nall_emb["default"]).detach())
    noise = torch.stack(drawn)
    assert noise.std(0).sub(SIGMA).abs().max() < 0.06
    assert noise.mean(0).abs().max() < 0.06


def test_without_noise_training_draws_nothing():
    model = city(emb_noise=0.0).train()
    state = torch.get_rng_state()
    assert torch.equal(model(window(), EDGES), model(window(), EDGES))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("backbone", ["lstm", "gconvgru"])
def test_an_untrained_adapter_leaves_the_forecast_bit_for_bit_in_training_too(backbone):
    plain = small_backbone(backbone).train()
    model = get_peft_model(copy.deepcopy(plain), STLoraConfig(num_nodes=N)).train()
    x = window().float()
    assert model.peft_config["default"].emb_noise > 0
    assert torch.equal(model(x, EDGES), plain(x, EDGES))


def test_noise_is_not_saved_and_not_served(tmp_path):
    model = city().train()
    vectors = table(model).detach().clone()
    model(window(), EDGES)
    parts = take_apart(model, "default", torch.device("cpu"))
    assert torch.equal(parts.vectors, vectors)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(small_backbone("lstm").double(), tmp_path)
    assert torch.equal(table(again), vectors)
    assert again.peft_config["default"].emb_noise == SIGMA


def test_each_adapter_has_its_own_noise_until_it_is_deleted():
    model = city().train()
    model.add_adapter("oslo", STLoraConfig(num_nodes=N, r=2, emb_size=3, emb_noise=0.0, lora_dropout=0.0))
    nodes = model.get_base_model().stlora_nodes
    assert nodes.emb_noise == {"default": SIGMA, "oslo": 0.0}
    model.set_adapter("oslo")
    assert torch.equal(model(window(), EDGES), model(window(), EDGES))
    model.delete_adapter("default")
    assert nodes.emb_noise == {"oslo": 0.0}


def test_unloading_takes_the_hook_off():
    model = city()
    backbone = model.get_base_model()
    assert len(backbone._forward_pre_hooks) == 1
    model.add_adapter("oslo", STLoraConfig(num_nodes=N, r=2, emb_size=3))
    assert len(backbone._forward_pre_hooks) == 1
    model.unload()
    assert not backbone._forward_pre_hooks
    assert not hasattr(backbone, "stlora_nodes")


def test_other_forms_have_no_vectors_and_no_noise():
    model = adapted(torch.nn.Linear(3, 3), N, conditioning="gate", emb_noise=5.0).train()
    x = torch.rand(2, N, 3, dtype=torch.float64)
    assert torch.equal(model(x), model(x))
    assert not model.get_base_model()._forward_pre_hooks
