"""Time many cities on one backbone: one object for all of them against a loop of ``set_adapter``.

    python benchmarks/multi_city/run.py [--threads 1] [--repeats 3]

Simulated cities of 20 to 300 nodes with random adapters (``init_weights=False``), one window each; beyond 100 cities
the adapters are those of the first hundred again, each city with copies of its own. The loop runs over 20 of the 200
cities in a PEFT model that holds 100 of their adapters (200 take minutes to add, and make switching slower still): it
switches the adapter, scales, forecasts and scales back. ``apart`` is the same without switching, with a PEFT model for
each city. Processor time, medians. Writes ``results.json`` and ``results.md`` beside this file.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from stlora_peft import MultiCity, STLoraConfig
from stlora_peft.backbones import build_backbone
from stlora_peft.data import Scaler, time_encoding
from stlora_peft.data.splits import model_input

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import environment, footer, read_options, write_results  # noqa: E402 - found by the line above

COUNTS, DISTINCT = (2, 20, 200, 1000), 100
LOOP, HELD, SAMPLE = 200, 100, 20
SMALLEST, LARGEST, EDGES = 20, 300, 4
BACKBONES: dict[str, dict[str, Any]] = {
    "stgcn": {"num_nodes": 100, "hidden_channels": 16, "head_channels": 32},
    "lstm": {"hidden_size": 32},
}
FAST_ENOUGH, STEADY_ENOUGH = 5.0, 0.8
SCALER = Scaler(mean=(50.0,), std=(10.0,))
PACKAGES = ("torch", "peft", "torch-geometric")


@dataclass(frozen=True)
class Simulated:
    """One city: its number of nodes, its graph and the readings of one window."""

    num_nodes: int
    edge_index: Tensor
    edge_weight: Tensor
    readings: Tensor

    @classmethod
    def draw(cls, num_nodes: int, window: int, generator: torch.Generator) -> Simulated:
        """A random graph with four edges for each node, and random readings."""
        source = torch.arange(num_nodes).repeat(EDGES)
        away = torch.randint(1, num_nodes, source.shape, generator=generator)
        readings = 50 + 10 * torch.randn(window, num_nodes, 1, generator=generator)
        weight = torch.rand(len(source), generator=generator)
        return cls(num_nodes, torch.stack([source, (source + away) % num_nodes]), weight, readings)

    def config(self) -> STLoraConfig:
        """A random adapter of the default form."""
        return STLoraConfig(num_nodes=self.num_nodes, init_weights=False, scaler=SCALER.to_dict())


def draw_cities(count: int, window: int) -> dict[str, Simulated]:
    """Cities of sizes from the smallest to the largest, in a random order."""
    generator = torch.Generator().manual_seed(count)
    distinct = min(count, DISTINCT)
    sizes = torch.linspace(SMALLEST, LARGEST, distinct).long()[torch.randperm(distinct, generator=generator)].tolist()
    return {f"city-{i}": Simulated.draw(sizes[i % distinct], window, generator) for i in range(count)}


def seconds(call: Callable[[], object]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def median(call: Callable[[], object], repeats: int, least: float = 0.5) -> float:
    """Median of several calls after a first one, short ones often enough to be measured."""
    call()
    times = [seconds(call)]
    while len(times) < repeats or sum(times) < least:
        times.append(seconds(call))
    return statistics.median(times)


def together(backbone: nn.Module, cities: dict[str, Simulated], repeats: int) -> dict[str, Any]:
    """Nodes per second of one object for all cities, and what a city costs."""
    served = MultiCity(backbone)
    models: dict[int, PeftModel] = {}
    for name, city in cities.items():
        if city.num_nodes not in models:
            models[city.num_nodes] = get_peft_model(build_like(backbone), city.config())
        served.add(name, models[city.num_nodes], edge_index=city.edge_index, edge_weight=city.edge_weight)
    readings = {name: city.readings for name, city in cities.items()}
    first = seconds(lambda: served.forecast(readings))
    taken, report = median(lambda: served.forecast(readings), repeats), served.report()
    nodes = sum(city.num_nodes for city in cities.values())
    return {
        "cities": len(cities),
        "nodes": nodes,
        "seconds": round(taken, 4),
        "first_seconds": round(first, 4),
        "nodes_per_second": round(nodes / taken),
        "load_ms": round(1e3 * statistics.median(each.seconds for each in report), 2),
        "adapter_kib": round(sum(each.num_bytes for each in report) / len(report) / 1024),
        "stacked_kib": round(sum(each.stacked_bytes for each in report) / len(report) / 1024),
        "alone": sum(bool(each.alone) for each in report),
    }


def build_like(backbone: Any) -> nn.Module:
    """A copy of the backbone to put an adapter on."""
    copied = build_backbone(backbone.name, **backbone.hyperparameters).eval()
    copied.load_state_dict(backbone.state_dict())
    return copied


def one_by_one(backbone: nn.Module, cities: dict[str, Simulated], repeats: int) -> dict[str, float]:
    """Nodes per second of a loop over a sample of the cities, with and without switching."""
    names = list(cities)[: HELD : HELD // SAMPLE]
    first, *others = list(cities)[:HELD]
    model = get_peft_model(build_like(backbone), cities[first].config(), adapter_name=first)
    for name in others:
        model.add_adapter(name, cities[name].config())
    model.eval()
    apart = {name: get_peft_model(build_like(backbone), cities[name].config()).eval() for name in names}
    nodes = sum(cities[name].num_nodes for name in names)

    def switching() -> None:
        for name in names:
            model.set_adapter(name)
            forecast(model, cities[name])

    def kept_apart() -> None:
        for name in names:
            forecast(apart[name], cities[name])

    calls = {"loop": switching, "apart": kept_apart}
    return {key: round(nodes / median(call, repeats)) for key, call in calls.items()}


def forecast(model: PeftModel, city: Simulated) -> Tensor:
    """One city's forecast in its own unit, as ``stlora forecast`` makes it."""
    clock = time_encoding(len(city.readings), 5, None, "day")[:, None]
    x = model_input(city.readings, SCALER.transform, len(city.readings), clock)[None]
    with torch.no_grad():
        return SCALER.inverse(model(x, city.edge_index, city.edge_weight))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one backbone."""
    torch.manual_seed(0)
    backbone = build_backbone(name, in_channels=3, **BACKBONES[name]).eval()
    runs = [together(backbone, draw_cities(count, backbone.window), options.repeats) for count in COUNTS]
    return {"runs": runs, **one_by_one(backbone, draw_cities(LOOP, backbone.window), options.repeats)}


def rows_of(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What is compared with a goal."""
    speed = {run["cities"]: run["nodes_per_second"] for run in found["runs"]}
    steady = f"{name}: nodes per second with {COUNTS[-1]:,} cities to those with {COUNTS[0]}"
    return [
        {
            "name": steady,
            "ratio": round(speed[COUNTS[-1]] / speed[COUNTS[0]], 2),
            "goal": STEADY_ENOUGH,
            "better": "higher",
        },
        {
            "name": f"{name}: {LOOP} cities together to the set_adapter loop",
            "ratio": round(speed[LOOP] / found["loop"], 2),
            "goal": FAST_ENOUGH,
            "better": "higher",
        },
        {
            "name": f"{name}: {LOOP} cities together to one PEFT model for each city",
            "ratio": round(speed[LOOP] / found["apart"], 2),
            "goal": 1.0,
            "better": "higher",
        },
    ]


def table(rows: list[dict[str, Any]], measured: dict[str, dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Many cities on one backbone",
        "",
        f"Written by `python benchmarks/multi_city/run.py`. Cities of {SMALLEST} to {LARGEST} nodes, one window each, "
        "the default adapter with random weights; processor time, one thread.",
        "",
        "| | ratio | goal |",
        "|---|---:|---:|",
    ]
    lines += [f"| {row['name']} | **{row['ratio']}** | {row['goal']} |" for row in rows]
    for name, found in measured.items():
        sizes = ", ".join(f"{key}={value}" for key, value in BACKBONES[name].items())
        lines += [
            "",
            f"## {name} ({sizes})",
            "",
            "| cities | nodes | nodes per second | one call, s | first call, s | loading a city, ms of wall time "
            "| adapter, KiB | stacks of a city, KiB |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {run['cities']:,} | {run['nodes']:,} | {run['nodes_per_second']:,} | {run['seconds']:.3f} "
            f"| {run['first_seconds']:.3f} | {run['load_ms']} | {run['adapter_kib']} | {run['stacked_kib']} |"
            for run in found["runs"]
        ]
        lines += [
            "",
            f"{SAMPLE} of the {LOOP} cities one by one: {found['loop']:,} nodes per second with `set_adapter` in a "
            f"model of {HELD} adapters, {found['apart']:,} with a PEFT model for each city.",
        ]
    lines += ["", footer(about, "repeats or more of each")]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the comparison on both backbones."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    options = read_options(__doc__, repeats=3)
    measured = {name: measure(name, options) for name in BACKBONES}
    rows = [row for name, found in measured.items() for row in rows_of(name, found)]
    about = environment(options, PACKAGES) | {"measured": measured}
    write_results(FOLDER, rows, about, table(rows, measured, about))


if __name__ == "__main__":
    main()
