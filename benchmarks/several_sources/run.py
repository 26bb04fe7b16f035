"""Does a backbone of three source cities serve a fourth better than one of a single city?

    python benchmarks/several_sources/run.py [--threads 1] [--backbones lstm,stgcn] [--sources LIST] [--report]

The target is that of the setting ``unlike`` of ``benchmarks/accuracy``, 3 days given, and so are the ways of training.
The backbone is pretrained on that setting's source; on it for three times as many passes, as many steps as three
cities take; or on it and two further cities (the setting ``three-sources``). Rows are kept in ``runs/several_sources``
as soon as they are measured. Writes ``results.json`` and ``results.md`` beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent / "accuracy"), str(FOLDER.parent)]

from cities import SETTINGS  # noqa: E402 - the folders above come first
from common import environment, footer, write_results  # noqa: E402
from run import PRETRAINING, ROOT, Plan, measure  # noqa: E402

from stlora_peft.comparison import RESULTS  # noqa: E402
from stlora_peft.files import read_json  # noqa: E402

DAYS, SEEDS = 3.0, (0, 1, 2)
METHODS = ("zero-shot", "full", "st-lora")
PACKAGES = ("torch", "peft", "transformers", "torch-geometric-temporal")
LONGER = replace(PRETRAINING, max_epochs=3 * PRETRAINING.max_epochs, patience=3 * (PRETRAINING.patience or 1))
SOURCES = {
    "one": ("one city", "unlike", PRETRAINING),
    "one-longer": ("one city, three times as long", "unlike", LONGER),
    "three": ("three cities", "three-sources", PRETRAINING),
}
"""What the backbone is pretrained on, by name: in words, the setting and how long."""


def rows_of(folder: Path, name: str, backbone: str) -> list[dict[str, Any]]:
    """Measured rows of a backbone, one for each method."""
    path = folder / name / backbone / f"{DAYS:g}" / RESULTS
    found = read_json(path) if path.exists() else []
    rows = []
    for method in METHODS:
        errors = [row["mae"] for row in found if row["method"] == method and row["seed"] in SEEDS]
        if errors:
            row = {"backbone": backbone, "sources": name, "method": method, "mae": errors}
            rows.append({**row, "mean": statistics.mean(errors), "std": statistics.pstdev(errors)})
    return rows


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    known = {(row["backbone"], row["sources"], row["method"]): row for row in rows}
    lines = [
        "# One source city or three",
        "",
        "Written by `python benchmarks/several_sources/run.py`. Test MAE in km/h of a simulated target "
        "(the setting `unlike` of [accuracy](../accuracy/results.md)), 3 days given, mean and standard deviation over "
        "the seeds of the adaptation; in brackets relative to the backbone of one city. One "
        "pretraining for each row; a dash is not measured for every seed.",
        "",
        "| backbone | pretrained on | " + " | ".join(METHODS) + " |",
        "|---|---|" + "---:|" * len(METHODS),
    ]
    for backbone, name in dict.fromkeys((row["backbone"], row["sources"]) for row in rows):
        cells = [
            _cell(known.get((backbone, name, method)), known.get((backbone, "one", method))) for method in METHODS
        ]
        lines.append(f"| {backbone} | {SOURCES[name][0]} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", footer(about, "seeds")]) + "\n"


def _cell(row: dict[str, Any] | None, one: dict[str, Any] | None) -> str:
    """Mean, spread and the change against one city; a dash for what has not been measured for every seed."""
    if row is None or len(row["mae"]) < len(SEEDS):
        return "-"
    change = "" if one is None or one is row else f" ({100 * (row['mean'] / one['mean'] - 1):+.1f} %)"
    return f"{row['mean']:.3f} ± {row['std']:.3f}{change}"


def main() -> None:
    """Measure what is asked for and has not been measured, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--backbones", default="lstm,stgcn")
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.repeats = len(SEEDS)
    torch.set_num_threads(options.threads)
    folder, backbones = options.runs / "several_sources", options.backbones.split(",")
    for name in [] if options.report else options.sources.split(","):
        _, setting, pretraining = SOURCES[name]
        plan = Plan(backbones, [DAYS], METHODS, SEEDS, pretraining=pretraining)
        measure(SETTINGS[setting], plan, ROOT, folder / name)
    rows = [row for backbone in backbones for name in SOURCES for row in rows_of(folder, name, backbone)]
    about = environment(options, PACKAGES)
    write_results(FOLDER, rows, about, table(rows, about))


if __name__ == "__main__":
    main()
