"""Checks of the ranges of an adapter's settings."""

from __future__ import annotations

import math
from typing import Any

from stlora_peft.errors import message


def check_at_least_one(name: str, value: Any, optional: bool = False) -> None:
    """Raise unless the value is a whole number of at least 1, or None where that is allowed."""
    if (optional and value is None) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    raise ValueError(
        message(f"{name} is out of range", expected="a whole number of 1 or more", got=repr(value), fix="correct it")
    )


def check_probability(name: str, value: Any, optional: bool = False) -> None:
    """Raise unless the value is at least 0 and below 1, or None where that is allowed."""
    if not (optional and value is None) and (not isinstance(value, (int, float)) or not 0 <= value < 1):
        raise ValueError(
            message(f"{name} is out of range", expected="a probability in [0, 1)", got=repr(value), fix="correct it")
        )


def check_finite(name: str, value: Any) -> None:
    """Raise unless the value is a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(
            message(f"{name} is out of range", expected="a finite number", got=repr(value), fix="correct it")
        )


def check_not_negative(name: str, value: Any) -> None:
    """Raise unless the value is finite and at least 0."""
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(
            message(f"{name} is out of range", expected="a finite number >= 0", got=repr(value), fix="correct it")
        )
