"""Folds of a city's few given days: each part held back in turn, by whole days where there are several."""

from __future__ import annotations

import math

import torch

from stlora_peft.data.splits import CityData
from stlora_peft.data.windows import Windows
from stlora_peft.errors import message

DAY_FOLDS, HOUR_FOLDS = 3, 6
"""Of whole days, and of the hours of less than two: the longer a block, the less the rest says of it."""


class Fold(CityData):
    """A city of whose given windows some are held back: ``train`` and ``given`` are the others, ``val`` are they."""

    @property
    def given(self) -> Windows:
        """The windows to train on."""
        return self.train


def held_out_folds(data: CityData) -> list[Fold]:
    """Cut the given windows into consecutive blocks and hold each of them back in turn.

    Of two days or more each block is made of whole days, and a window belongs to the day that its forecast begins on;
    a part of a day goes with the last. Of less it is a sixth of the windows, four hours of a day. No window that
    trains shares a step with one that is held back.

    Args:
        data: The city.

    Returns:
        Three folds of three days or more, two of two, six of less. Every given window is held back in one of them.

    Raises:
        ValueError: If a block leaves nothing to train on, or has no reading to compare with.

    Example:
        >>> from stlora_peft.data import adaptation_split, prepare, simulate_city
        >>> city = simulate_city(num_nodes=3, days=5, interval_minutes=60, seed=0)
        >>> data = prepare(city, adaptation_split(city.num_steps, city.steps_per_day, days=3), window=4, horizon=2)
        >>> [(len(fold.train), len(fold.val)) for fold in held_out_folds(data)]
        [(42, 20), (33, 24), (39, 23)]
    """
    windows = data.given
    starts, span = windows.starts, windows.window + windows.horizon
    days = math.floor(len(data.split.given) / data.city.steps_per_day)
    if days >= 2:
        count = min(DAY_FOLDS, days)
        day = ((starts + windows.window - data.split.given.start) // data.city.steps_per_day).clamp(max=days - 1)
        block = (day * count // days).long()
    else:
        count = HOUR_FOLDS
        block = torch.arange(len(starts)) * count // len(starts)
    folds = []
    for number in range(count):
        held = starts[block == number]
        apart = held.new_empty(0)
        if len(held):
            apart = starts[(starts <= held.min() - span) | (starts >= held.max() + span)]
        _check_fold(data, windows.at(held), len(apart), f"{number + 1} of {count}")
        known = {name: getattr(data, name) for name in data.__dataclass_fields__}
        folds.append(Fold(**{**known, "train": windows.at(apart), "val": windows.at(held)}))
    return folds


def _check_fold(data: CityData, held: Windows, num_train: int, place: str) -> None:
    """Raise where nothing is left to train on or to compare with."""
    if num_train == 0:
        span = held.window + held.horizon
        raise ValueError(
            message(
                f"city '{data.city.name}': the given days are too few to choose a form of adapter by",
                expected=f"windows of {span} steps beside those that are held back",
                got=f"none beside fold {place}, of {len(data.split.given)} given steps",
                fix="give more days, or name a form, for instance 'embedding'",
            )
        )
    if not held.has_truth():
        raise ValueError(
            message(
                f"city '{data.city.name}': fold {place} has no truth to choose a form of adapter by",
                expected="at least one measured value in every part of the given days that is held back",
                got=f"{len(held)} windows without any",
                fix="give more days, or name a form, for instance 'embedding'",
            )
        )
