"""Time and memory of a pass over the nodes of cities of 1,000 to 100,000 sensors, part by part.

    python benchmarks/large_graph/run.py [--threads 1] [--repeats 1]

Simulated cities, the default adapter on a small stgcn, parts of at most 1,000 nodes with a halo of two hops, two
windows at a time: what grows is the number of nodes. Timed is a pass of the training in processor time, a later one.
Peak memory is what steps take at most beyond what lies there before them: the data, the parameters, their averages and
the optimiser's moments. It is measured in a process whose C library returns what is freed; what it holds back
otherwise, for parts of many sizes, is shown beside it. Writes ``results.json`` and ``results.md`` beside
this file.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from stlora_peft.backbones import build_backbone
from stlora_peft.data import City, CityData, Split, prepare, simulate_city
from stlora_peft.memory import PeakMemory
from stlora_peft.methods import build_adapter
from stlora_peft.sampling import SubGraph, city_parts
from stlora_peft.training import TrainingOptions, train

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import environment, footer, read_options, write_results  # noqa: E402 - found by the line above

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
WHOLE = 10_000
"""Size at which the whole graph is trained too, for its memory."""
WINDOWS, NODES_PER_STEP, HOPS = 2, 1_000, 2
GOAL = 1.05
MEMORY_GOAL = 1.5
"""Parts of large cities have a halo, which the one part of 1,000 nodes has not."""
PACKAGES = ("torch", "peft", "transformers", "torch-geometric", "torch-geometric-temporal")
MIB = 2**20


MEASURED_STEPS = 16
RETURNED = "100000"
"""Bytes from which the C library returns a block when it is freed; otherwise the size grows as it goes."""


class Passes(TrainerCallback):
    """Processor time of every pass, and its peak memory with what the C library holds back."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to measure."""
        self._memory = PeakMemory()
        self._memory.__enter__()
        self._began = time.process_time()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a pass."""
        self.seconds.append(time.process_time() - self._began)
        self._memory.__exit__(None, None, None)
        self.peaks.append((self._memory.bytes or 0) / MIB)


class Peak(TrainerCallback):
    """Peak memory of the steps after the first, which makes the optimiser's moments."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to measure."""
        if state.global_step == 1:
            self._memory = PeakMemory()
            self._memory.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the peak."""
        self._memory.__exit__(None, None, None)
        self.mib = (self._memory.bytes or 0) / MIB


def data_of(city: City) -> CityData:
    """A city with two windows to train on."""
    given = 24 + WINDOWS - 1
    split = Split(range(given), range(given, given + 12), range(given + 12, city.num_steps), range(given))
    return prepare(city, split, window=12, horizon=12)


def training(city: City, whole: bool) -> tuple[PeftModel, CityData, TrainingOptions, list[SubGraph]]:
    """An adapter for a city, and how it is trained."""
    data = data_of(city)
    parts = city_parts(data, city.num_nodes if whole else NODES_PER_STEP, HOPS)
    torch.manual_seed(0)
    backbone = build_backbone("stgcn", num_nodes=207, in_channels=3, hidden_channels=16, head_channels=32)
    options = TrainingOptions(
        patience=None, progress=False, cache_frozen=False, nodes_per_step=None if whole else NODES_PER_STEP, hops=HOPS
    )
    return build_adapter(backbone, data, parts=parts), data, options, parts


def peak_of(file: str, whole: bool) -> float:
    """Peak memory of some steps, in this process."""
    model, data, options, parts = training(City.load(file), whole)
    peak = Peak()
    train(model, data, replace(options, max_steps=1 + min(len(parts), MEASURED_STEPS)), callbacks=[peak])
    return peak.mib


def peak_elsewhere(city: City, whole: bool) -> float:
    """The same in a process whose C library returns large blocks when they are freed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "city.npz"
        city.save(file)
        command = [sys.executable, __file__, "--peak", str(file), *(["--whole"] if whole else [])]
        environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": RETURNED}
        found = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    return float(found.stdout.split()[-1])


def measure(num_nodes: int, repeats: int, whole: bool = False) -> dict[str, Any]:
    """Train for some passes; the first one, which makes the optimiser's moments, does not count."""
    city = simulate_city(num_nodes, days=0.2, seed=0)
    model, data, options, parts = training(city, whole)
    passes, count = Passes(), 1 + max(repeats, 10_000 // num_nodes)
    train(model, data, replace(options, max_epochs=count), callbacks=[passes])
    seconds = statistics.median(passes.seconds[1:])
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return {
        "nodes": num_nodes,
        "whole": whole,
        "parts": len(parts),
        "computed": round(sum(len(part.node_ids) for part in parts) / num_nodes, 3),
        "seconds": round(seconds, 3),
        "microseconds_per_node": round(1e6 * seconds / num_nodes, 1),
        "peak_MiB": round(peak_elsewhere(city, whole), 1),
        "held_MiB": round(max(passes.peaks[1:]), 1),
        "trained_MiB": round(trained / MIB, 2),
        "data_MiB": round((data.train.series.nbytes + data.train.targets.nbytes) / MIB, 1),
    }


def exponent(rows: list[dict[str, Any]]) -> float:
    """Slope of the logarithm of a pass's seconds over that of the nodes, by least squares."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("nodes", "seconds"))
    return statistics.linear_regression(x, y).slope


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept from run to run."""
    parts, whole = [row for row in rows if not row["whole"]], [row for row in rows if row["whole"]]
    by_size = {row["nodes"]: row for row in parts}
    first, last = parts[0], parts[-1]
    grown = last["peak_MiB"] / first["peak_MiB"]
    saved = whole[0]["peak_MiB"] / by_size[WHOLE]["peak_MiB"]
    return [
        {
            "name": f"growth exponent of a pass, {first['nodes']:,} to {last['nodes']:,} nodes",
            "ratio": round(exponent(parts), 3),
            "goal": GOAL,
            "better": "lower",
        },
        {
            "name": f"peak memory of a step at {last['nodes']:,} nodes to that at {first['nodes']:,}",
            "ratio": round(grown, 2),
            "goal": MEMORY_GOAL,
            "better": "lower",
        },
        {
            "name": f"peak memory at {WHOLE:,} nodes, whole graph to parts",
            "ratio": round(saved, 2),
            "goal": None,
            "better": "higher",
        },
    ]


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results in Markdown."""
    kept = ratios(rows)
    lines = [
        "# Training part by part",
        "",
        "Written by `python benchmarks/large_graph/run.py`. A pass over the nodes of simulated cities, "
        f"{WINDOWS} windows, parts of at most {NODES_PER_STEP:,} nodes and {HOPS} hops around them; the default "
        "adapter on stgcn. Processor time of a pass; peak: what a step takes beyond the data, the parameters, their "
        "average and the optimiser's two moments (three times the column `trained` together); held: the same with "
        "what the C library does not return to the system in between.",
        "",
        "| nodes | parts | nodes computed, share | seconds a pass | microseconds a node | peak, MiB | held, MiB | "
        "trained, MiB | data, MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name = f"{row['nodes']:,}" + (", whole graph" if row["whole"] else "")
        cells = [name, *(f"{row[key]:,}" for key in row if key not in ("nodes", "whole"))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {row['name']}: **{row['ratio']}**" for row in kept)]
    return "\n".join([*lines, "", footer(about, "passes or more after the first"), ""])


def main() -> None:
    """Measure every size and write the results."""
    if sys.argv[1:2] == ["--peak"]:
        torch.set_num_threads(1)
        print(peak_of(sys.argv[2], "--whole" in sys.argv))
        return
    options = read_options(__doc__, repeats=1)
    rows = [measure(size, options.repeats) for size in SIZES]
    rows.append(measure(WHOLE, options.repeats, whole=True))
    about = environment(options, PACKAGES)
    write_results(FOLDER, rows, about, table(rows, about), ratios=ratios(rows))


if __name__ == "__main__":
    main()
