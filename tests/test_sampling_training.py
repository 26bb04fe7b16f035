"""Training on parts of a graph: the numbers of the whole graph where the parts allow it, and the memory of a part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_city import small_city, small_data
from toys import randomised, small_backbone

from stlora_peft import STLoraConfig, reestimate
from stlora_peft.data import CityData
from stlora_peft.evaluation import evaluate
from stlora_peft.methods import forward_batches
from stlora_peft.sampling import PartBatches, city_parts, evaluate_parts, reestimate_parts
from stlora_peft.sampling.trainer import _check_one_process
from stlora_peft.training import TrainingOptions, train

N = 12
PARTS = TrainingOptions(max_epochs=2, progress=False, learning_rate=3e-3, nodes_per_step=6, hops=2, batch_size=64)


@pytest.fixture(scope="module")
def data() -> CityData:
    return small_data(small_city(N), days=5)


def adapter(name: str = "stgcn", **options: Any) -> PeftModel:
    backbone = small_backbone(name, N, window=12, horizon=12)
    options = {"num_nodes": N, "r": 2, "emb_size": 3, "conditioning": "gate", "lora_dropout": 0.0} | options
    torch.manual_seed(0)
    return get_peft_model(backbone, STLoraConfig(**options))


def same(one: PeftModel, other: PeftModel) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_pass_meets_every_window_at_every_node_once(data: CityData) -> None:
    batches = PartBatches(data.train, city_parts(data, 5, 1), batch_size=50, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        seen = torch.zeros(N, len(data.train))
        for index in range(len(batches)):
            batch = batches.__getitems__([index])
            part = city_parts(data, 5, 1)[int(batch["part"])]
            rows = batch["start"] - data.train.starts[0]
            seen[part.core[:, None], rows] += 1
            whole = data.train.__getitems__(rows.tolist())
            assert torch.equal(batch["x"], whole["x"][:, :, part.node_ids])
            torch.testing.assert_close(batch["y"], whole["y"][:, :, part.core], equal_nan=True, rtol=0, atol=0)
        assert bool((seen == 1).all())
        orders.append([batches[index]["start"].tolist() for index in range(len(batches))])
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("conditioning", ["gate", "full", "embedding"])
def test_one_part_trains_as_the_whole_graph(data: CityData, conditioning: str) -> None:
    """One batch a pass, so that the order of the windows is none: optimiser, clipping and average are the same."""
    options = replace(PARTS, nodes_per_step=N, batch_size=len(data.train), max_epochs=4, max_grad_norm=0.5)
    options = replace(options, weight_decay=0.1)
    parts, whole = adapter(conditioning=conditioning), adapter(conditioning=conditioning)
    found = train(parts, data, options)
    expected = train(whole, data, replace(options, nodes_per_step=None, cache_frozen=False))
    assert expected.best_epoch == 4
    for one, other in zip(found.history, expected.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for (name, one), other in zip(parts.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


def test_validation_over_parts_is_that_of_the_whole_graph(data: CityData) -> None:
    model = randomised(adapter())
    expected = evaluate(model, data.val, data)
    found = evaluate_parts(model, data.val, data.scaler, city_parts(data, 4, 5), batch_size=50)
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert (one.mae, one.rmse, one.mape) == pytest.approx((other.mae, other.rmse, other.mape), rel=1e-5)
    result = train(model, data, replace(PARTS, hops=5, learning_rate=1e-12))
    assert result.history[0]["val_mae"] == pytest.approx(expected.mae, rel=1e-5)
    shallow = evaluate_parts(model, data.val, data.scaler, city_parts(data, 4, 0))
    assert shallow.mae != pytest.approx(expected.mae, rel=1e-3)


def test_statistics_over_parts_are_those_of_the_whole_graph(data: CityData) -> None:
    parts, whole = adapter(), adapter()
    start = adapter()
    reestimate(whole, forward_batches(data.train, data, 50))
    reestimate_parts(parts, data.train, city_parts(data, 4, 5), batch_size=50)
    changed = 0
    for (name, one), other, before in zip(
        parts.state_dict().items(), whole.state_dict().values(), start.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
        changed += not torch.equal(one, before)
    assert changed == 6  # mean, variance and count of two normalisations


def test_training_on_parts_reaches_every_node_and_helps(data: CityData) -> None:
    model, start = adapter(conditioning="core"), adapter(conditioning="core")
    result = train(model, data, replace(PARTS, max_epochs=4, learning_rate=2e-2))
    assert result.best_val_mae < 0.9 * result.history[0]["val_mae"]
    for (name, one), other in zip(model.named_parameters(), start.parameters(), strict=True):
        if one.requires_grad and one.shape[0] == N:
            assert (one != other).flatten(1).any(1).all() if one.ndim > 1 else (one != other).all(), name
        if not one.requires_grad:
            assert torch.equal(one, other)


def test_the_same_seed_gives_the_same_numbers_and_another_others(data: CityData) -> None:
    one, other, third = (adapter(lora_dropout=0.2) for _ in range(3))
    assert train(one, data, PARTS).history == train(other, data, PARTS).history
    assert same(one, other)
    train(third, data, replace(PARTS, seed=1))
    assert not same(one, third)


def test_resumed_equals_uninterrupted(data: CityData, tmp_path: Path) -> None:
    whole, broken, resumed = (adapter(lora_dropout=0.2) for _ in range(3))
    expected = train(whole, data, replace(PARTS, max_epochs=3))
    train(broken, data, replace(PARTS, max_epochs=1), output_dir=tmp_path)
    result = train(resumed, data, replace(PARTS, max_epochs=3), output_dir=tmp_path)
    assert result.history == expected.history
    assert same(resumed, whole)
    with pytest.raises(ValueError, match="hops 2 -> 1"):
        train(adapter(), data, replace(PARTS, hops=1), output_dir=tmp_path)


def test_training_without_validation_ends_in_the_average(data: CityData) -> None:
    model = adapter("lstm", conditioning="embedding")
    result = train(model, data, replace(PARTS, patience=None, max_steps=7))
    assert result.history[-1]["train_mae"] > 0
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_a_plain_backbone_trains_on_parts(data: CityData) -> None:
    backbone = small_backbone("stgcn", N, window=12, horizon=12)
    before = backbone.block2._batch_norm.running_mean.clone()
    result = train(backbone, data, PARTS)
    assert result.best_val_mae < result.history[0]["val_mae"]
    assert not (backbone.block2._batch_norm.running_mean == before).any()


def test_the_frozen_part_has_no_dropout_as_on_the_whole_graph(data: CityData) -> None:
    model = adapter("lstm", target_modules=[], lora_dropout=0.0)
    train(model, data, replace(PARTS, max_epochs=1))
    assert not any(module.training for module in model.base_model.model.lstm.modules())


@pytest.mark.parametrize(("option", "value", "lines"), [("nodes_per_step", 0, ">= 1"), ("hops", -1, ">= 0")])
def test_options_out_of_range_are_refused(option: str, value: int, lines: str) -> None:
    with pytest.raises(ValueError, match=f"training option '{option}' is out of range") as error:
        replace(PARTS, **{option: value})
    assert lines in str(error.value).splitlines()[1]


def test_options_of_parts_are_named_where_there_are_parts() -> None:
    assert PARTS.chosen("seed")["hops"] == 2
    assert "seed" not in PARTS.chosen("seed")
    assert {"nodes_per_step", "hops"}.isdisjoint(TrainingOptions().chosen())


def test_several_processes_are_refused() -> None:
    _check_one_process(1)
    with pytest.raises(ValueError, match="cannot be trained by several processes") as error:
        _check_one_process(2)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "one process" in lines[1]
    assert "2 processes" in lines[2]
    assert "nodes_per_step=None" in lines[3]
