"""Time a training step of STConv: torch-geometric-temporal's loop against the vectorised block of this package.

    python benchmarks/stgcn_forward/run.py [--threads 1] [--repeats 7]

Both blocks hold the same weights and see the same batch (N=207, T=12, B=32, hidden 32, K=3, 1 612 edges), in turns, so
that other work on the machine falls on both. Writes ``results.json`` and ``results.md`` beside this file.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.stconv import STConv

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import environment, footer, read_options, write_results  # noqa: E402 - found by the line above

GOAL = round(1050 / 230, 2)
NODES, STEPS, BATCH, HIDDEN, ORDER, EDGES = 207, 12, 32, 32, 3, 1612
PACKAGES = ("torch", "torch-geometric", "torch-geometric-temporal")


def training_step(block: nn.Module, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> None:
    """Forward and backward through one block, gradients of its input included."""
    x.grad = None
    block.zero_grad()
    block(x, edge_index, edge_weight).square().mean().backward()


def milliseconds(call: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def difference(original: nn.Module, fast: nn.Module, *batch: Tensor) -> dict[str, float]:
    """Largest differences of the output and of all gradients."""
    outputs, gradients = [], []
    for block in (original, fast):
        training_step(block, *batch)
        outputs.append(block(*batch).detach())
        gradients.append([batch[0].grad, *(parameter.grad.clone() for parameter in block.parameters())])
    pairs = zip(*gradients, strict=True)
    return {
        "output": float((outputs[0] - outputs[1]).abs().max()),
        "output_range": float(outputs[0].abs().max()),
        "gradients": max(float((a - b).abs().max()) for a, b in pairs),
    }


def compare(in_channels: int, repeats: int) -> dict[str, Any]:
    """Time both blocks in turns; the medians and their ratio."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    original = tgt.load().nn.STConv(NODES, in_channels, HIDDEN, HIDDEN, 3, ORDER)
    fast = STConv(NODES, in_channels, HIDDEN, HIDDEN, 3, ORDER)
    fast.load_state_dict(original.state_dict())
    batch = (
        torch.randn(BATCH, STEPS, NODES, in_channels, generator=generator).requires_grad_(),
        torch.randint(0, NODES, (2, EDGES), generator=generator),
        torch.rand(EDGES, generator=generator),
    )
    row: dict[str, Any] = {"in_channels": in_channels, "largest_difference": difference(original, fast, *batch)}
    times: dict[str, list[tuple[float, float]]] = {"original": [], "ours": []}
    for _ in range(repeats):
        for name, block in (("original", original), ("ours", fast)):
            times[name].append(milliseconds(lambda block=block: training_step(block, *batch)))
    for k, clock in enumerate(("wall", "processor")):
        medians = {name: statistics.median(entry[k] for entry in entries) for name, entries in times.items()}
        row[f"{clock}_ms"] = {name: round(value, 1) for name, value in medians.items()}
        row[f"{clock}_ratio"] = round(medians["original"] / medians["ours"], 2)
    return row


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Training step of one STConv block",
        "",
        "Written by `python benchmarks/stgcn_forward/run.py`. Forward and backward, medians in milliseconds.",
        "",
        "| input channels | original, wall | ours, wall | ratio | original, processor | ours, processor | ratio "
        "| largest difference of the output |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wall, processor, apart = row["wall_ms"], row["processor_ms"], row["largest_difference"]
        lines.append(
            f"| {row['in_channels']} | {wall['original']:.0f} | {wall['ours']:.0f} | **{row['wall_ratio']}** "
            f"| {processor['original']:.0f} | {processor['ours']:.0f} | **{row['processor_ratio']}** "
            f"| {apart['output']:.1e} of {apart['output_range']:.1f} |"
        )
    sizes = ", ".join(f"{key}={value}" for key, value in about["sizes"].items())
    lines += ["", f"{sizes}; {footer(about)}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the comparison for the input of a first block and of a second one."""
    options = read_options(__doc__, repeats=7)
    rows = [compare(channels, options.repeats) for channels in (3, HIDDEN)]
    sizes = {"N": NODES, "T": STEPS, "B": BATCH, "hidden": HIDDEN, "K": ORDER, "edges": EDGES}
    about = environment(options, PACKAGES) | {"sizes": sizes}
    ratios = [
        {
            "name": f"STConv, {row['in_channels']} input channels: the loop's time in that of our block",
            "ratio": row["processor_ratio"],
            "goal": GOAL,
            "better": "higher",
        }
        for row in rows
    ]
    write_results(FOLDER, rows, about, table(rows, about), ratios=ratios)


if __name__ == "__main__":
    main()
