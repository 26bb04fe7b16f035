import numpy as np
import pytest
import torch
from small_city import small_city
from toys import raised

from stlora_peft.data import City, CityData, adaptation_split, prepare
from stlora_peft.data.folds import Fold, held_out_folds

WINDOW, HORIZON = 3, 2
SPAN = WINDOW + HORIZON
HOURS = 6


def data_of(days: float, city: City | None = None) -> CityData:
    city = city or small_city(num_days=20)
    return prepare(city, adaptation_split(city.num_steps, city.steps_per_day, days), window=WINDOW, horizon=HORIZON)


def steps(start: int) -> set[int]:
    return set(range(start, start + SPAN))


@pytest.mark.parametrize(
    ("days", "count"), [(0.9, HOURS), (1, HOURS), (1.9, HOURS), (2, 2), (2.9, 2), (3, 3), (3.4, 3), (7, 3), (None, 3)]
)
def test_folds_hold_every_given_window_back_once(days: float, count: int) -> None:
    data = data_of(days)
    folds = held_out_folds(data)
    assert len(folds) == count
    held = torch.cat([fold.val.starts for fold in folds])
    assert held.tolist() == data.given.starts.tolist()  # consecutive blocks, in order


@pytest.mark.parametrize("days", [0.9, 1, 1.9, 2, 3, 3.4, 7])
def test_folds_train_on_exactly_the_windows_that_share_no_step_with_what_is_held_back(days: float) -> None:
    data = data_of(days)
    for fold in held_out_folds(data):
        held = set().union(*(steps(start) for start in fold.val.starts.tolist()))
        apart = [start for start in data.given.starts.tolist() if not steps(start) & held]
        assert fold.train.starts.tolist() == apart
        assert max(held) < data.split.given.stop


@pytest.mark.parametrize(
    ("days", "blocks"), [(2, [[0], [1]]), (2.9, [[0], [1, 2]]), (3, [[0], [1], [2]]), (7, [[0, 1, 2], [3, 4], [5, 6]])]
)
def test_folds_of_several_days_are_whole_days_by_the_begin_of_the_forecast(
    days: float, blocks: list[list[int]]
) -> None:
    folds = held_out_folds(data_of(days))
    found = [sorted({(start + WINDOW) // 24 for start in fold.val.starts.tolist()}) for fold in folds]
    assert found == blocks


def test_fold_is_the_city_with_other_windows() -> None:
    data = data_of(3)
    for fold in held_out_folds(data):
        assert fold.given is fold.train  # what a training without validation takes
        for name in ("city", "split", "scaler", "test", "edge_index", "edge_weight", "time_features"):
            assert getattr(fold, name) is getattr(data, name)
        batch = fold.val.__getitems__([0])
        start = int(batch["start"][0])
        truth = torch.from_numpy(data.city.values[start + WINDOW : start + SPAN])
        torch.testing.assert_close(batch["y"][0], truth, equal_nan=True)
        assert isinstance(fold, Fold)


def test_folds_of_too_few_hours_are_refused() -> None:
    assert raised(lambda: held_out_folds(data_of(0.5))) == {
        "where": "city 'small': the given days are too few to choose a form of adapter by",
        "expected": f"windows of {SPAN} steps beside those that are held back",
        "got": f"none beside fold 3 of {HOURS}, of 12 given steps",
        "fix": "give more days, or name a form, for instance 'embedding'",
    }


def test_folds_without_a_truth_are_refused() -> None:
    city = small_city(num_days=20)
    values = city.values.copy()
    values[24 : 48 + HORIZON - 1] = np.nan
    silent = City(**{**{name: getattr(city, name) for name in city.__dataclass_fields__}, "values": values})
    assert raised(lambda: held_out_folds(data_of(3, silent))) == {
        "where": "city 'small': fold 2 of 3 has no truth to choose a form of adapter by",
        "expected": "at least one measured value in every part of the given days that is held back",
        "got": "24 windows without any",
        "fix": "give more days, or name a form, for instance 'embedding'",
    }
