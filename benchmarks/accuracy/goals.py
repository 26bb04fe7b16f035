"""What is wanted of the adapters, and what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from report import Part

OURS, FRUGAL = "st-lora", "st-lora-frugal"
LARGE = 300_000
"""Parameters of a backbone from which on few of them may be trained."""


@dataclass(frozen=True)
class Goal:
    """What is wanted against some rivals.

    Args:
        rivals: The best of them counts, in every setting.
        most: Relative MAE of the method, at most.
        days: Days for which it is wanted; every number where empty.
        method: Whose error it is.
    """

    rivals: tuple[str, ...]
    most: float
    days: tuple[float | None, ...] = ()
    method: str = OURS

    def found(self, parts: Iterable[Part]) -> dict[str, float]:
        """Relative MAE by setting, where both sides have been measured."""
        chosen = (part for part in parts if not self.days or part.days in self.days)
        values = {part.title: part.against(self.rivals, self.method) for part in chosen}
        return {title: value for title, value in values.items() if value is not None}


GOALS = (
    Goal(("head", "norm", "ia3", "lora"), -0.05),
    Goal(("full",), -0.03, (1.0, 3.0)),
    Goal(("full",), 0.0, (None,)),
    Goal(("node-embedding", "node-prompt"), -0.05),
    Goal(("full+node-embedding",), 0.0),
    Goal(("lora",), 0.0, method=FRUGAL),
    Goal(("zero-shot",), -0.1, method="zero-shot+"),
)
SHARES = {OURS: 0.1, FRUGAL: 0.01, "lora": None}
"""Parameters that a method may train, relative to those of a large backbone; None where nothing is wanted."""


def goal_lines(parts: Sequence[Part]) -> list[str]:
    """The goals and their means, every setting, and what is trained of each backbone."""
    return [*_means(parts), *_each(parts), *_shares(parts)]


def _means(parts: Sequence[Part]) -> list[str]:
    lines = [
        "## Goals",
        "",
        "MAE of a method relative to the best of its rivals in each setting: mean and range over the settings.",
        "",
        "| | method | against the best of | days | goal | mean | best | worst | ahead in |",
        "|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for place, goal in enumerate(GOALS, start=1):
        found = list(goal.found(parts).values())
        days = ", ".join("all" if day is None else f"{day:g}" for day in goal.days) or "every"
        rivals = ", ".join(f"`{rival}`" for rival in goal.rivals)
        wanted = _percent(goal.most, 0)
        cells = [_percent(function(found)) for function in (statistics.fmean, min, max)] if found else ["-"] * 3
        ahead = f"{sum(value < 0 for value in found)} of {len(found)}"
        lines.append(f"| {place} | `{goal.method}` | {rivals} | {days} | {wanted} | {' | '.join(cells)} | {ahead} |")
    return [*lines, ""]


def _each(parts: Sequence[Part]) -> list[str]:
    """Every setting of the goals' means; columns are the goals by number."""
    found = [goal.found(parts) for goal in GOALS]
    lines = ["The same in each setting; the columns are the goals above. A method that is behind is bold.", ""]
    lines += [f"| setting | {' | '.join(str(place) for place in range(1, len(GOALS) + 1))} |"]
    lines += ["|---|" + "---:|" * len(GOALS)]
    for part in parts:
        values = [values.get(part.title) for values in found]
        if any(value is not None for value in values):
            lines.append(f"| {part.title} | {' | '.join(map(_cell, values))} |")
    return [*lines, ""]


def _shares(parts: Sequence[Part]) -> list[str]:
    """What the adapters train of each backbone; a range where cities have different numbers of nodes."""
    goals = ", ".join(f"`{method}` {_percent(most, 0)[1:]}" for method, most in SHARES.items() if most is not None)
    lines = [
        f"Trained parameters relative to the backbone's. Goals for backbones of {LARGE:,} and more: at most {goals}.",
        "",
        f"| backbone | parameters | {' | '.join(f'`{method}`' for method in SHARES)} |",
        "|---|---:|" + "---:|" * len(SHARES),
    ]
    for name in dict.fromkeys(part.backbone for part in parts):
        own = [part for part in parts if part.backbone == name]
        counted = _range([size for part in own for size in part.numbers("zero-shot", "total_parameters")], "{:,}")
        cells = [_range([share for part in own for share in _trained(part, method)], "{:.1f} %") for method in SHARES]
        lines.append(f"| `{name}` | {counted} | {' | '.join(cells)} |")
    return [*lines, ""]


def _trained(part: Part, method: str) -> Iterator[float]:
    """Parameters that a method trains in a setting, in per cent of the backbone's."""
    for size in part.numbers("zero-shot", "total_parameters"):
        for number in part.numbers(method, "trainable_parameters"):
            yield 100 * number / size


def _range(values: Sequence[float], form: str) -> str:
    """Least and largest of some numbers, one where they look alike, a dash where there are none."""
    return " to ".join(dict.fromkeys(form.format(end(values)) for end in (min, max))) if values else "-"


def _percent(value: float, decimals: int = 1) -> str:
    return f"{100 * value:+.{decimals}f} %"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"**{_percent(value)}**" if value > 0 else _percent(value)
