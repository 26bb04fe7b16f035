"""How far one method is ahead of the others."""

from __future__ import annotations

from typing import Any

import pytest

from stlora_peft.differences import difference_text, differences
from stlora_peft.significance import Difference, paired_difference

OURS = {0: [[0, 8.0, 10], [1, 9.0, 10]], 1: [[0, 7.0, 10], [1, 9.5, 10]]}
THEIRS = {0: [[0, 10.0, 10], [1, 10.0, 10]], 1: [[0, 11.0, 10], [1, 10.0, 10]], 2: [[0, 1.0, 10], [1, 1.0, 10]]}


def rows_of(method: str, daily: dict[int, Any], days: float | None = 3) -> list[dict[str, Any]]:
    return [{"method": method, "days": days, "seed": seed, "daily": found} for seed, found in daily.items()]


def test_differences_pair_the_seeds_that_both_methods_have() -> None:
    rows = [*rows_of("full", THEIRS), *rows_of("st-lora", dict(reversed(OURS.items())))]
    expected = paired_difference([OURS[1], OURS[0]], [THEIRS[1], THEIRS[0]])
    assert differences(rows) == {(3, "full"): expected}
    assert expected.relative == pytest.approx(33.5 / 41.0 - 1)


def test_differences_keep_numbers_of_days_apart_and_leave_out_what_has_no_pair() -> None:
    rows = [
        *rows_of("st-lora", OURS),
        *rows_of("full", {2: THEIRS[2]}),  # no seed in common
        *rows_of("head", THEIRS, days=None),  # st-lora has not been measured there
        {"method": "lora", "days": 3, "seed": 0},  # an older row, without days
    ]
    assert differences(rows) == {}
    assert set(differences([*rows, *rows_of("st-lora", OURS, days=None)])) == {(None, "head")}


def test_differences_of_another_method_of_ours() -> None:
    rows = [*rows_of("full", {0: THEIRS[0]}), *rows_of("lora", {0: OURS[0]})]
    assert differences(rows, ours="lora")[3, "full"].relative == pytest.approx(-0.15)


def test_difference_text_without_a_number_is_a_dash() -> None:
    assert difference_text(Difference(None)) == "-"
