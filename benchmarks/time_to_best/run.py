"""Time an adapter until it is as good as full tuning ever gets on the validation part.

    python benchmarks/time_to_best/run.py [--threads 1] [--repeats 1]

Two simulated cities, 60 and 100 nodes: a backbone is trained on the first for a few epochs, then brought to two
given days of the second, by full tuning, by the default adapter and by the predictor alone. The time is the
processor's, from the start of the training to the first validation at most full tuning's lowest; that is full
tuning's time for itself. Untouched is full tuning with torch-geometric-temporal's layers as they are: the same numbers
in the time of one of its epochs, measured, for every one that full tuning takes. Writes ``results.json`` and
``results.md`` beside this file.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from stlora_peft.backbones import new_backbone
from stlora_peft.data import CityData, adaptation_split, prepare, pretraining_split, simulate_city
from stlora_peft.methods import METHODS, build_adapter
from stlora_peft.training import TrainingOptions, train

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import environment, footer, read_options, untouched, write_results  # noqa: E402 - found by the line above

GOAL = 0.2
PACKAGES = ("torch", "peft", "transformers", "torch-geometric-temporal")
BACKBONES = ("lstm", "gconvgru", "stgcn")
PRETRAINING = TrainingOptions(learning_rate=3e-3, max_epochs=4, batch_size=64, progress=False)
FULL = TrainingOptions(learning_rate=1e-3, max_epochs=10, patience=3, progress=False)
ADAPTER = TrainingOptions(learning_rate=3e-3, max_epochs=10, patience=10, progress=False)
ONE = TrainingOptions(learning_rate=1e-3, max_epochs=1, progress=False)

Build = Callable[[nn.Module, CityData], nn.Module]


def full(backbone: nn.Module, data: CityData) -> nn.Module:
    """Train everything."""
    return METHODS["full"].build(backbone, data).model


WAYS: dict[str, tuple[Build, TrainingOptions]] = {
    "full, untouched": (lambda backbone, data: untouched(full(backbone, data)), ONE),
    "full": (full, FULL),
    "default adapter": (build_adapter, ADAPTER),
    "predictor alone": (lambda backbone, data: build_adapter(backbone, data, target_modules=[]), ADAPTER),
}


class Watch(TrainerCallback):
    """Notes the validation error and the processor time since the start at every validation.

    Args:
        enough: Error at which the training is ended.
    """

    def __init__(self, enough: float = -math.inf) -> None:
        self.enough = enough
        self.began = time.process_time()
        self.seen: list[tuple[float, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Note one."""
        self.seen.append((metrics["eval_mae"], time.process_time() - self.began))
        control.should_training_stop |= metrics["eval_mae"] <= self.enough

    def seconds_to(self, error: float) -> float | None:
        """Time of the first validation at most this error; None where there is none."""
        return next((seconds for mae, seconds in self.seen if mae <= error), None)


def watched(way: str, backbone: nn.Module, data: CityData, enough: float = -math.inf) -> Watch:
    """Train one way and return what was noted."""
    build, options = WAYS[way]
    model, watch = build(backbone, data), Watch(enough)
    train(model, data, options, callbacks=[watch])
    return watch


def compare(name: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of one backbone."""
    source = simulate_city(60, 7, seed=0)
    start = prepare(source, pretraining_split(source.num_steps))
    target = simulate_city(100, 8, seed=1)
    data = prepare(target, adaptation_split(target.num_steps, target.steps_per_day, 2))
    backbone = new_backbone(name, start, seed=0)
    train(backbone, start, PRETRAINING)
    found: dict[str, list[float | None]] = {way: [] for way in WAYS}
    best = math.inf
    for _ in range(repeats):
        whole, one = watched("full", backbone, data), watched("full, untouched", backbone, data)
        best = min(mae for mae, _ in whole.seen)
        found["full"].append(whole.seconds_to(best))
        epochs = [mae for mae, _ in whole.seen].index(best)  # the first validation is before the first epoch
        first, second = (seconds for _, seconds in one.seen)
        found["full, untouched"].append(first + epochs * (second - first))
        for way in ("default adapter", "predictor alone"):
            found[way].append(watched(way, backbone, data, best).seconds_to(best))
    thans = ("full", "full, untouched")
    return [row(name, way, than, found, best) for way in ("default adapter", "predictor alone") for than in thans]


def row(name: str, way: str, than: str, found: dict[str, list[float | None]], best: float) -> dict[str, Any]:
    """One ratio; None where a training did not get as far."""
    times = [seconds for seconds in found[way] if seconds is not None]
    reached = len(times) == len(found[way])
    of_full = statistics.median(seconds for seconds in found[than] if seconds is not None)
    own = statistics.median(times) if reached else None
    return {
        "name": f"{name}: {way}, time in that of {than}",
        "seconds": None if own is None else round(own, 1),
        "seconds_of_full": round(of_full, 1),
        "best_of_full": round(best, 3),
        "ratio": None if own is None else round(own / of_full, 2),
        "goal": GOAL,
        "better": "lower",
    }


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Time until an adapter is as good as full tuning",
        "",
        "Written by `python benchmarks/time_to_best/run.py`. Processor seconds until the validation MAE is at most",
        "the lowest that full tuning reaches, and in full tuning's own time to it; untouched: as many epochs of full",
        "tuning with torch-geometric-temporal's layers as they are, one of which was timed.",
        "",
        "| what | seconds | seconds of full tuning | its lowest MAE | ratio | goal |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for entry in rows:
        own, ratio = (entry["seconds"], entry["ratio"]) if entry["ratio"] is not None else ("-", "not reached")
        cells = [entry["name"], own, entry["seconds_of_full"], entry["best_of_full"], f"**{ratio}**", entry["goal"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", footer(about)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time every way on every backbone."""
    options = read_options(__doc__, repeats=1)
    rows = [found for name in BACKBONES for found in compare(name, options.repeats)]
    about = environment(options, PACKAGES)
    write_results(FOLDER, rows, about, table(rows, about))


if __name__ == "__main__":
    main()
