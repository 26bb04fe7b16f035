"""Rows of the search as figures in a text: looked up, compared and written."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from search_arms import ARMS

Row = dict[str, Any]
Errors = dict[str, float]
Place = tuple[str, float]
WEEKEND, WEEKEND3, SHENZHEN, EAST = ("weekend", 1.0), ("weekend", 3.0), ("la-shenzhen", 3.0), ("west-east", 3.0)
PLACES = {WEEKEND: "`weekend`, 1 day", WEEKEND3: "`weekend`, 3 days", SHENZHEN: "`la-shenzhen`", EAST: "`west-east`"}
RATE = 0.003
NONE = "-"


@dataclass(frozen=True)
class Rows:
    """Rows with the look-ups that the words need; what is missing reads as a dash.

    Args:
        rows: All rows.
    """

    rows: Sequence[Row]

    def row(
        self,
        place: Place,
        arm: str,
        *,
        seed: int = 0,
        rate: float = RATE,
        training: str = "all",
        backbone: str = "stgcn",
    ) -> Row:
        """The row of an arm; of weights of the backbone the first that it was measured on."""
        rate, seed = (rate, seed) if ARMS[arm].trained else (0.0, 0)
        names = ("pair", "days", "arm", "seed", "rate", "training", "backbone")
        wanted = (*place, arm, seed, rate, training, backbone)
        return next((row for row in self.rows if tuple(row[name] for name in names) == wanted), {"mae": {}})

    def find(self, place: Place, arm: str, **which: Any) -> Errors:
        """Errors of an arm by number of steps."""
        errors: Errors = self.row(place, arm, **which)["mae"]
        return errors

    def mae(self, place: Place, arm: str, at: str | int, **which: Any) -> str:
        """An error."""
        return number(self.find(place, arm, **which).get(str(at)))

    def each(self, arm: str, other: str, places: Iterable[Place] = tuple(PLACES)) -> str:
        """How far an arm is from another wherever both were measured."""
        found = {name: change(self.find(place, arm), self.find(place, other)) for place, name in PLACES.items()}
        known = [
            f"{found[name]} ({name})" for place, name in PLACES.items() if place in places and found[name] != NONE
        ]
        return ", ".join(known) or "not measured"

    def kinds_of_days(self, place: Place, arm: str, **which: Any) -> str:
        """Errors of working days and of weekends after the last step, in a record that begins on a Monday."""
        daily = next(iter(self.row(place, arm, **which).get("daily", {}).values()), [])
        parts = [[entry for entry in daily if (entry[0] % 7 >= 5) == weekend] for weekend in (False, True)]
        found = [sum(entry[1] for entry in part) / sum(entry[2] for entry in part) if part else None for part in parts]
        return " / ".join(number(mae) for mae in found)

    def seeds(self, place: Place, arm: str, at: int) -> str:
        """Errors of all seeds, in their order."""
        found = [self.find(place, arm, seed=seed).get(str(at)) for seed in range(10)]
        return " / ".join(number(mae) for mae in found if mae is not None) or NONE


def number(mae: float | None) -> str:
    """Write an error."""
    return NONE if mae is None else f"{mae:.3f}"


def change(ours: Errors, theirs: Errors) -> str:
    """Write how far errors are from others, after the largest number of steps that both have.

    Example:
        >>> change({"150": 2.0, "300": 1.9}, {"150": 1.0, "300": 2.0, "600": 1.0})
        '-5.0 %'
    """
    steps = [step for step in ours.keys() & theirs.keys() if step not in ("0", "best")]
    last = max(steps, key=int, default="0")
    return f"{100 * (ours[last] / theirs[last] - 1):+.1f} %" if last in ours and last in theirs else NONE


def arms_table(rows: Rows, arms: Sequence[str], arm: str, rival: str) -> str:
    """Write a table of arms wherever one was measured, after the last step; the last column compares it with a rival.

    Args:
        rows: All rows.
        arms: Arms of the columns.
        arm: The one.
        rival: What it is compared with.
    """
    lines = [f"| pair | backbone | days | {' | '.join(f'`{name}`' for name in arms)} | `{arm}` to `{rival}` |"]
    lines.append("|---|---|---:|" + "---:|" * (len(arms) + 1))
    chosen = [row for row in rows.rows if row["arm"] == arm and row["seed"] == 0 and row["rate"] == RATE]
    for pair, backbone, days in dict.fromkeys((row["pair"], row["backbone"], row["days"]) for row in chosen):
        errors = {name: rows.find((pair, days), name, backbone=backbone) for name in arms}
        last = [number(errors[name].get(max(errors[name], key=int)) if errors[name] else None) for name in arms]
        cells = [pair, f"`{backbone}`", f"{days:g}", *last, change(errors[arm], errors[rival])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paragraph(text: str, indent: str = "") -> str:
    """Fill the lines of a paragraph."""
    return textwrap.fill(text, 140, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
