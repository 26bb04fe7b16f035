"""Time a training step of a node-conditioned linear layer against PEFT's LoRA and against a loop over the nodes.

    python benchmarks/layer_step/run.py [--threads 1] [--repeats 9]

All variants wrap the same ``nn.Linear(d, d)`` and see the same batch, in turns, so that other work on the machine
falls on all of them. The loop over the nodes applies the same update (``conditioning="full"``) one node at a time.
Writes ``results.json`` and ``results.md`` beside this file.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from stlora_peft import STLoraConfig
from stlora_peft.tuner.conditioning import CONDITIONINGS

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import environment, footer, read_options, write_results  # noqa: E402 - found by the line above

GOAL = 1.1
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


def measure(size: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Median wall time of a forward and backward pass of each variant, in turns, and its ratio to LoRA's."""
    batch, steps, num_nodes, width, r = size
    torch.manual_seed(0)
    models = variants(num_nodes, width, r)
    x = torch.randn(batch, steps, num_nodes, width, requires_grad=True)
    upstream = torch.randn(batch, steps, num_nodes, width)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            x.grad = None
            model.zero_grad()
            start = time.perf_counter()
            model(x).backward(upstream)
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first one warms up
    lora = medians["PEFT LoRA"]
    return {
        "size": dict(zip(("B", "T", "N", "d", "r"), size, strict=True)),
        "milliseconds": {name: round(value, 1) for name, value in medians.items()},
        "ratio_to_lora": {name: round(value / lora, 2) for name, value in medians.items()},
    }


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of every form of conditioning, and of the loop, in that of PEFT's LoRA."""
    return [
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
        "PEFT's LoRA of the same rank; below 1 is faster.",
        "",
        "| layer | " + " | ".join(f"{head} | ratio" for head in heads) + " |",
        "|---" * (1 + 2 * len(rows)) + "|",
    ]
    for name in names:
        cells = [f"{row['milliseconds'][name]} | **{row['ratio_to_lora'][name]}**" for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", footer(about)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time both sizes and write the results."""
    options = read_options(__doc__, repeats=9)
    about = environment(options, ("torch", "peft"))
    rows = [measure(size, options.repeats) for size in SIZES]
    write_results(FOLDER, rows, about, table(rows, about), ratios=ratios(rows))


if __name__ == "__main__":
    main()
