import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stlora_peft.data import City, Scaler, Split, adaptation_split, prepare, pretraining_split, splits


def make_city(values):
    num_nodes = values.shape[1]
    return City(
        values=values,
        edge_index=np.array([[0, 1], [1, 0]]),
        edge_weight=np.ones(2),
        interval_minutes=60,
        node_ids=tuple(map(str, range(num_nodes))),
        start="2024-01-01",
        name="hourly",
    )


def hourly(num_days=20, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(50, 10, (24 * num_days, 3)).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    return values


def prepared(values, days=4, **options):
    city = make_city(values)
    return prepare(city, adaptation_split(city.num_steps, city.steps_per_day, days), window=6, horizon=4, **options)


def seen_before_test(data):
    """All tensors that training and validation read, with the scaler's numbers."""
    tensors = [part.__getitems__(range(len(part)))[key] for part in (data.train, data.val) for key in ("x", "y")]
    return [*tensors, torch.tensor([*data.scaler.mean, *data.scaler.std], dtype=torch.float64)]


def same_bits(first, second):
    return all(np.array_equal(a.numpy(), b.numpy(), equal_nan=True) for a, b in zip(first, second, strict=True))


def test_adaptation_split_of_shenzhen_has_known_parts():
    split = adaptation_split(8064, 288, days=3)
    assert split == Split(range(648), range(648, 864), range(6451, 8064), range(864))


@given(st.integers(20, 5000), st.floats(1, 400), st.floats(0.01, 1))
def test_adaptation_split_parts_tile_what_is_given(num_steps, steps_per_day, share):
    everything = adaptation_split(num_steps, steps_per_day)
    days = share * len(everything.given) / steps_per_day
    given_steps = round(days * steps_per_day)
    if given_steps < 3:
        return
    split = adaptation_split(num_steps, steps_per_day, days)
    assert split.test == everything.test
    assert abs(len(split.test) - 0.2 * num_steps) <= 0.5
    assert split.test.stop == num_steps
    assert split.given == range(given_steps)
    assert [*split.train, *split.val] == list(split.given)
    assert abs(len(split.val) - len(split.given) / 4) <= 0.5


def test_pretraining_split_parts_tile_the_record():
    split = pretraining_split(2016)
    assert [*split.train, *split.val, *split.test] == list(range(2016))
    assert (len(split.train), len(split.val), split.given) == (1411, 202, split.train)


@pytest.mark.parametrize(("train", "val"), [(0, 0.1), (0.7, 0), (0.9, 0.1), (float("nan"), 0.1)])
def test_pretraining_split_impossible_shares_raise(train, val):
    with pytest.raises(ValueError, match="shares") as error:
        pretraining_split(100, train, val)
    assert str(error.value).split("\n")[1:3] == [
        "  expected: train_share > 0, val_share > 0 and a sum below 1",
        f"  got:      train_share={train}, val_share={val}",
    ]


def test_adaptation_split_days_that_reach_into_the_test_part_raise():
    with pytest.raises(ValueError, match="reach") as error:
        adaptation_split(2400, 24, days=81)
    assert str(error.value).split("\n") == [
        "the given days reach into the test part.",
        "  expected: days <= 80, the first 80 % of 2400 steps",
        "  got:      days=81",
        "  to fix:   give fewer days, or a longer record",
    ]
    assert adaptation_split(2400, 24, days=80) == adaptation_split(2400, 24)


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf")])
def test_adaptation_split_days_out_of_range_raise(days):
    with pytest.raises(ValueError, match="'days' is out of range") as error:
        adaptation_split(2400, 24, days=days)
    assert str(error.value).split("\n")[2] == f"  got:      days={days}"


def test_adaptation_split_too_few_steps_to_validate_raises():
    with pytest.raises(ValueError, match="split is not usable") as error:
        adaptation_split(2400, 24, days=1 / 24)
    assert str(error.value).split("\n")[2] == (
        "  got:      train=range(0, 1), val=range(1, 1), test=range(1920, 2400), given=range(0, 1)"
    )


@pytest.mark.parametrize(
    "parts",
    [
        (range(5), range(5, 8), range(7, 9), range(8)),
        (range(5), range(4, 6), range(7, 9), range(5)),
        (range(5), range(5, 6), range(7, 9), range(8)),
        (range(0), range(5, 6), range(7, 9), range(5)),
        (range(-2, 5), range(5, 6), range(7, 9), range(5)),
        (range(0, 5, 2), range(5, 6), range(7, 9), range(5)),
    ],
)
def test_split_with_overlap_or_empty_part_raises(parts):
    with pytest.raises(ValueError, match="split is not usable"):
        Split(*parts)


@given(st.integers(1, 12), st.integers(1, 12))
def test_prepare_windows_stay_in_their_parts(window, horizon):
    city = make_city(hourly(8))
    split = adaptation_split(city.num_steps, city.steps_per_day, 4)
    data = prepare(city, split, window, horizon)
    for name, steps in (("train", split.train), ("val", split.val), ("test", split.test)):
        starts = getattr(data, name).starts
        reach = 0 if name == "train" else window  # steps before the part that inputs may read
        expected = range(max(steps.start - reach, 0), steps.stop - window - horizon + 1)
        assert starts.tolist() == list(expected)
        assert (starts + window).min() >= steps.start
        assert (starts + window + horizon).max() == steps.stop


def test_prepare_inputs_and_targets_match_loop():
    values = hourly()
    data = prepared(values, time_features="week")
    known = values[: data.split.given.stop].astype(np.float64)
    mean, std = np.nanmean(known), np.nanstd(known)
    assert data.train.series.shape == (480, 3, 5)
    assert data.train.series.dtype == data.train.targets.dtype == torch.float32
    batch = data.test.__getitems__([0, 5])
    for row, start in enumerate(data.test.starts[[0, 5]].tolist()):
        for step in range(6):
            clock = 2 * np.pi * ((start + step) % 24) / 24
            day = 2 * np.pi * ((start + step) // 24 % 7) / 7
            for node in range(3):
                before = values[max(0, start + step - 5) : start + step + 1, node]  # as many as a window has
                readings = before[~np.isnan(before)]
                scaled = (readings[-1] - mean) / std if len(readings) else 0.0
                expected = [scaled, np.sin(clock), np.cos(clock), np.sin(day), np.cos(day)]
                np.testing.assert_allclose(batch["x"][row, step, node], expected, atol=2e-6)
        np.testing.assert_array_equal(batch["y"][row, ..., 0], values[start + 6 : start + 10])


def test_prepare_missing_inputs_take_the_last_reading_of_a_window_back_and_then_the_mean():
    values = np.arange(480, dtype=np.float32)[:, None].repeat(3, 1)
    values[:4, 0] = np.nan  # nothing before
    values[100:109, 1] = np.nan  # longer than a window of 6
    data = prepared(values, time_features="none")
    read = data.scaler.inverse(data.train.series)[..., 0].numpy()
    mean = data.scaler.mean[0]
    np.testing.assert_allclose(read[:6, 0], [mean] * 4 + [4, 5], rtol=1e-5)
    np.testing.assert_allclose(read[98:111, 1], [98, 99] + [99] * 5 + [mean] * 4 + [109, 110], rtol=1e-5)
    np.testing.assert_allclose(read[:, 2], values[:, 2], rtol=1e-4, atol=1e-4)
    assert data.train.targets[100:109, 1, 0].isnan().all()


def test_prepare_parts_share_one_series():
    data = prepared(hourly())
    pointers = {part.series.untyped_storage().data_ptr() for part in (data.train, data.val, data.test)}
    assert len(pointers) == 1
    assert np.shares_memory(data.test.targets.numpy(), data.city.values)


def test_prepare_scaler_is_fitted_on_the_given_days_or_taken():
    values = hourly()
    data = prepared(values)
    assert data.scaler == Scaler.fit(values[: data.split.given.stop, :, None])
    foreign = Scaler(mean=(1.0,), std=(2.0,))
    assert prepared(values, scaler=foreign).scaler == foreign


def test_prepare_test_values_change_nothing_before_the_test_part():
    values = hourly()
    before = prepared(values)
    changed = values.copy()
    changed[before.split.test.start :] = np.random.default_rng(1).normal(
        1e4, 1e3, changed[before.split.test.start :].shape
    )
    changed[-5:] = np.nan
    assert same_bits(seen_before_test(before), seen_before_test(prepared(changed)))


def test_prepare_values_between_given_and_test_change_nothing_before():
    values = hourly()
    before = prepared(values)
    changed = values.copy()
    changed[before.split.given.stop : before.split.test.start] = 1e4
    assert same_bits(seen_before_test(before), seen_before_test(prepared(changed)))


def test_same_bits_sees_one_changed_given_value():
    values = hourly()
    before = prepared(values)
    last = before.split.given.stop - 1
    changed = values.copy()
    changed[last, 0] = np.nan_to_num(changed[last, 0]) + 1e-2
    assert not same_bits(seen_before_test(before), seen_before_test(prepared(changed)))


@pytest.mark.parametrize(
    ("days", "horizon", "part", "needed", "got"),
    [(0.25, 4, "train", 10, 4), (0.5, 4, "train", 10, 9), (1, 7, "val", 7, 6)],
)
def test_prepare_too_few_days_name_part_and_need(days, horizon, part, needed, got):
    city = make_city(hourly())
    split = adaptation_split(city.num_steps, city.steps_per_day, days)
    with pytest.raises(ValueError, match="too short for one window") as error:
        prepare(city, split, window=6, horizon=horizon)
    assert str(error.value).split("\n") == [
        f"city 'hourly': the {part} part is too short for one window.",
        f"  expected: at least {needed} steps for window=6 and horizon={horizon}",
        f"  got:      {got} steps",
        "  to fix:   give more days, or a shorter window and horizon",
    ]


def test_prepare_split_of_another_city_raises():
    with pytest.raises(ValueError, match="does not fit city 'hourly'") as error:
        prepare(make_city(hourly(20)), adaptation_split(30 * 24, 24, 4))
    assert str(error.value).split("\n")[1:3] == [
        "  expected: parts within its 480 steps",
        "  got:      a test part that ends at step 720",
    ]


@pytest.mark.data
def test_prepare_real_cities_have_no_missing_input(shared_data):
    for name in ("la-loop.npz", "shenzhen-flow.npz"):
        city = City.load(shared_data(name))
        data = prepare(city, adaptation_split(city.num_steps, city.steps_per_day, 3))
        assert data.train.series.isfinite().all()
        assert len(data.test) == len(data.split.test) - 11


def test_prepare_fills_gaps_of_some_nodes_at_a_time(monkeypatch):
    whole = prepared(hourly())
    monkeypatch.setattr(splits, "_BLOCK", 2)
    blocks = prepared(hourly())
    assert torch.equal(blocks.train.series, whole.train.series)
