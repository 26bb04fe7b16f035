"""Compare adapters that were trained in float32 and under bfloat16 autocast, over seeds.

    python benchmarks/bf16/run.py [--threads 1] [--repeats 5]

A backbone is trained in float32 on a simulated city of 20 nodes. For every seed, st-lora adapts it to another of 16
nodes with the same first weights, order of windows and dropout, once in each format; `--repeats` is the number of
seeds. Writes ``results.json`` and ``results.md`` beside this file.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stlora_peft.backbones import new_backbone
from stlora_peft.data import CityData, adaptation_split, prepare, pretraining_split, simulate_city
from stlora_peft.evaluation import evaluate
from stlora_peft.methods import build_adapter
from stlora_peft.training import TrainingOptions, train

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import environment, footer, read_options, write_results  # noqa: E402 - found by the line above

PACKAGES = ("torch", "peft", "transformers", "torch-geometric-temporal")
BACKBONES = ("lstm", "stgcn")
DAYS, STEPS, SOURCE_STEPS = 3, 250, 400
FORMATS = {"float32": "no", "bfloat16": "bf16"}


def pair() -> tuple[CityData, CityData]:
    """A city to train the backbone on, and one to adapt it to."""
    source = simulate_city(20, 10, seed=21)
    target = simulate_city(16, 12, seed=22, character="grid")
    splits = pretraining_split(source.num_steps), adaptation_split(target.num_steps, target.steps_per_day, DAYS)
    first, second = (
        prepare(city, split, window=12, horizon=12) for city, split in zip((source, target), splits, strict=True)
    )
    return first, second


def options(steps: int, seed: int, mixed_precision: Any = "no") -> TrainingOptions:
    """Train for so many steps, on everything that is given."""
    how = {"learning_rate": 3e-3, "patience": None, "max_steps": steps, "progress": False}
    return TrainingOptions(seed=seed, mixed_precision=mixed_precision, **how)


def adapted(backbone: nn.Module, data: CityData, seed: int, kind: str) -> tuple[float, float, float]:
    """Test MAE forecast in float32, the same forecast in bfloat16, and seconds of processor time of the training."""
    torch.manual_seed(seed)
    model = build_adapter(backbone, data)
    began = time.process_time()
    train(model, data, options(STEPS, seed, FORMATS[kind]))
    seconds = time.process_time() - began
    exact = evaluate(model, data.test, data).mae
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = evaluate(model, data.test, data).mae
    return exact, rounded, seconds


def compare(name: str, source: CityData, target: CityData, seeds: int) -> list[dict[str, Any]]:
    """Rows of one backbone: training and forecast in each format, differences to float32 seed by seed."""
    backbone = new_backbone(name, source, seed=0)
    train(backbone, source, options(SOURCE_STEPS, 0))
    found = {kind: [adapted(backbone, target, seed, kind) for seed in range(seeds)] for kind in FORMATS}
    base = [one[0] for one in found["float32"]]
    rows = []
    for kind, runs in found.items():
        for place, forecast in enumerate(("float32", "bfloat16")):
            errors = [one[place] for one in runs]
            differences = [error - other for error, other in zip(errors, base, strict=True)]
            rows.append(
                {
                    "name": f"{name}: trained in {kind}, forecast in {forecast}",
                    "mae": errors,
                    "mean": statistics.mean(errors),
                    "std": statistics.stdev(errors),
                    "difference": statistics.mean(differences),
                    "standard_error": statistics.stdev(differences) / math.sqrt(seeds),
                    "largest": max(map(abs, differences)),
                    "seconds": statistics.median(one[2] for one in runs),
                }
            )
    return rows


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Accuracy under bfloat16 autocast",
        "",
        "Written by `python benchmarks/bf16/run.py`. Test MAE in km/h, mean and standard deviation over the seeds; "
        "the difference to float32 seed by seed, its mean with the standard error, and the largest; median processor "
        "time of a training in s.",
        "",
        "| training and forecast | MAE | difference to float32 | largest | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        mae, seconds = f"{row['mean']:.3f} ± {row['std']:.3f}", f"{row['seconds']:.0f}"
        first = row["largest"] == 0
        difference = "-" if first else f"{row['difference']:+.4f} ± {row['standard_error']:.4f}"
        largest = "-" if first else f"{row['largest']:.4f}"
        lines.append(f"| {row['name']} | {mae} | {difference} | {largest} | {seconds} |")
    sizes = ", ".join(f"{key}={value}" for key, value in about["sizes"].items())
    lines += ["", f"{sizes}; {footer(about, 'seeds')}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Adapt every backbone in both formats."""
    asked = read_options(__doc__, repeats=5)
    source, target = pair()
    rows = [row for name in BACKBONES for row in compare(name, source, target, asked.repeats)]
    sizes = {"N": target.city.num_nodes, "days": DAYS, "windows": len(target.given), "steps": STEPS, "B": 32}
    about = environment(asked, PACKAGES) | {"sizes": sizes}
    write_results(FOLDER, rows, about, table(rows, about))


if __name__ == "__main__":
    main()
