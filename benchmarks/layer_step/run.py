"""Time a training step of a node-conditioned linear layer against PEFT's LoRA, a loop over the nodes, and the machine.

    python benchmarks/layer_step/run.py [--threads 1] [--repeats 9]

All variants wrap the same ``nn.Linear(d, d)`` and see the same batch, in turns, so that other work on the machine
falls on all of them. The loop over the nodes applies the same update (``conditioning="full"``) one node at a time.
The machine's own time is that of the layer's operations at the rate of a large matrix product, or of the tensors that
go in and out at the rate of a copy, whichever is longer; both rates are measured in the same turns.
Writes ``results.json`` and ``results.md`` beside this file.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from stlora_peft import STLoraConfig
from stlora_peft.allocator import keeping_freed_memory
from stlora_peft.tuner.conditioning import CONDITIONINGS

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import environment, footer, read_options, write_results  # noqa: E402 - found by the line above

GOAL, MACHINE_GOAL = 1.1, 1.5
SIZES = ((32, 12, 207, 64, 8), (2, 12, 8600, 64, 8))


class Backbone(nn.Module):
    """One linear layer on ``[b t n c]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.linear(x)


class NodeLoop(nn.Module):
    """The same update written as a loop: one product with ``A_i`` for each node."""

    def __init__(self, width: int, num_nodes: int, r: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.ParameterList(nn.Parameter(torch.randn(r, width) / width**0.5) for _ in range(num_nodes))
        self.up = nn.Parameter(torch.zeros(width, r))

    def forward(self, x: Tensor) -> Tensor:
        """Update node after node."""
        parts = zip(x.unbind(dim=2), self.down, strict=True)
        updates = [part @ down.mT @ self.up.mT for part, down in parts]
        return self.linear(x) + torch.stack(updates, dim=2)


def variants(num_nodes: int, width: int, r: int) -> dict[str, nn.Module]:
    """Every layer that is timed, by name."""
    models: dict[str, nn.Module] = {
        "PEFT LoRA": get_peft_model(Backbone(width), LoraConfig(r=r, target_modules=["linear"]))
    }
    for form in CONDITIONINGS:
        options = {"target_modules": ["linear"], "predictor": None, "lora_dropout": 0.0}  # LoRA's own default
        config = STLoraConfig(num_nodes=num_nodes, r=r, conditioning=form, **options)
        models[f"`{form}`"] = get_peft_model(Backbone(width), config)
    models["loop over nodes"] = NodeLoop(width, num_nodes, r)
    return models


def operations(form: str, rows: int, num_nodes: int, width: int, r: int) -> float:
    """Floating-point operations of a forward and backward pass: two products with W, three each with A and B."""
    node = {"core": 6 * rows * r * r, "gate": 6 * rows * r, "embedding": 6 * rows * r, "bias": 2 * rows * r}
    vectors = 12 * num_nodes * 16 * r if form == "embedding" else 0
    down = 0 if form == "bias" else 6 * rows * width * r
    return 4 * rows * width**2 + 6 * rows * width * r + down + node.get(form, 0) + vectors


def moved(form: str, rows: int, num_nodes: int, width: int, r: int) -> float:
    """Bytes that must go in and out: x, y and their gradients, x once more for A, and A_i with its gradient."""
    own = {"full": 2 * num_nodes * r * width, "core": 2 * num_nodes * r * r, "gate": 4 * num_nodes * r}
    return 4.0 * (5 * rows * width + own.get(form, 0))


def rates(turns: int = 20) -> dict[str, float]:
    """Operations of a large matrix product, and bytes of a copy, in a second."""
    matrix, source = torch.randn(1024, 1024), torch.randn(2**22)
    target = torch.empty_like(source)
    product = min(seconds(lambda: matrix @ matrix) for _ in range(turns))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(turns))
    return {"operations": 2 * 1024**3 / product, "bytes": 2 * source.nbytes / copy}


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(size: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Median wall time of a forward and backward pass of each variant, in turns, and its ratios."""
    batch, steps, num_nodes, width, r = size
    torch.manual_seed(0)
    models = variants(num_nodes, width, r)
    x = torch.randn(batch, steps, num_nodes, width, requires_grad=True)
    upstream = torch.randn(batch, steps, num_nodes, width)
    times: dict[str, list[float]] = {name: [] for name in models}
    measured: list[dict[str, float]] = []
    with keeping_freed_memory():  # as in a training
        for _ in range(repeats + 1):
            measured.append(rates(turns=3))
            for name, model in models.items():
                x.grad = None
                model.zero_grad()
                times[name].append(seconds(lambda model=model: model(x).backward(upstream)))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first one warms up
    lora = medians["PEFT LoRA"]
    machine = {key: statistics.median(turn[key] for turn in measured[1:]) for key in ("operations", "bytes")}
    work = (batch * steps * num_nodes, num_nodes, width, r)
    needed = {
        form: max(operations(form, *work) / machine["operations"], moved(form, *work) / machine["bytes"])
        for form in CONDITIONINGS
    }
    return {
        "size": dict(zip(("B", "T", "N", "d", "r"), size, strict=True)),
        "rates": {key: round(value / 1e9, 1) for key, value in machine.items()},
        "milliseconds": {name: round(value * 1e3, 1) for name, value in medians.items()},
        "ratio_to_lora": {name: round(value / lora, 2) for name, value in medians.items()},
        "ratio_to_machine": {f"`{form}`": round(medians[f"`{form}`"] / value, 2) for form, value in needed.items()},
    }


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of every form of conditioning, and of the loop, in that of PEFT's LoRA, and in the machine's own."""
    to_machine = [
        {
            "name": f"{name}, N={row['size']['N']}: time in that of its operations at the machine's rate",
            "ratio": ratio,
            "goal": MACHINE_GOAL,
            "better": "lower",
        }
        for row in rows
        for name, ratio in row["ratio_to_machine"].items()
    ]
    return to_machine + [
        {
            "name": f"{name}, N={row['size']['N']}: time in that of PEFT's LoRA",
            "ratio": ratio,
            "goal": None if name.startswith("loop") else GOAL,
            "better": "lower",
        }
        for row in rows
        for name, ratio in row["ratio_to_lora"].items()
        if name != "PEFT LoRA"
    ]


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = list(rows[0]["milliseconds"])
    heads = [", ".join(f"{key}={value}" for key, value in row["size"].items()) for row in rows]
    lines = [
        "# Training step of one adapted linear layer",
        "",
        "Written by `python benchmarks/layer_step/run.py`. Forward and backward, median milliseconds and the ratio to",
        "PEFT's LoRA of the same rank; below 1 is faster. To machine: its time in that of its operations at the rate",
        "of a product of 1024 by 1024, or of its bytes at that of a copy, whichever is longer.",
        "",
        "| layer | " + " | ".join(f"{head} | ratio | to machine" for head in heads) + " |",
        "|---" * (1 + 3 * len(rows)) + "|",
    ]
    for name in names:
        cells = []
        for row in rows:
            to_machine = row["ratio_to_machine"].get(name, "-")
            cells += [f"{row['milliseconds'][name]}", f"**{row['ratio_to_lora'][name]}**", f"{to_machine}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    found = [row["rates"] for row in rows]
    speeds = " and ".join(f"{rate['operations']}e9 operations, {rate['bytes']} GB a second" for rate in found)
    lines += ["", f"Rates: {speeds}.", "", footer(about)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time both sizes and write the results."""
    options = read_options(__doc__, repeats=9)
    about = environment(options, ("torch", "peft"))
    rows = [measure(size, options.repeats) for size in SIZES]
    write_results(FOLDER, rows, about, table(rows, about), ratios=ratios(rows))


if __name__ == "__main__":
    main()
