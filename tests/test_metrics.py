import math

import numpy as np
import pytest
import torch

from stlora_peft.metrics import ErrorSums, Metrics, Scores, masked_mae

NAN = float("nan")


def loop(forecast: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    absolute, square, ratio = [], [], []
    for f, y in zip(forecast.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if math.isnan(y):
            continue
        absolute.append(abs(f - y))
        square.append((f - y) ** 2)
        if y != 0:
            ratio.append(abs((f - y) / y))
    return sum(absolute) / len(absolute), math.sqrt(sum(square) / len(square)), 100 * sum(ratio) / len(ratio)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    truth = rng.normal(20, 10, (7, 12, 3, 2))
    truth[rng.random(truth.shape) < 0.3] = np.nan
    truth[rng.random(truth.shape) < 0.2] = 0.0
    return rng.normal(20, 10, truth.shape), truth


def test_error_sums_in_batches_match_float64_loop_at_every_step(pair: tuple[np.ndarray, np.ndarray]) -> None:
    forecast, truth = pair
    sums = ErrorSums(horizon=12)
    for rows in (slice(0, 3), slice(3, 7)):
        sums.add(torch.from_numpy(forecast[rows]), torch.from_numpy(truth[rows]))
    metrics = sums.metrics()
    for step in range(12):
        scores = metrics.steps[step]
        assert (scores.mae, scores.rmse, scores.mape) == pytest.approx(loop(forecast[:, step], truth[:, step]))
    average = (metrics.mae, metrics.rmse, metrics.mape)
    assert average == pytest.approx(loop(forecast, truth), rel=1e-12)


def test_error_sums_average_weighs_truths_not_steps() -> None:
    sums = ErrorSums(horizon=2)
    truth = torch.tensor([[[[1.0]], [[1.0]]], [[[1.0]], [[NAN]]]])  # two truths at step 1, one at step 2
    sums.add(torch.tensor([[[[1.0]], [[4.0]]], [[[1.0]], [[9.0]]]]), truth)
    metrics = sums.metrics()
    assert [scores.mae for scores in metrics.steps] == [0.0, 3.0]
    assert metrics.mae == 1.0
    assert metrics.rmse == pytest.approx(math.sqrt(3))


def test_mape_with_zero_truths_only_is_nan_and_none_in_json() -> None:
    sums = ErrorSums(horizon=1)
    sums.add(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    scores = sums.metrics().average
    assert math.isnan(scores.mape)
    assert scores.to_dict() == {"mae": 1.0, "rmse": 1.0, "mape": None}


def test_error_sums_with_broken_forecast_are_nan() -> None:
    sums = ErrorSums(horizon=1)
    sums.add(torch.full((1, 1, 1, 1), NAN), torch.ones(1, 1, 1, 1))
    assert math.isnan(sums.metrics().mae)


@pytest.mark.parametrize(
    ("horizon", "keys"),
    [
        (12, ["3", "6", "12", "average"]),
        (24, ["3", "6", "12", "average"]),
        (6, ["3", "6", "average"]),
        (2, ["2", "average"]),
    ],
)
def test_to_dict_reports_the_steps_that_the_horizon_reaches(horizon: int, keys: list[str]) -> None:
    steps = tuple(Scores(float(step), 0.0, 0.0) for step in range(1, horizon + 1))
    rows = Metrics(steps=steps, average=Scores(0.0, 0.0, 0.0)).to_dict()
    assert list(rows) == keys
    for key in keys[:-1]:
        assert rows[key]["mae"] == float(key)


def test_masked_mae_and_gradient_match_loop(pair: tuple[np.ndarray, np.ndarray]) -> None:
    forecast, truth = pair
    leaf = torch.from_numpy(forecast).requires_grad_()
    loss = masked_mae(leaf, torch.from_numpy(truth))
    loss.backward()
    assert loss.item() == pytest.approx(loop(forecast, truth)[0], rel=1e-12)
    seen = ~np.isnan(truth)
    expected = np.where(seen, np.sign(forecast - np.nan_to_num(truth)), 0.0) / seen.sum()
    np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-12)


def test_masked_mae_without_any_truth_is_zero_with_zero_gradient() -> None:
    leaf = torch.ones(3, requires_grad=True)
    loss = masked_mae(leaf, torch.full((3,), NAN))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(leaf.grad, torch.zeros(3))
