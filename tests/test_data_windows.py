import math
from datetime import datetime, timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stlora_peft.data import Windows, time_encoding


def make(num_steps=40, window=5, horizon=3, starts=None):
    series = torch.randn(num_steps, 4, 3)
    targets = torch.randn(num_steps, 4, 1)
    starts = torch.arange(num_steps - window - horizon + 1) if starts is None else torch.tensor(starts)
    return Windows(series, targets, starts, window=window, horizon=horizon)


def test_getitem_is_a_view_of_the_series():
    windows = make()
    item = windows[7]
    assert item["x"].untyped_storage().data_ptr() == windows.series.untyped_storage().data_ptr()
    assert item["y"].untyped_storage().data_ptr() == windows.targets.untyped_storage().data_ptr()
    windows.series[7, 0, 0] = 123.0
    assert item["x"][0, 0, 0] == 123.0


def test_windows_hold_nothing_but_series_targets_and_starts():
    windows = make(num_steps=400)
    held = sum(t.numel() * t.element_size() for t in vars(windows).values() if isinstance(t, torch.Tensor))
    assert held == 400 * 4 * (3 + 1) * 4 + len(windows) * 8


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 30), st.data())
def test_getitems_matches_slices_and_single_windows(window, horizon, spare, data):
    windows = make(window + horizon + spare, window, horizon)
    indices = data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=5))
    batch = windows.__getitems__(indices)
    for row, index in enumerate(indices):
        start = int(windows.starts[index])
        assert torch.equal(batch["x"][row], windows.series[start : start + window])
        assert torch.equal(batch["y"][row], windows.targets[start + window : start + window + horizon])
        assert all(torch.equal(batch[key][row], windows[index][key]) for key in ("x", "y"))


def test_windows_in_a_data_loader_come_as_batches():
    windows = make(starts=[3, 9, 20])
    loader = DataLoader(windows, batch_size=2, collate_fn=lambda batch: batch)
    shapes = [(tuple(batch["x"].shape), tuple(batch["y"].shape)) for batch in loader]
    assert shapes == [((2, 5, 4, 3), (2, 3, 4, 1)), ((1, 5, 4, 3), (1, 3, 4, 1))]


def test_inputs_at_the_end_of_the_record_need_no_truth():
    windows = make()
    assert torch.equal(windows.inputs(torch.tensor([35]))[0], windows.series[-5:])


@pytest.mark.parametrize("starts", [[-1], [33], [0, 50]])
def test_windows_that_leave_the_record_raise(starts):
    with pytest.raises(ValueError, match="leave the record") as error:
        make(starts=starts)
    assert str(error.value).split("\n") == [
        "windows leave the record.",
        "  expected: starts from 0 to 32 for 40 steps, window=5 and horizon=3",
        f"  got:      starts {starts}, targets of 40 steps",
        "  to fix:   give starts whose window and horizon lie inside the record",
    ]


@pytest.mark.parametrize(("window", "horizon"), [(0, 3), (5, 0), (-1, 1)])
def test_windows_without_a_step_raise(window, horizon):
    with pytest.raises(ValueError, match="too short") as error:
        Windows(torch.zeros(9, 1, 1), torch.zeros(9, 1, 1), torch.tensor([0]), window=window, horizon=horizon)
    assert str(error.value).split("\n")[1:3] == [
        "  expected: window >= 1 and horizon >= 1",
        f"  got:      window={window}, horizon={horizon}",
    ]


@pytest.mark.parametrize(("time_features", "width"), [("none", 0), ("day", 2), ("week", 4)])
def test_time_encoding_matches_the_calendar(time_features, width):
    start = datetime(2024, 2, 28, 23, 10)  # over the end of a month in a leap year
    encoding = time_encoding(900, 35, start, time_features)
    assert (encoding.shape, encoding.dtype) == ((900, width), torch.float32)
    rows = []
    for step in range(900):
        now = start + timedelta(minutes=35 * step)
        day = 2 * math.pi * (60 * now.hour + now.minute) / 1440
        week = 2 * math.pi * now.weekday() / 7
        rows.append([math.sin(day), math.cos(day), math.sin(week), math.cos(week)][:width])
    torch.testing.assert_close(encoding, torch.tensor(rows).reshape(900, width), rtol=0, atol=1e-6)


def test_time_encoding_of_unknown_start_counts_days_from_the_first_step():
    midnight = time_encoding(900, 35, datetime(2024, 1, 1), "week")
    unknown = time_encoding(900, 35, None, "week")
    assert torch.equal(unknown[:, :2], midnight[:, :2])
    assert torch.equal(unknown[:, 2:], torch.zeros(900, 2))


def test_time_encoding_unknown_name_raises():
    with pytest.raises(ValueError, match="time_features") as error:
        time_encoding(7, 5, None, "month")
    assert str(error.value).split("\n") == [
        "option 'time_features' is unknown.",
        "  expected: one of 'none', 'day', 'week'",
        "  got:      'month'",
        "  to fix:   choose one",
    ]
