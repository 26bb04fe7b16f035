"""Which steps of a record train, validate and test, and a city made ready for a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stlora_peft.data.city import City
from stlora_peft.data.scaling import Scaler
from stlora_peft.data.windows import TimeFeatures, Windows, carry_forward, check_lengths, time_encoding
from stlora_peft.errors import message

TEST_SHARE = 0.2
VALIDATION_SHARE_OF_GIVEN = 0.25
_BLOCK = (
    4096  # nodes whose gaps are filled together: what that takes beside the series does not grow with their number
)


@dataclass(frozen=True)
class Split:
    """Steps of a record by their use.

    Args:
        train: Steps whose windows train a model; its windows lie wholly inside.
        val: Steps that choose the best epoch; the inputs of its windows may begin before it.
        test: Steps that are only forecast; the inputs of its windows may begin before it.
        given: Steps that the scaler may see.

    Raises:
        ValueError: If a part is empty, or a part before the test part reaches into it.

    Example:
        >>> adaptation_split(num_steps=10 * 288, steps_per_day=288, days=3)
        Split(train=range(0, 648), val=range(648, 864), test=range(2304, 2880), given=range(0, 864))
    """

    train: range
    val: range
    test: range
    given: range

    def __post_init__(self) -> None:
        """Check that every part has steps and the test part stays unseen."""
        parts = (self.train, self.val, self.test, self.given)
        ordered = self.train.stop <= self.val.start and max(self.val.stop, self.given.stop) <= self.test.start
        if not all(len(part) and part.start >= 0 and part.step == 1 for part in parts) or not ordered:
            raise ValueError(
                message(
                    "split is not usable",
                    expected="steps in every part: train before val, and both of them and given before test",
                    got=f"train={self.train}, val={self.val}, test={self.test}, given={self.given}",
                    fix="give more steps, or other shares",
                )
            )


def adaptation_split(num_steps: int, steps_per_day: float, days: float | None = None) -> Split:
    """Split the record of a city with few known days.

    The test part is the last 20 % of the record, however many days are given, so that numbers for different ``days``
    compare. The first ``days`` days are given; their last quarter validates.

    Args:
        num_steps: Length of the record.
        steps_per_day: Readings in a day.
        days: Days that are given, also parts of a day; None gives all before the test part.

    Returns:
        The split.

    Raises:
        ValueError: If ``days`` is not above 0, reaches into the test part, or leaves a part empty.

    Example:
        >>> split = adaptation_split(num_steps=1000, steps_per_day=100)
        >>> split.given, split.test
        (range(0, 800), range(800, 1000))
    """
    first_test = num_steps - round(TEST_SHARE * num_steps)
    if days is not None and not (math.isfinite(days) and days > 0):
        raise ValueError(
            message(
                "option 'days' is out of range",
                expected="a number above 0",
                got=f"days={days}",
                fix="give the number of known days, or None for all before the test part",
            )
        )
    given = first_test if days is None else round(days * steps_per_day)
    if given > first_test:
        raise ValueError(
            message(
                "the given days reach into the test part",
                expected=f"days <= {first_test / steps_per_day:.6g}, the first 80 % of {num_steps} steps",
                got=f"days={days:g}",
                fix="give fewer days, or a longer record",
            )
        )
    train = given - round(VALIDATION_SHARE_OF_GIVEN * given)
    return Split(range(train), range(train, given), range(first_test, num_steps), range(given))


def pretraining_split(num_steps: int, train_share: float = 0.7, val_share: float = 0.1) -> Split:
    """Split a long record for the training of a backbone.

    Args:
        num_steps: Length of the record.
        train_share: Share of the training steps, at the beginning; the scaler sees only these.
        val_share: Share of the validation steps, which follow; the rest is the test part.

    Returns:
        The split.

    Raises:
        ValueError: If a share is not above 0, or both leave nothing to test.

    Example:
        >>> pretraining_split(1000)
        Split(train=range(0, 700), val=range(700, 800), test=range(800, 1000), given=range(0, 700))
    """
    if not (train_share > 0 and val_share > 0 and train_share + val_share < 1):
        raise ValueError(
            message(
                "shares of the parts are out of range",
                expected="train_share > 0, val_share > 0 and a sum below 1",
                got=f"train_share={train_share}, val_share={val_share}",
                fix="give for instance 0.7 and 0.1",
            )
        )
    train, val = round(train_share * num_steps), round((train_share + val_share) * num_steps)
    return Split(range(train), range(train, val), range(val, num_steps), range(train))


@dataclass(frozen=True, eq=False)
class CityData:
    """A city made ready for a model: its windows, its scaler and its graph.

    Args:
        city: Where the readings come from.
        split: Which steps train, validate and test.
        scaler: Scaler of the inputs and of the forecasts.
        train: Windows of the training part.
        val: Windows of the validation part.
        test: Windows of the test part.
        edge_index: The city's edges.
        edge_weight: Their weights.
        time_features: Which time encodings the inputs hold.
    """

    city: City
    split: Split
    scaler: Scaler
    train: Windows
    val: Windows
    test: Windows
    edge_index: torch.Tensor
    edge_weight: torch.Tensor
    time_features: TimeFeatures

    @property
    def given(self) -> Windows:
        """All windows of the given steps, the validation part among them: what the last training of a model uses."""
        window, horizon = self.train.window, self.train.horizon
        starts = _starts(self.city.name, "given", self.split.given, self.split.given.start, window, horizon)
        return self.train.at(starts)


def input_series(city: City, scaler: Scaler, window: int, time_features: TimeFeatures) -> torch.Tensor:
    """Make what a model reads of a city: the scaled readings, and then the encodings of :func:`time_encoding`.

    Where a reading is missing, the last one of at most ``window - 1`` steps before stands in for it, and where there
    is none 0, the mean. Nothing later than a step is in it.

    Args:
        city: The city.
        scaler: Scaler of the readings.
        window: Input steps of the model.
        time_features: ``"none"``, ``"day"`` or ``"week"``.

    Shapes:
        - **output:** :math:`(T, N, C_{in})`
    """
    clock = time_encoding(city.num_steps, city.interval_minutes, city.start, time_features)
    return model_input(torch.from_numpy(city.values), scaler.transform, window, clock[:, None])


def model_input(
    readings: torch.Tensor, scale: Callable[[torch.Tensor], torch.Tensor], window: int, clock: torch.Tensor
) -> torch.Tensor:
    """Fill gaps, scale, and add the encodings of the time; see :func:`input_series`.

    Args:
        readings: Readings in the city's unit, NaN where missing.
        scale: Scales readings.
        window: Input steps of the model.
        clock: Encodings of the time of each step, the same for all nodes or for each of them.

    Shapes:
        - **readings:** :math:`(T, N, C)`; **clock:** :math:`(T, 1, C')` or :math:`(T, N, C')`
        - **output:** :math:`(T, N, C + C')`
    """
    clock = clock.expand(-1, readings.shape[1], -1)
    dtype = torch.promote_types(readings.dtype, clock.dtype)
    series = readings.new_empty(*readings.shape[:2], readings.shape[2] + clock.shape[2], dtype=dtype)
    for nodes in (slice(start, start + _BLOCK) for start in range(0, readings.shape[1], _BLOCK)):
        scaled = scale(carry_forward(readings[:, nodes], window - 1)).nan_to_num(nan=0.0)
        series[:, nodes] = torch.cat([scaled, clock[:, nodes]], dim=2)
    return series


def prepare(
    city: City,
    split: Split,
    window: int = 12,
    horizon: int = 12,
    time_features: TimeFeatures = "day",
    scaler: Scaler | None = None,
) -> CityData:
    """Scale a city's readings, add time encodings and cut them into windows.

    The three sets of windows share one series, that of :func:`input_series`. Targets stay in the city's unit, NaN
    where missing.

    Args:
        city: The city.
        split: Which of its steps train, validate and test.
        window: Input steps.
        horizon: Forecast steps.
        time_features: ``"none"``, ``"day"`` or ``"week"``: 0, 2 or 4 more input channels.
        scaler: Scaler to use; None fits one on the given steps.

    Returns:
        The city's windows, scaler and graph.

    Raises:
        ValueError: If the split does not fit the city, or a part has no room for one window.

    Example:
        >>> from stlora_peft.data import simulate_city
        >>> city = simulate_city(num_nodes=5, days=4, seed=0)
        >>> data = prepare(city, adaptation_split(city.num_steps, city.steps_per_day, days=2))
        >>> batch = data.train.__getitems__([0, 1, 2])
        >>> batch["x"].shape, batch["y"].shape
        (torch.Size([3, 12, 5, 3]), torch.Size([3, 12, 5, 1]))
    """
    check_lengths(window, horizon)
    _check_split(city, split)
    scaler = scaler or Scaler.fit(city.values[split.given.start : split.given.stop])
    targets = torch.from_numpy(city.values)
    series = input_series(city, scaler, window, time_features)
    first = {"train": split.train.start, "val": split.val.start - window, "test": split.test.start - window}
    starts = {
        name: _starts(city.name, name, getattr(split, name), first[name], window, horizon)
        for name in ("train", "val", "test")
    }
    train, val, test = (Windows(series, targets, rows, window=window, horizon=horizon) for rows in starts.values())
    return CityData(
        city=city,
        split=split,
        scaler=scaler,
        train=train,
        val=val,
        test=test,
        edge_index=torch.from_numpy(city.edge_index),
        edge_weight=torch.from_numpy(city.edge_weight),
        time_features=time_features,
    )


def _check_split(city: City, split: Split) -> None:
    """Raise where the split reaches beyond the record."""
    if split.test.stop > city.num_steps:
        raise ValueError(
            message(
                f"split does not fit city '{city.name}'",
                expected=f"parts within its {city.num_steps} steps",
                got=f"a test part that ends at step {split.test.stop}",
                fix="split this city's own number of steps",
            )
        )


def _starts(city: str, part: str, steps: range, first: int, window: int, horizon: int) -> torch.Tensor:
    """First steps of a part's windows."""
    starts = torch.arange(max(first, 0), max(steps.stop - window - horizon + 1, max(first, 0)))
    if len(starts) == 0:
        needed = window + horizon if part == "train" else horizon
        raise ValueError(
            message(
                f"city '{city}': the {part} part is too short for one window",
                expected=f"at least {needed} steps for window={window} and horizon={horizon}",
                got=f"{len(steps)} steps",
                fix="give more days, or a shorter window and horizon",
            )
        )
    return starts
