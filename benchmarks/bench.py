"""Run the speed benchmarks, keep their ratios, and say which have become worse than the committed ones.

    python benchmarks/bench.py [--only LIST] [--repeats N]     as `make bench` does, in under 15 minutes on two cores
    python benchmarks/bench.py --report                        only write the page

Every benchmark times two things in turns in one run, so that only their ratio counts; seconds are shown and never
compared. Writes ``results/NAME.json``, a list of rows with ``name``, ``ratio``, ``goal`` (None where none was set) and
``better`` ("higher" or "lower"), and ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stlora_peft.files import atomic_write, read_json, write_json

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
NAMES = ("layer_step", "accelerate", "frozen", "time_to_best", "multi_city", "large_graph")
TOLERANCE = 0.25
"""Ratios of one run differ by less than this from those of the next on a machine that does other work."""

Row = dict[str, Any]


def main() -> None:
    """Run what is asked for, compare with what was there, and write the page."""
    options = read_options()
    worse: list[str] = []
    for name in () if options.report else options.only.split(","):
        before = known(name)
        command = [sys.executable, str(FOLDER / name / "run.py")]
        subprocess.run([*command, *(["--repeats", str(options.repeats)] if options.repeats else [])], check=True)
        rows = ratios(read_json(FOLDER / name / "results.json"))
        worse += regressions(name, before, rows)
        write_json(FOLDER / "results" / f"{name}.json", rows)
    with atomic_write(PAGE) as temporary:
        temporary.write_text(page(), encoding="utf-8")
    print("\n".join(worse) or "no ratio has become worse than the committed one")


def ratios(results: Mapping[str, Any]) -> list[Row]:
    """The rows that can be compared from run to run.

    Args:
        results: A benchmark's ``results.json``.
    """
    rows = results.get("ratios", results["rows"])
    return [{key: row[key] for key in ("name", "ratio", "goal", "better")} for row in rows]


def known(name: str) -> list[Row]:
    """The rows of the last run, as they are committed."""
    file = FOLDER / "results" / f"{name}.json"
    return read_json(file) if file.exists() else []


def regressions(name: str, before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Say which ratios have become worse by more than the tolerance, and which are gone.

    A ratio of None is one that was not reached.

    Args:
        name: Name of the benchmark.
        before: Rows that were there.
        after: Rows of this run.

    Example:
        >>> row = {"name": "a", "ratio": 4.0, "goal": None, "better": "higher"}
        >>> regressions("x", [row], [row | {"ratio": 2.0}])
        ['x, a: ratio 2 where it was 4 (higher is better)']
        >>> regressions("x", [row], [row | {"ratio": 3.9}])
        []
    """
    found = {row["name"]: row for row in after}
    lines = []
    for row in before:
        if row["name"] not in found:
            lines.append(f"{name}, {row['name']}: not measured any more")
            continue
        ratio = found[row["name"]]["ratio"]
        if ratio is None or row["ratio"] is None:
            if row["ratio"] is not None:
                lines.append(f"{name}, {row['name']}: not reached where it was {row['ratio']:g}")
            continue
        change = ratio / row["ratio"] if row["better"] == "higher" else row["ratio"] / ratio
        if change < 1 - TOLERANCE:
            lines.append(
                f"{name}, {row['name']}: ratio {ratio:g} where it was {row['ratio']:g} ({row['better']} is better)"
            )
    return lines


def reached(row: Row) -> str:
    """Say whether a row reaches its goal."""
    if row["goal"] is None:
        return "-"
    if row["ratio"] is None:
        return "**no**"
    good = row["ratio"] >= row["goal"] if row["better"] == "higher" else row["ratio"] <= row["goal"]
    return "yes" if good else "**no**"


def page() -> str:
    """The page: every ratio beside its goal, then each benchmark's own table."""
    lines = [
        "# Speed, as ratios of one run",
        "",
        "`make bench` measures what stands here and writes this page. Two things are timed in turns in one run, so "
        "that other work on the machine falls on both; only the ratio counts.",
        "",
        "| benchmark | what | ratio | goal | better | reached |",
        "|---|---|---:|---:|---|---|",
    ]
    for name in NAMES:
        for row in known(name):
            goal = "-" if row["goal"] is None else f"{row['goal']:g}"
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:g}"
            cells = [name, row["name"], ratio, goal, row["better"], reached(row)]
            lines.append(f"| {' | '.join(cells)} |")
    for name in NAMES:
        table = FOLDER / name / "results.md"
        if known(name) and table.exists():
            lines += ["", "#" + table.read_text(encoding="utf-8").strip()]
    return "\n".join(lines) + "\n"


def read_options() -> argparse.Namespace:
    """Read the command line; an unknown benchmark ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--repeats", type=int, default=None, help="each benchmark's own number where it is not given")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    unknown = sorted(set(options.only.split(",")) - set(NAMES))
    if unknown:
        sys.exit(f"unknown benchmarks {', '.join(unknown)}; known are {', '.join(NAMES)}")
    return options


if __name__ == "__main__":
    main()
