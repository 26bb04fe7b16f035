import json
import math

import numpy as np
import pytest
import torch
from small_city import small_data
from toys import raised

from stlora_peft.data import Windows
from stlora_peft.evaluation import evaluate_persistence, measure, persistence_batches
from stlora_peft.significance import DailyErrors

NAN = float("nan")
Batch = tuple[torch.Tensor, torch.Tensor]


def make_windows(starts: list[int], window: int = 5, horizon: int = 3) -> Windows:
    record = torch.zeros(60, 1, 1)
    return Windows(record, record, torch.tensor(starts), window=window, horizon=horizon)


def make_batches(num_windows: int, size: int = 4, dtype: torch.dtype = torch.float64) -> list[Batch]:
    rng = np.random.default_rng(3)
    truth = rng.normal(20, 10, (num_windows, 3, 2, 2))
    truth[rng.random(truth.shape) < 0.3] = np.nan
    truth[rng.random(truth.shape) < 0.1] = np.inf
    forecast = rng.normal(20, 10, truth.shape)
    forecast[~np.isfinite(truth)] = np.nan  # what cannot be compared must not count either
    pair = torch.from_numpy(forecast).to(dtype), torch.from_numpy(truth).to(dtype)
    return list(zip(*(values.split(size) for values in pair), strict=True))


def daily_loop(batches: list[Batch], windows: Windows, steps_per_day: float) -> list[list[float]]:
    rows: dict[int, list[float]] = {}
    pairs = [pair for forecast, truth in batches for pair in zip(forecast, truth, strict=True)]
    for start, (forecast, truth) in zip(windows.starts.tolist(), pairs, strict=True):
        first = start + windows.window
        day = math.floor(first / steps_per_day) if steps_per_day > 1 else first
        row = rows.setdefault(day, [day, 0.0, 0])
        for f, y in zip(forecast.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if math.isfinite(y):
                row[1] += abs(f - y)
                row[2] += 1
    return [rows[day] for day in sorted(rows)]


@pytest.mark.parametrize("steps_per_day", [7, 7.5, 288, 1, 1 / 7])
@pytest.mark.parametrize("size", [1, 4, 40])
def test_daily_errors_match_float64_loop(steps_per_day: float, size: int) -> None:
    windows = make_windows([0, 1, 2, 3, 9, 10, 16, 30, 31, 45])
    batches = make_batches(10, size)
    tally = DailyErrors(windows, steps_per_day)
    list(tally.watch(batches))
    expected = daily_loop(batches, windows, steps_per_day)
    assert len(expected) > 1 or steps_per_day == 288
    assert tally.sums.dtype == np.float64
    np.testing.assert_allclose(tally.to_list(), expected, rtol=1e-12)


def test_daily_errors_put_a_window_into_the_day_of_its_first_forecast_step() -> None:
    tally = DailyErrors(make_windows([18, 19], window=5), steps_per_day=24)
    assert tally.days.tolist() == [0, 1]


def test_daily_errors_of_windows_out_of_order_follow_the_windows() -> None:
    tally = DailyErrors(make_windows([30, 0, 31]), steps_per_day=24)
    tally.add(torch.ones(3, 3, 1, 1) * torch.tensor([1.0, 5.0, 2.0])[:, None, None, None], torch.zeros(3, 3, 1, 1))
    assert tally.to_list() == [[0, 15.0, 3], [1, 9.0, 6]]


def test_daily_errors_give_each_window_its_block_where_a_step_is_longer_than_a_day() -> None:
    assert DailyErrors(make_windows([3, 4, 5]), steps_per_day=1 / 7).days.tolist() == [8, 9, 10]


def test_daily_errors_of_float32_batches_are_summed_in_float64() -> None:
    tally = DailyErrors(make_windows([0, 1]), steps_per_day=24)
    tally.add(torch.full((2, 3, 1, 1), 2.0**24 + 2), torch.ones(2, 3, 1, 1))  # float32 has no odd number here
    assert tally.sums.tolist() == [6 * (2.0**24 + 1)]


def test_daily_errors_and_metrics_of_one_pass_agree() -> None:
    data = small_data()
    tally = DailyErrors(data.test, data.city.steps_per_day)
    metrics = measure(tally.watch(persistence_batches(data.test, data, batch_size=7)), data.test.horizon)
    assert metrics == evaluate_persistence(data.test, data, batch_size=7)
    assert len(tally.days) > 2
    assert tally.sums.sum() / tally.counts.sum() == pytest.approx(metrics.mae, rel=1e-12)


def test_daily_errors_survive_json() -> None:
    tally = DailyErrors(make_windows([0, 1, 40]), steps_per_day=24)
    forecast = torch.ones(3, 3, 1, 1)
    forecast[2] = NAN
    tally.add(forecast, torch.zeros(3, 3, 1, 1))
    assert json.loads(json.dumps(tally.to_list(), allow_nan=False)) == [[0, 6.0, 6], [1, None, 3]]


@pytest.mark.parametrize(("added", "got"), [([2], 2), ([], 0), ([2, 2], 4)])
def test_daily_errors_without_one_forecast_for_each_window_are_refused(added: list[int], got: int) -> None:
    tally = DailyErrors(make_windows([0, 1, 2]), steps_per_day=24)

    def read() -> None:
        for size in added:
            tally.add(torch.ones(size, 3, 1, 1), torch.ones(size, 3, 1, 1))
        tally.to_list()

    assert raised(read) == {
        "where": "daily errors need one forecast for each window",
        "expected": "forecasts of 3 windows",
        "got": f"forecasts of {got}",
        "fix": "let all batches of these windows pass, once and in their order, before the sums are read",
    }
