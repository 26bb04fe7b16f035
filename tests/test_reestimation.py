"""Statistics of node-bound normalisation against numpy over everything that was seen."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from node_bound_toys import Normalised, city_batches, city_model
from peft import get_peft_model
from torch import Tensor, nn
from toys import graph, small_backbone, windows

from stlora_peft import STLoraConfig, rebuild, reestimate


def hidden(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[np.ndarray]:
    """What the normalisation is given."""
    lin = model.lin if isinstance(model, Normalised) else model.base_model.model.lin
    return [lin(batch["x"]).transpose(1, 2).detach().numpy() for batch in batches]


@pytest.mark.parametrize("adapted", [False, True])
def test_reestimate_equals_mean_and_variance_over_all_batches(adapted):
    model = city_model() if adapted else rebuild(Normalised(5), 7, ["norm"])
    batches = city_batches()
    assert reestimate(model, batches, None if adapted else ["norm"]) == 1
    norm = model.base_model.model.norm.current() if adapted else model.norm
    mean, variance = reference.normalisation_statistics(hidden(model, batches))
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-12)
    assert int(norm.num_batches_tracked) == 3


@pytest.mark.parametrize("training", [True, False])
def test_reestimate_restores_modes_and_touches_nothing_else(training):
    model = city_model(lora_dropout=0.5).train(training)
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert reestimate(model, city_batches()) == 1
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    copies = "base_model.model.norm.nall_node_bound.default."
    assert changed == {copies + name for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_reestimate_twice_gives_the_same_statistics():
    model = city_model()
    reestimate(model, city_batches())
    once = copy.deepcopy(model.state_dict())
    reestimate(model, city_batches())
    for name, value in model.state_dict().items():
        assert torch.equal(value, once[name])


def test_reestimate_without_batches_keeps_the_statistics():
    model = city_model()
    before = copy.deepcopy(model.state_dict())
    reestimate(model, [])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_reestimate_after_an_error_keeps_the_statistics_and_modes():
    model = city_model().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="wrong number of nodes"):
        reestimate(model, [*city_batches()[:1], {"x": torch.zeros(2, 6, 9, 3).double()}])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.training
    assert model.base_model.model.norm.current().training


def test_reestimate_never_touches_the_statistics_of_the_old_city():
    model = city_model(5)
    model.add_adapter("plain", STLoraConfig(num_nodes=5, target_modules=["lin"], predictor=None))
    model.set_adapter("plain")
    before = copy.deepcopy(model.state_dict())
    assert reestimate(model, city_batches(5)) == 0
    with model.disable_adapter():
        assert reestimate(model, city_batches(5)) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_reestimate_of_two_norms_in_a_row_normalises_the_first_by_the_batch():
    model = get_peft_model(small_backbone("stgcn", 5).double(), STLoraConfig(num_nodes=7))
    edge_index, edge_weight = graph(7)
    batches = [
        {"x": windows(7, seed=s).double(), "edge_index": edge_index, "edge_weight": edge_weight} for s in (0, 1)
    ]
    assert reestimate(model, batches) == 2
    for name in ("block1", "block2"):
        norm = getattr(model.base_model.model, name)._batch_norm.current()
        assert norm.running_mean.std() > 0
        assert (norm.running_var > 0).all()
    assert reestimate(get_peft_model(small_backbone("lstm"), STLoraConfig(num_nodes=7)), batches) == 0
