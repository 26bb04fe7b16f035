"""How far a method of a comparison is ahead of the others, with what the days and the seeds leave open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stlora_peft.significance import Difference

Row = Mapping[str, Any]


def differences(rows: Sequence[Row], ours: str = "st-lora") -> dict[tuple[float | None, str], Difference]:
    """Compare one method with every other, seed by seed and day by day.

    Args:
        rows: Rows of :func:`stlora_peft.comparison.compare`. Those without errors by day are left out.
        ours: Name of the method.

    Returns:
        Given days and name of the other method to the relative difference, negative where ``ours`` is better. Seeds
        that only one of the two has are left out; a method without a seed in common is not there.
    """
    from stlora_peft.significance import paired_difference  # it needs torch, which a table does not

    daily: dict[tuple[float | None, str], dict[int, Any]] = {}
    for row in rows:
        if row.get("daily"):
            daily.setdefault((row["days"], row["method"]), {})[row["seed"]] = row["daily"]
    found = {}
    for (days, method), theirs in daily.items():
        mine = daily.get((days, ours), {})
        seeds = [seed for seed in mine if seed in theirs]
        if method != ours and seeds:
            found[days, method] = paired_difference([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    return found


def difference_text(difference: Difference | None) -> str:
    """Write a relative difference in per cent, with its interval.

    Example:
        >>> from stlora_peft.significance import Difference
        >>> difference_text(Difference(-0.05, -0.07, -0.03, 0.001)), difference_text(Difference(0.01))
        ('-5.0 % (-7.0 to -3.0)', '+1.0 %')
        >>> difference_text(None)
        '-'
    """
    if difference is None or difference.relative is None:
        return "-"
    text = f"{100 * difference.relative:+.1f} %"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
