import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import torch
from small_city import small_city
from test_metrics import loop

from stlora_peft.baselines import (
    BASELINES,
    RIDGE_PENALTIES,
    STEPS_PER_COEFFICIENT,
    Baseline,
    HistoricalAverage,
    SupportVectorRegression,
    VectorAutoregression,
    baseline_batches,
)
from stlora_peft.data import City, CityData, Scaler, Split, adaptation_split, prepare
from stlora_peft.metrics import ErrorSums

statsmodels = pytest.importorskip("statsmodels.tsa.api")
svm = pytest.importorskip("sklearn.svm")

Array = np.ndarray
KINDS = list(BASELINES.values())
SERIES = small_city().values[:, 0, 0]


def make_city(values: Array, interval_minutes: int = 60, start: datetime | None = None) -> City:
    nodes = np.arange(values.shape[1])
    return City(
        values=values.astype(np.float32),
        edge_index=np.stack([nodes[:-1], nodes[1:]]),
        edge_weight=np.ones(len(nodes) - 1),
        interval_minutes=interval_minutes,
        node_ids=tuple(map(str, nodes)),
        start=start,
        dead_sensors="keep",
    )


def make_data(
    city: City, days: float | None = 8, window: int = 12, horizon: int = 12, scaler: Scaler | None = None
) -> CityData:
    split = adaptation_split(city.num_steps, city.steps_per_day, days)
    return prepare(city, split, window=window, horizon=horizon, scaler=scaler)


def two_channels(num_days: int = 16) -> City:
    """A city of three nodes with two channels, 5 % of the readings missing."""
    flow, speed = (small_city(3, num_days, seed).values for seed in (1, 2))
    return make_city(np.concatenate([flow, 3 * speed], axis=2))


def readings(data: CityData) -> Array:
    return data.city.values.astype(np.float64)


def everything(baseline: Baseline, windows) -> Array:
    return baseline.forecast(windows, torch.arange(len(windows))).double().numpy()


def history(data: CityData, filled: Array, start: int) -> Array:
    return filled[start : start + data.train.window]


def mean_of(steps: Iterable[int], values: Array) -> float:
    seen = [values[step] for step in steps if not np.isnan(values[step])]
    return sum(seen) / len(seen) if seen else np.nan


def average_loop(data: CityData, *periods: int) -> Array:
    """Mean by slot of the first period that has a reading, then of the node, then of the scaler, at every step."""
    values, given, interval = readings(data), data.split.given, data.city.interval_minutes
    table = np.empty_like(values)
    for node in range(values.shape[1]):
        for channel in range(values.shape[2]):
            series = values[:, node, channel]
            for step in range(len(values)):
                slots = [
                    [s for s in given if s * interval % period // interval == step * interval % period // interval]
                    for period in periods
                ]
                means = [mean_of(slot, series) for slot in [*slots, given]] + [data.scaler.mean[channel]]
                table[step, node, channel] = next(mean for mean in means if not np.isnan(mean))
    return table


def filled_loop(data: CityData) -> Array:
    values = readings(data)
    return np.where(np.isnan(values), average_loop(data, 1440), values)


def recursion_loop(baseline: VectorAutoregression, past: Array, horizon: int) -> Array:
    """y_t = c + sum_l A_l y_{t-l}, step after step, for one window."""
    steps = [row.reshape(-1) for row in past]
    for _ in range(horizon):
        following = baseline.intercept.numpy().copy()
        for lag, matrix in enumerate(baseline.coefs.numpy(), start=1):
            following += matrix @ steps[-lag]
        steps.append(following)
    return np.stack(steps[len(past) :]).reshape(horizon, *past.shape[1:])


@pytest.mark.parametrize("city", [small_city(3), two_channels()], ids=["one channel", "two channels"])
def test_average_by_slot_of_the_day_matches_loop(city: City) -> None:
    data = make_data(city)
    average, expected = HistoricalAverage.fit(data), average_loop(data, 1440)
    assert average.description == "mean by slot of the day"
    starts = data.test.starts.tolist()
    truth = np.stack([expected[start + 12 : start + 24] for start in starts])
    np.testing.assert_allclose(everything(average, data.test), truth, rtol=1e-6)


def test_average_by_slot_of_the_week_matches_loop() -> None:
    city = small_city(2, num_days=20)
    city.values[[3, 3 + 168], 1] = np.nan  # a slot of the week without a reading has that of the day
    data = make_data(city, days=14)
    average, expected = HistoricalAverage.fit(data), average_loop(data, 10080, 1440)
    assert average.description == "mean by slot of the week"
    np.testing.assert_allclose(average.table.numpy(), expected[:168], rtol=1e-12)
    assert expected[3, 1, 0] == pytest.approx(average_loop(data, 1440)[3, 1, 0])


def test_average_just_below_two_weeks_is_by_the_day() -> None:
    assert HistoricalAverage.fit(make_data(small_city(2, num_days=20), days=14 - 1 / 24)).period == 1440


def test_average_of_a_slot_without_a_reading_is_the_nodes_mean_and_of_a_dead_node_the_scalers() -> None:
    city = small_city(3)
    city.values[7:192:24, 0] = np.nan
    city.values[:192, 2] = np.nan
    data = make_data(city)
    table = HistoricalAverage.fit(data).table.numpy()
    assert table[7, 0, 0] == pytest.approx(np.nanmean(readings(data)[:192, 0, 0]))
    assert table[:, 2, 0] == pytest.approx(data.scaler.mean[0])
    np.testing.assert_allclose(table, average_loop(data, 1440)[:24], rtol=1e-12)


@pytest.mark.parametrize("minutes", [7 * 60, 1440, 2 * 1440, 10080])
def test_average_of_steps_that_do_not_divide_the_day_or_exceed_it_matches_loop(minutes: int) -> None:
    data = make_data(make_city(small_city(2).values, minutes), days=None)
    expected = average_loop(data, 10080, 1440)
    truth = np.stack([expected[start + 12 : start + 24] for start in data.val.starts.tolist()])
    np.testing.assert_allclose(everything(HistoricalAverage.fit(data), data.val), truth, rtol=1e-6)


def test_average_needs_no_clock() -> None:
    known = small_city(2)
    unknown = replace(known, start=None, dead_sensors="error", where="")
    first, second = (HistoricalAverage.fit(make_data(city)).table for city in (known, unknown))
    assert torch.equal(first, second)


def test_average_of_a_given_part_that_begins_later_counts_slots_from_the_first_step() -> None:
    city = small_city(2)
    split = Split(train=range(60), val=range(60, 200), test=range(300, 384), given=range(31, 170))
    data = prepare(city, split)
    np.testing.assert_allclose(HistoricalAverage.fit(data).table.numpy(), average_loop(data, 1440)[:24], rtol=1e-12)


@pytest.mark.parametrize("city", [small_city(4), two_channels()], ids=["one channel", "two channels"])
def test_var_matches_statsmodels_own_choice_and_forecasts(city: City) -> None:
    data = make_data(city)
    filled, given = filled_loop(data), len(data.split.given)
    series = filled.reshape(len(filled), -1)
    width = series.shape[1]
    most = max(p for p in range(1, 13) if given - p >= STEPS_PER_COEFFICIENT * (width * p + 1))
    fitted = statsmodels.VAR(series[:given]).fit(most, ic="aic")
    baseline = VectorAutoregression.fit(data)
    assert 1 < most < 12
    assert baseline.description == f"statsmodels VAR({fitted.k_ar}), order by AIC"
    expected = [
        fitted.forecast(history(data, series, start)[-fitted.k_ar :], 12) for start in data.test.starts.tolist()
    ]
    expected = np.stack(expected).reshape(len(expected), 12, *filled.shape[1:])
    np.testing.assert_allclose(everything(baseline, data.test), expected, rtol=1e-5)


def test_var_recovers_a_simulated_process() -> None:
    matrix, constant = np.array([[0.5, 0.3, 0.0], [-0.2, 0.6, 0.1], [0.0, 0.2, 0.4]]), np.array([10.0, 20.0, 5.0])
    rng, values = np.random.default_rng(0), np.zeros((6000, 3))
    for step in range(1, len(values)):
        values[step] = constant + matrix @ values[step - 1] + rng.normal(size=3)
    baseline = VectorAutoregression.fit(make_data(make_city(values), days=None))
    assert baseline.description == "statsmodels VAR(1), order by AIC"
    np.testing.assert_allclose(baseline.coefs[0].numpy(), matrix, atol=0.04)
    np.testing.assert_allclose(baseline.intercept.numpy(), constant, atol=1.5)


def test_var_of_noise_has_order_zero_and_forecasts_the_mean() -> None:
    data = make_data(make_city(np.random.default_rng(1).normal(50, 5, (2000, 3))), days=None)
    baseline = VectorAutoregression.fit(data)
    assert baseline.description == "statsmodels VAR(0), order by AIC"
    mean = readings(data)[: len(data.split.given)].mean(axis=0)
    forecast = everything(baseline, data.val)
    np.testing.assert_allclose(forecast, np.broadcast_to(mean, forecast.shape), rtol=1e-6)


def test_var_order_is_at_most_the_window() -> None:
    rng, values = np.random.default_rng(0), np.zeros((3000, 2))
    for step in range(5, len(values)):
        values[step] = 0.8 * values[step - 5] + rng.normal(size=2)
    orders = [len(VectorAutoregression.fit(make_data(make_city(values), None, size)).coefs) for size in (3, 12)]
    assert orders[0] <= 3
    assert orders[1] == 5


def many_nodes() -> CityData:
    """So many nodes on four days that least squares would have 96 equations for 25 coefficients and more."""
    return make_data(small_city(24), days=4, window=3, horizon=4)


def test_var_of_many_nodes_is_the_closed_form_of_ridge_with_the_penalty_of_the_least_loo_error() -> None:
    data = many_nodes()
    series = filled_loop(data).reshape(384, -1)[:96]
    lags = np.stack([series[t - 3 : t][::-1].reshape(-1) for t in range(3, 96)])
    mean, std, truth = lags.mean(axis=0), lags.std(axis=0), series[3:]
    scaled = (lags - mean) / std

    def solve(x: Array, y: Array, penalty: float) -> tuple[Array, Array]:
        centred = x - x.mean(axis=0)
        weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T @ (y - y.mean(axis=0)))
        return weights, y.mean(axis=0) - x.mean(axis=0) @ weights

    errors = []
    for penalty in RIDGE_PENALTIES:
        error = 0.0
        for left in range(len(scaled)):
            kept = np.arange(len(scaled)) != left
            weights, constant = solve(scaled[kept], truth[kept], penalty)
            error += np.square(scaled[left] @ weights + constant - truth[left]).sum()
        errors.append(error)
    best = RIDGE_PENALTIES[int(np.argmin(errors))]
    assert RIDGE_PENALTIES[0] < best < RIDGE_PENALTIES[-1]
    baseline = VectorAutoregression.fit(data)
    assert baseline.description == f"ridge VAR(3), penalty {best:g}"
    weights, constant = solve(scaled, truth, best)
    expected = (weights / std[:, None]).reshape(3, 24, 24).swapaxes(1, 2)
    np.testing.assert_allclose(baseline.coefs.numpy(), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(baseline.intercept.numpy(), constant - (mean / std) @ weights, rtol=1e-6)


def test_var_recursion_of_a_ridge_matches_loop() -> None:
    data = many_nodes()
    baseline, filled = VectorAutoregression.fit(data), filled_loop(data)
    expected = [recursion_loop(baseline, history(data, filled, start), 4) for start in data.test.starts.tolist()]
    np.testing.assert_allclose(everything(baseline, data.test), np.stack(expected), rtol=1e-5)


def test_var_forecasts_a_node_that_never_changes_by_its_reading_and_the_others_without_it() -> None:
    values = small_city(4).values[..., 0].copy()
    values[:192, 1] = 70.0
    data = make_data(make_city(values))
    others = make_data(make_city(values[:, [0, 2, 3]]), scaler=data.scaler)
    found, expected = VectorAutoregression.fit(data), VectorAutoregression.fit(others)
    assert found.description == expected.description
    np.testing.assert_allclose(everything(found, data.val)[:, :, 1], 70.0, rtol=1e-6)
    np.testing.assert_allclose(
        everything(found, data.val)[:, :, [0, 2, 3]], everything(expected, others.val), rtol=1e-5
    )


@pytest.mark.parametrize(
    "values",
    [
        np.stack([SERIES, SERIES], axis=1),
        np.stack([SERIES, 1.60934 * SERIES], axis=1),
        SERIES[:, None],
        np.stack([SERIES, np.full(384, 7.0)], axis=1),
    ],
    ids=["two equal nodes", "mph and km/h", "one node", "one node that changes"],
)
def test_var_of_series_that_least_squares_cannot_take_is_a_ridge(values: Array) -> None:
    data = make_data(make_city(values))
    baseline = VectorAutoregression.fit(data)
    assert baseline.description.startswith("ridge VAR(12), penalty ")
    filled = filled_loop(data)
    expected = [recursion_loop(baseline, history(data, filled, start), 12) for start in data.val.starts.tolist()]
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(everything(baseline, data.val), np.stack(expected), rtol=1e-5)


def test_var_whose_aic_cannot_be_computed_is_a_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise np.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(statsmodels.VAR, "select_order", fail)
    assert VectorAutoregression.fit(make_data(small_city(4))).description.startswith("ridge VAR(12)")


@pytest.fixture(scope="module")
def two_channel_svr() -> tuple[CityData, SupportVectorRegression]:
    data = make_data(two_channels())
    return data, SupportVectorRegression.fit(data)


@pytest.mark.parametrize(("node", "channel", "step"), [(0, 0, 0), (1, 1, 5), (2, 0, 11)])
def test_svr_matches_sklearn_fitted_by_hand(
    two_channel_svr: tuple[CityData, SupportVectorRegression], node: int, channel: int, step: int
) -> None:
    data, baseline = two_channel_svr
    filled, truth = filled_loop(data)[:, node, channel], readings(data)[:, node, channel]
    mean, std = filled[:192].mean(), filled[:192].std()
    starts = [s for s in range(192 - 23) if not np.isnan(truth[s + 12 + step])]
    assert len(starts) < 192 - 23
    x = np.stack([(filled[s : s + 12] - mean) / std for s in starts])
    y = np.array([(truth[s + 12 + step] - mean) / std for s in starts])
    model = svm.LinearSVR(C=0.1, epsilon=0.0, max_iter=10_000, random_state=0).fit(x, y)
    inputs = np.stack([(filled[s : s + 12] - mean) / std for s in data.test.starts.tolist()])
    expected = model.predict(inputs) * std + mean
    np.testing.assert_allclose(everything(baseline, data.test)[:, step, node, channel], expected, rtol=1e-5)


def test_svr_of_nodes_that_never_change_or_have_no_reading_forecasts_their_mean() -> None:
    values = small_city(3).values[..., 0].copy()
    values[:192, 0], values[:192, 1] = 70.0, np.nan
    data = make_data(make_city(values))
    baseline = SupportVectorRegression.fit(data)
    assert (baseline.weights[:, :, :2] == 0).all()
    assert (baseline.weights[:, :, 2] != 0).all()
    forecast = everything(baseline, data.val)
    np.testing.assert_allclose(forecast[:, :, 0], 70.0, rtol=1e-6)
    np.testing.assert_allclose(forecast[:, :, 1], data.scaler.mean[0], rtol=1e-6)


def test_svr_tells_its_progress_after_each_series() -> None:
    told: list[tuple[int, int]] = []
    data = make_data(small_city(3), days=3)
    SupportVectorRegression.fit(data, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_svr_says_what_it_is() -> None:
    data = make_data(small_city(2), days=3, window=5, horizon=2)
    assert SupportVectorRegression.fit(data).description == "LinearSVR(C=0.1) on 5 lags"


@pytest.mark.parametrize("kind", KINDS)
def test_fit_reads_nothing_after_the_given_part(kind: type[Baseline]) -> None:
    city, rng = small_city(4), np.random.default_rng(0)
    other = make_city(city.values, start=city.start)
    other.values[192:] = rng.uniform(0, 1e4, other.values[192:].shape)
    other.values[192:][rng.random(other.values[192:].shape) < 0.2] = np.nan
    data, changed = make_data(city), make_data(other)
    assert data.split.given.stop == 192
    first, second = kind.fit(data), kind.fit(changed)
    for part in ("train", "val"):  # both of them inside the given part
        np.testing.assert_array_equal(
            everything(first, getattr(data, part)), everything(second, getattr(changed, part))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_fit_reads_the_given_part_to_its_last_step(kind: type[Baseline]) -> None:
    """What the test above could not notice, were nothing read at all."""
    city = small_city(4)
    other = make_city(city.values, start=city.start)
    other.values[191] += 20
    data, changed = make_data(city), make_data(other)
    assert not np.array_equal(everything(kind.fit(data), data.train), everything(kind.fit(changed), changed.train))


@pytest.mark.parametrize("kind", KINDS)
def test_forecast_reads_its_window_only(kind: type[Baseline]) -> None:
    data = make_data(small_city(3))
    baseline = kind.fit(data)
    before, step = everything(baseline, data.test), int(data.test.starts[20])
    data.test.targets[step] = 1e4
    after, starts = everything(baseline, data.test), data.test.starts.numpy()
    inside = (starts <= step) & (step < starts + 12)
    changed = (before != after).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed[~inside], False)
    assert inside.sum() == 12
    assert changed.any() == (kind is not HistoricalAverage)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_twice_gives_the_same_forecasts_bitwise(kind: type[Baseline]) -> None:
    data = make_data(small_city(3))
    np.testing.assert_array_equal(everything(kind.fit(data), data.val), everything(kind.fit(data), data.val))


@pytest.mark.parametrize("kind", KINDS)
def test_forecast_takes_rows_in_any_order(kind: type[Baseline]) -> None:
    data = make_data(two_channels(), window=6, horizon=3)
    baseline, rows = kind.fit(data), torch.tensor([5, 0, 5])
    forecast = baseline.forecast(data.test, rows)
    assert (forecast.shape, forecast.dtype, forecast.device.type) == ((3, 3, 3, 2), torch.float32, "cpu")
    assert torch.isfinite(forecast).all()
    np.testing.assert_allclose(forecast.double().numpy(), everything(baseline, data.test)[rows], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_baseline_batches_gives_every_window_in_order_and_errors_follow(kind: type[Baseline]) -> None:
    data = make_data(small_city(3))
    baseline = kind.fit(data)
    pairs = list(baseline_batches(baseline, data.test, batch_size=7))
    forecast, truth = (torch.cat(parts).double().numpy() for parts in zip(*pairs, strict=True))
    np.testing.assert_allclose(forecast, everything(baseline, data.test), rtol=1e-6)
    expected = np.stack([readings(data)[start + 12 : start + 24] for start in data.test.starts.tolist()])
    np.testing.assert_array_equal(truth, expected)
    sums = ErrorSums(12)
    for pair in pairs:
        sums.add(*pair)
    errors = sums.metrics()
    assert (errors.mae, errors.rmse, errors.mape) == pytest.approx(loop(forecast, truth), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_baseline_learns_more_than_the_mean(kind: type[Baseline]) -> None:
    data = make_data(small_city(4))
    truth = np.stack([readings(data)[start + 12 : start + 24] for start in data.test.starts.tolist()])
    measured = ~np.isnan(truth)
    error = np.abs(everything(kind.fit(data), data.test) - truth)[measured].mean()
    assert error < 0.6 * np.abs(data.scaler.mean[0] - truth)[measured].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_forecast_of_windows_of_other_sizes_says_both(kind: type[Baseline]) -> None:
    baseline = kind.fit(make_data(small_city(3), days=3))
    other = make_data(small_city(4), days=3, window=6)
    with pytest.raises(ValueError, match="do not fit") as error:
        baseline.forecast(other.test, torch.arange(2))
    assert str(error.value).splitlines() == [
        f"the windows do not fit the baseline '{baseline.description}'.",
        "  expected: window=12, horizon=12, num_nodes=3, num_channels=1",
        "  got:      window=6, horizon=12, num_nodes=4, num_channels=1",
        "  to fix:   fit it on their own city",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_fit_on_too_few_given_steps_says_how_many_it_needs(kind: type[Baseline]) -> None:
    split = Split(train=range(60), val=range(60, 200), test=range(300, 384), given=range(24))
    data = prepare(small_city(3), split)
    with pytest.raises(ValueError, match="too few") as error:
        kind.fit(data)
    assert str(error.value).splitlines() == [
        "city 'small': too few given steps for a baseline.",
        "  expected: at least 25 steps",
        "  got:      24 steps",
        "  to fix:   give more days",
    ]
    kind.fit(prepare(small_city(3), replace(split, given=range(25))))


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [
        (VectorAutoregression, "statsmodels", "statsmodels"),
        (VectorAutoregression, "sklearn", "scikit-learn"),
        (SupportVectorRegression, "sklearn", "scikit-learn"),
    ],
)
def test_fit_without_its_package_gives_the_install_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[Baseline], module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as error:
        kind.fit(make_data(small_city(2)))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{kind.__name__} needs a package that is not installed."
    assert lines[1] == f"  expected: the package '{package}'"
    assert lines[2].startswith("  got:      ")
    assert lines[3] == '  to fix:   pip install "stlora-peft[baselines]"'
    HistoricalAverage.require_packages()
