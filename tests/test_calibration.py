"""The predictor's start in closed form, against loops in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_city import small_city, small_data
from torch import Tensor, nn
from toys import raised, small_backbone

from stlora_peft import STLoraConfig
from stlora_peft.evaluation import evaluate
from stlora_peft.methods import METHODS, build_adapter, calibrated
from stlora_peft.tuner.calibration import calibrate

N, RIDGE = 5, 1e-3


def adapter(conditioning: str = "embedding", **options: Any) -> PeftModel:
    config = STLoraConfig(num_nodes=N, conditioning=conditioning, **{"r": 3, "emb_size": 4, **options})
    return get_peft_model(small_backbone("lstm"), config)


def batches(parts: int = 3, holes: bool = True) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Windows of the toy backbone and truths that differ from node to node."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(parts):
        x = torch.randn(20, 9, N, 3, generator=generator)
        truth = x[:, -4:, :, :1] * 0.5 + torch.arange(N)[:, None] + torch.randn(20, 4, N, 1, generator=generator)
        if holes:
            truth[torch.rand(truth.shape, generator=generator) < 0.1] = torch.nan
        found.append(({"x": x, "edge_index": torch.zeros(2, 0, dtype=torch.long)}, truth))
    return found


def error(model: nn.Module, data: list[tuple[dict[str, Tensor], Tensor]]) -> float:
    with torch.no_grad():
        parts = [(model(**arguments) - truth).abs().flatten() for arguments, truth in data]
    errors = torch.cat(parts)
    return float(errors[errors.isfinite()].mean())


def vectors_of(model: PeftModel) -> Any:
    """What gives the predictor its node vectors, where the form has some."""
    table = getattr(model.base_model.model, "stlora_nodes", None)
    return None if table is None else lambda: table.nall_emb["default"]


def inputs_of(model: PeftModel, data: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[Tensor, Tensor]:
    """Features of the predictor and what the backbone misses, from its own parts."""
    predictor = model.base_model.model.stlora_predictor.nall_predictor["default"]
    z, missing = [], []
    with torch.no_grad(), model.disable_adapter():
        for arguments, truth in data:
            forecast = model(**arguments)
            z.append(predictor.features(arguments["x"], forecast, vectors_of(model)).double())
            missing.append((truth - forecast).double().permute(0, 2, 1, 3).flatten(2))
    return torch.cat(z), torch.cat(missing)


def test_regression_is_that_of_a_loop_over_the_outputs() -> None:
    model, data = adapter().eval(), batches()
    z, missing = inputs_of(model, data)
    calibrate(model, data, RIDGE)
    predictor = model.base_model.model.stlora_predictor.nall_predictor["default"]
    rows = torch.cat([z.flatten(0, 1), torch.ones(z.shape[0] * N, 1, dtype=torch.float64)], dim=1)
    for out in range(missing.shape[2]):
        truth = missing[..., out].flatten()
        known = truth.isfinite()
        a, y = rows[known], truth[known]
        penalty = RIDGE * len(y) * torch.diag(torch.tensor([1.0] * (a.shape[1] - 1) + [1e-6], dtype=torch.float64))
        solution = torch.zeros(a.shape[1], dtype=torch.float64)
        for _ in range(15):
            weight = torch.diag(1 / (y - a @ solution).abs().clamp(min=0.02))
            solution = torch.linalg.solve(a.T @ weight @ a + penalty, a.T @ weight @ y)
        torch.testing.assert_close(predictor.weight_out[out].double(), solution[:-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(predictor.bias_out[out].double(), solution[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["embedding", "gate", "bias"])
def test_node_bias_is_the_median_of_what_is_left_at_the_node_where_the_rank_suffices(conditioning: str) -> None:
    model, data = adapter(conditioning, r=4).eval(), batches()  # 4 outputs: rank 4 holds the medians exactly
    z, missing = inputs_of(model, data)
    calibrate(model, data, RIDGE)
    predictor = model.base_model.model.stlora_predictor.nall_predictor["default"]
    shared = z @ predictor.weight_out.double().T + predictor.bias_out.double()
    medians = (missing - shared).nanmedian(dim=0).values
    with torch.no_grad():
        for arguments, _ in data:
            with model.disable_adapter():
                forecast = model(**arguments)
            found = (model(**arguments) - forecast).double().permute(0, 2, 1, 3).flatten(2)
            features = predictor.features(arguments["x"], forecast, vectors_of(model)).double()
            expected = features @ predictor.weight_out.double().T
            torch.testing.assert_close(found, expected + predictor.bias_out.double() + medians, rtol=0, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["embedding", "gate", "bias", "core", "full"])
def test_calibrated_adapter_forecasts_better_and_changes_nothing_but_the_output_layer(conditioning: str) -> None:
    model, data = adapter(conditioning), batches()
    before = copy.deepcopy(model.state_dict())
    start = error(model.eval(), data)
    model.train()
    calibrate(model, data, RIDGE)
    assert model.training
    assert error(model.eval(), data) < 0.8 * start
    changed = {
        name.rpartition("default.")[2]
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    allowed = {"weight_out", "bias_out", "A_out", "B_out", "node_bias_out", "node_bias_map_out", "node_vector_out"}
    assert {name for name in changed if "emb" not in name} <= allowed
    assert {"weight_out", "bias_out"} <= changed


def test_calibrated_adapter_goes_through_its_file(tmp_path: Any) -> None:
    model, data = adapter().eval(), batches(1)
    calibrate(model, data)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_backbone("lstm"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**data[0][0]), model(**data[0][0]))


def test_calibrate_takes_batches_as_they_come() -> None:
    def stream() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        yield from batches()

    one, other = adapter().eval(), adapter().eval()
    other.load_state_dict(one.state_dict())
    calibrate(one, batches())
    calibrate(other, stream())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_calibrate_without_a_predictor_raises() -> None:
    assert raised(lambda: calibrate(adapter(predictor=None), batches())) == {
        "where": "there is no predictor to calibrate",
        "expected": "one active adapter with a node-specific predictor",
        "got": "active default, with a predictor none",
        "fix": "make the adapter with predictor='auto' or a PredictorConfig, and make it the active one",
    }


def test_calibrate_without_a_truth_raises_and_changes_nothing() -> None:
    model, data = adapter(), [(arguments, truth * torch.nan) for arguments, truth in batches()]
    before = copy.deepcopy(model.state_dict())
    assert raised(lambda: calibrate(model, data)) == {
        "where": "there is nothing to calibrate with",
        "expected": "batches with at least one measured truth",
        "got": "3 batches without any",
        "fix": "give more days",
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibrated_city_is_better_than_zero_shot_and_trains_nothing() -> None:
    data = small_data(small_city(num_nodes=5))
    torch.manual_seed(0)
    backbone = small_backbone("lstm", window=12, horizon=12)
    plus = METHODS["zero-shot+"].build(backbone, data).model
    zero = METHODS["zero-shot"].build(backbone, data).model
    assert evaluate(plus, data.test, data).mae < 0.9 * evaluate(zero, data.test, data).mae
    again = calibrated(build_adapter(backbone, data, lora_dropout=0.0), data)
    assert evaluate(again, data.test, data).mae < 0.9 * evaluate(zero, data.test, data).mae
