"""Time an epoch of adaptation with and without what is kept of the frozen part, against full tuning.

    python benchmarks/frozen/run.py [--threads 1] [--repeats 3]

A simulated city of 207 nodes, the 265 windows of one day in batches of 32. Every way trains for one epoch and for
three (untouched: two; ways whose epochs are short: twelve), in turns, so that other work on the machine falls on all
of them; the difference is without what is done once, which is said beside it. Untouched is full tuning of the backbone
with torch-geometric-temporal's layers as they are. Writes ``results.json`` and ``results.md`` beside this file.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from stlora_peft import STLoraConfig
from stlora_peft.backbones import new_backbone
from stlora_peft.data import CityData, adaptation_split, prepare, simulate_city
from stlora_peft.training import TrainingOptions, train

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import environment, footer, read_options, untouched, write_results  # noqa: E402 - found by the line above

NODES, FEW, MANY = 207, 1, 3
SHORT = 2.5
"""Seconds of a training whose epochs are so short that twelve are timed."""
PACKAGES = ("torch", "peft", "transformers", "torch-geometric-temporal")
BACKBONES = ("lstm", "gconvgru", "stgcn")
GOAL, DEFAULT_GOAL = 20.0, 5.0


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        name: What it is.
        build: Makes its model of a copy of the backbone.
        cache: Keep what is frozen.
        goal: How many times faster than full tuning an epoch should be.
        than: The full tuning that it is compared with.
    """

    name: str
    build: Callable[[nn.Module], nn.Module]
    cache: bool = True
    goal: float | None = None
    than: str = "full"


def head_alone(backbone: nn.Module) -> nn.Module:
    """Adapt the layers that make the forecast, without the predictor."""
    names = list(backbone.stlora_spec.head)
    return get_peft_model(backbone, STLoraConfig(num_nodes=NODES, target_modules=names, predictor=None))


def predictor_alone(backbone: nn.Module) -> nn.Module:
    """Put the predictor behind the frozen backbone, no adapted layer."""
    return get_peft_model(backbone, STLoraConfig(num_nodes=NODES, target_modules=[]))


def default_adapter(backbone: nn.Module) -> nn.Module:
    """Adapt it as one line does."""
    return get_peft_model(backbone, STLoraConfig(num_nodes=NODES))


WAYS = (
    Way("full", lambda backbone: backbone.requires_grad_(True)),
    Way("predictor alone", predictor_alone, goal=GOAL),
    Way("predictor alone, computed at every epoch", predictor_alone, cache=False),
    Way("last layers", head_alone, goal=GOAL),
    Way("last layers, computed at every epoch", head_alone, cache=False),
    Way("full, untouched", untouched),
    Way("default adapter", default_adapter),
    Way("default adapter", default_adapter, goal=DEFAULT_GOAL, than="full, untouched"),
    Way("predictor alone", predictor_alone, than="full, untouched"),
)


def data_of() -> CityData:
    """A city with one day of given readings: 265 windows."""
    city = simulate_city(NODES, 4, seed=0)
    return prepare(city, adaptation_split(city.num_steps, city.steps_per_day, 1), window=12, horizon=12)


def seconds(way: Way, backbone: nn.Module, data: CityData, epochs: int) -> float:
    """Processor time of a training."""
    torch.manual_seed(0)
    model = way.build(copy.deepcopy(backbone))
    options = TrainingOptions(patience=None, max_epochs=epochs, progress=False, cache_frozen=way.cache)
    began = time.process_time()
    train(model, data, options)
    return time.process_time() - began


def compare(name: str, data: CityData, repeats: int) -> list[dict[str, Any]]:
    """Rows of one backbone."""
    backbone = new_backbone(name, data, seed=0)
    ways = {way.name: way for way in WAYS if way.than == "full"}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways.values():
            few = seconds(way, backbone, data, FEW)
            several = FEW + 1 if way.build is untouched else MANY if few > SHORT else 4 * MANY
            each = (seconds(way, backbone, data, several) - few) / (several - FEW)
            found[way.name].append((each, few - FEW * each))
    epoch = {way: statistics.median(pair[0] for pair in pairs) for way, pairs in found.items()}
    once = {way: statistics.median(pair[1] for pair in pairs) for way, pairs in found.items()}
    return [
        {
            "name": f"{name}: {way.name}" + ("" if way.than == "full" else f", to {way.than}"),
            "seconds_per_epoch": round(epoch[way.name], 3),
            "seconds_once": round(once[way.name], 2),
            "ratio": round(epoch[way.than] / epoch[way.name], 2),
            "goal": way.goal,
            "better": "higher",
        }
        for way in WAYS
    ]


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# An epoch with what is frozen computed once",
        "",
        "Written by `python benchmarks/frozen/run.py`. Median processor time of an epoch, and how many times faster "
        "that is than an epoch of full tuning, or of full tuning with torch-geometric-temporal's layers as they are "
        "(untouched); once: what a training takes besides its epochs, filling the store too.",
        "",
        "| way | seconds an epoch | seconds once | ratio | goal |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        goal = "-" if row["goal"] is None else f"{row['goal']:g}"
        cells = [row["name"], f"{row['seconds_per_epoch']:.3f}", f"{row['seconds_once']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | **{row['ratio']}** | {goal} |")
    sizes = ", ".join(f"{key}={value}" for key, value in about["sizes"].items())
    lines += ["", f"{sizes}; {footer(about)}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time every way on every backbone."""
    options = read_options(__doc__, repeats=1)
    data = data_of()
    rows = [row for name in BACKBONES for row in compare(name, data, options.repeats)]
    about = environment(options, PACKAGES) | {"sizes": {"N": NODES, "windows": len(data.given), "B": 32}}
    write_results(FOLDER, rows, about, table(rows, about))


if __name__ == "__main__":
    main()
