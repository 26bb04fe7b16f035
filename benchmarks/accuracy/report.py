"""What the comparison found: the goals, a table for each setting, and a picture of error against parameters."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from goals import OURS, goal_lines
from PIL import Image

from stlora_peft.comparison import RESULTS
from stlora_peft.differences import differences
from stlora_peft.figures import save_figure
from stlora_peft.files import atomic_write, read_json
from stlora_peft.methods import METHODS
from stlora_peft.pareto_figure import draw_pareto
from stlora_peft.provenance import environment
from stlora_peft.reports import COLUMNS, days_name, in_order, markdown_table, summarise

Row = dict[str, Any]
ROWS = "rows"  # the folder of what was measured, a file for each setting
INTERVAL = 5  # minutes: that of every city here


@dataclass(frozen=True)
class Part:
    """The rows of one setting, backbone and number of days."""

    setting: str
    backbone: str
    days: float | None
    rows: list[Row]

    @property
    def key(self) -> tuple[str, str, float | None]:
        """What tells it apart."""
        return self.setting, self.backbone, self.days

    @property
    def title(self) -> str:
        """Setting, backbone and days in a line."""
        return f"{self.setting}, {self.backbone}, {days_name(self.days)}"

    def maes(self, method: str) -> dict[int, float]:
        """MAE by seed, nothing where one is not finite."""
        found = {row["seed"]: row["mae"] for row in self.rows if row["method"] == method}
        return {} if None in found.values() else found

    def numbers(self, method: str, name: str) -> set[int]:
        """What the rows of a method have under a name."""
        return {row[name] for row in self.rows if row["method"] == method}

    def against(self, rivals: Sequence[str], method: str = OURS) -> float | None:
        """MAE of a method relative to the best of some rivals, over the seeds of both; None where one is missing."""
        ours, found = self.maes(method), []
        for theirs in map(self.maes, rivals):
            seeds = ours.keys() & theirs.keys()
            if not seeds:
                return None
            found.append(statistics.fmean(ours[s] for s in seeds) / statistics.fmean(theirs[s] for s in seeds) - 1)
        return max(found)


def parts_of(runs: Path) -> Iterator[Part]:
    """What has been measured, in the order of the names."""
    for file in sorted(runs.glob(f"*/*/*/{RESULTS}")):
        rows = read_json(file)
        if rows:
            setting, backbone = file.parts[-4:-2]
            yield Part(setting, backbone, rows[0]["days"], rows)


def rounded(value: Any) -> Any:
    """The same with six digits of every number that is no whole one.

    Example:
        >>> rounded({"mae": [2.0000001, 3]})
        {'mae': [2.0, 3]}
    """
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def in_few_colours(picture: Path) -> None:
    """Write a picture anew with 64 colours: it has a panel for each setting and would be too large to keep."""
    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    with atomic_write(picture) as temporary:
        small.save(temporary, format="png", optimize=True)


def write_report(runs: Path, folder: Path, titles: Mapping[str, str]) -> None:
    """Write ``rows``, ``results.md`` and ``results.png`` of what has been measured and of what was kept before."""
    parts = joined(kept_parts(folder), parts_of(runs))
    if not parts:
        sys.exit(f"nothing has been measured in '{runs}'")
    for setting in dict.fromkeys(part.setting for part in parts):
        kept = [{"backbone": part.backbone, **row} for part in parts if part.setting == setting for row in part.rows]
        _keep_rows(folder / ROWS / f"{setting}.json", kept)
    save_figure(draw_pareto({part.title: part.rows for part in parts}, "city's units"), folder / "results.png")
    in_few_colours(folder / "results.png")
    goals = goal_lines(parts)
    lines = ["# Ways to bring a backbone to another city", "", *goals, *_settings(parts, titles)]
    lines += ["![MAE against trained parameters, one panel for each setting](results.png)", ""]
    lines += ["## Where the numbers come from", "", "| | |", "|---|---|"]
    about = environment(row for part in parts for row in part.rows)
    lines += [f"| {name} | {value} |" for name, value in about.items()]
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(goals))


def kept_parts(folder: Path) -> Iterator[Part]:
    """What an earlier report kept."""
    for file in sorted((folder / ROWS).glob("*.json")):
        groups: dict[tuple[str, float | None], list[Row]] = {}
        for row in read_json(file)["rows"]:
            groups.setdefault((row.pop("backbone"), row["days"]), []).append(row)
        for (backbone, days), rows in groups.items():
            yield Part(file.stem, backbone, days, rows)


def committed_rows(folder: Path, setting: str, backbone: str, days: float | None) -> list[Row]:
    """Read the rows that an earlier report kept of one part."""
    return next((part.rows for part in kept_parts(folder) if part.key == (setting, backbone, days)), [])


def joined(kept: Iterable[Part], measured: Iterable[Part]) -> list[Part]:
    """Put what has been measured in the place of what was kept, row by row.

    Of a part that was measured in other settings, and of a method that was measured by another recipe, nothing of
    before is left: one table must not mix them.
    """
    parts = {part.key: part for part in kept}
    for part in measured:
        recipes = {row["method"]: row["recipe"] for row in part.rows}
        done = {(row["method"], row["seed"]) for row in part.rows}
        before = parts[part.key].rows if part.key in parts else []
        still = [
            row
            for row in before
            if row["settings"] == part.rows[0]["settings"]
            and recipes.get(row["method"], row["recipe"]) == row["recipe"]
            and (row["method"], row["seed"]) not in done
        ]
        parts[part.key] = replace(part, rows=[*part.rows, *still])
    return sorted(parts.values(), key=lambda part: (part.setting, part.backbone, part.days or math.inf))


def _keep_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows, a line for each: indented, they would be thousands."""
    file.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(rounded(row), allow_nan=False) for row in rows)
    with atomic_write(file) as temporary:
        temporary.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def _settings(parts: Sequence[Part], titles: Mapping[str, str]) -> list[str]:
    """One table for each part."""
    lines = [
        "Errors on the test part, the last 20 % of the record: mean ± sample standard deviation over seeds; MAE and "
        "RMSE in mph (Los Angeles), vehicles in 5 minutes (Shenzhen) or km/h (simulated). The lowest MAE is bold.",
        COLUMNS,
        "",
    ]
    for part in parts:
        heading = f"{titles.get(part.setting, part.setting)}; {part.backbone}; {days_name(part.days)}"
        rows = in_order(part.rows, METHODS)
        table = markdown_table(summarise(rows), INTERVAL, differences(rows))
        lines += [f"## {heading}", "", *table, ""]
    return lines


def check_quick(runs: Path) -> None:
    """Print the small comparison; fail unless st-lora is ahead of the others.

    Raises:
        SystemExit: With code 1 if it is not.
    """
    for part in parts_of(runs):
        found = {method: part.maes(method) for method in dict.fromkeys(row["method"] for row in part.rows)}
        means = {method: statistics.fmean(maes.values()) for method, maes in found.items() if maes}
        print(f"{part.title}: " + ", ".join(f"{method} {mae:.4g}" for method, mae in means.items()))
        behind = [m for m in found if m != OURS and (part.against([m]) is None or part.against([m]) >= 0)]
        if behind:
            print(f"st-lora is not ahead of {', '.join(behind)}", file=sys.stderr)
            sys.exit(1)
