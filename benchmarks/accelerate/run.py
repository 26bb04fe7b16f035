"""Time a training step of each layer that ``stlora_peft.accelerate`` knows, before it and after.

    python benchmarks/accelerate/run.py [--threads 1] [--repeats 3]

Both hold the same weights and see the same batch (N=207, T=12, B=32, width 32, 2 input channels, 1 612 edges), in
turns, so that other work on the machine falls on both. Writes ``results.json`` and ``results.md`` beside this file.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stlora_peft import accelerate
from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import union

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import environment, footer, read_options, write_results  # noqa: E402 - found by the line above

NODES, STEPS, BATCH, CHANNELS, WIDTH, EDGES = 207, 12, 32, 2, 32, 1612
PACKAGES = ("torch", "torch-geometric", "torch-geometric-temporal")

recurrent, attention = tgt.load().nn.recurrent, tgt.load().nn.attention
generator = torch.Generator().manual_seed(0)
EDGE_INDEX = torch.randint(0, NODES, (2, EDGES), generator=generator)
EDGE_WEIGHT = torch.rand(EDGES, generator=generator)
UNION = union(EDGE_INDEX, EDGE_WEIGHT, BATCH * STEPS, NODES)

Run = Callable[[Any, Tensor], Tensor]


def cell(num_states: int) -> Run:
    """Run a cell step by step over ``x`` of ``[b t n c]``."""

    def run(layer: Any, x: Tensor) -> Tensor:
        state: tuple[Tensor, ...] = (x.new_zeros(BATCH, NODES, WIDTH),) * num_states
        for step in x.unbind(1):
            after = layer(step, EDGE_INDEX, EDGE_WEIGHT, *state)
            state = after if isinstance(after, tuple) else (after,)
        return state[0]

    return run


def sequence(layer: Any, x: Tensor) -> Tensor:
    """Run a layer that takes ``[b t n c]``."""
    return layer(x, EDGE_INDEX, EDGE_WEIGHT)


def periods(layer: Any, x: Tensor) -> Tensor:
    """Run a layer that takes ``[b n c t]``."""
    return layer(x.permute(0, 2, 3, 1), EDGE_INDEX, EDGE_WEIGHT)


def graph_each_step(layer: Any, x: Tensor) -> Tensor:
    """Run a layer that takes ``[b n c t]`` and a graph for each step."""
    return layer(x.permute(0, 2, 3, 1), [EDGE_INDEX] * STEPS)


def rows(layer: Any, x: Tensor) -> Tensor:
    """Run a layer that takes rows ``[(b t n) c]`` of a union of graphs."""
    return layer(x.flatten(0, 2), *UNION)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Run, float]] = {
    "STConv": (lambda: attention.stgcn.STConv(NODES, CHANNELS, WIDTH, WIDTH, 3, 3), sequence, 1050 / 230),
    "BatchedDCRNN K=3": (lambda: recurrent.BatchedDCRNN(CHANNELS, WIDTH, 3), sequence, 1020 / 336),
    "BatchedDCRNN K=2": (lambda: recurrent.BatchedDCRNN(CHANNELS, WIDTH, 2), sequence, 602 / 200),
    "GConvGRU": (lambda: recurrent.GConvGRU(CHANNELS, WIDTH, 3), cell(1), 829 / 310),
    "GConvLSTM": (lambda: recurrent.GConvLSTM(CHANNELS, WIDTH, 3), cell(2), 1101 / 433),
    "GCLSTM": (lambda: recurrent.GCLSTM(CHANNELS, WIDTH, 3), cell(2), 744 / 325),
    "MPNNLSTM": (lambda: recurrent.MPNNLSTM(CHANNELS, WIDTH, NODES, STEPS, 0.0), rows, 1074 / 596),
    "TGCN2": (lambda: recurrent.TGCN2(CHANNELS, WIDTH, BATCH), cell(1), 439 / 160),
    "A3TGCN2": (lambda: recurrent.A3TGCN2(CHANNELS, WIDTH, STEPS, BATCH), periods, 461 / 59),
    "MSTGCN": (
        lambda: attention.mstgcn.MSTGCN(2, CHANNELS, 3, WIDTH, WIDTH, 1, 12, STEPS),
        graph_each_step,
        716 / 256,
    ),
    "ASTGCN": (
        lambda: attention.astgcn.ASTGCN(2, CHANNELS, 3, WIDTH, WIDTH, 1, 12, STEPS, NODES),
        graph_each_step,
        1075 / 563,
    ),
}
"""A layer, how it is run, and how many times as fast it is meant to become."""


def training_step(layer: nn.Module, run: Run, x: Tensor) -> Tensor:
    """Forward and backward through one layer, gradients of its input included."""
    x.grad = None
    layer.zero_grad()
    y = run(layer, x)
    y.square().mean().backward()
    return y.detach()


def compare(name: str, repeats: int) -> dict[str, Any]:
    """Time a layer before and after in turns: the least processor time of each, and their ratio."""
    make, run, goal = LAYERS[name]
    torch.manual_seed(0)
    plain = make()
    fast = copy.deepcopy(plain)
    replaced = accelerate(fast)
    x = torch.randn(BATCH, STEPS, NODES, CHANNELS, generator=generator).requires_grad_()
    first = [training_step(layer, run, x) for layer in (plain, fast)]
    times: dict[str, list[float]] = {"plain": [], "accelerated": []}
    for _ in range(repeats):
        for kind, layer in (("plain", plain), ("accelerated", fast)):
            start = time.process_time()
            training_step(layer, run, x)
            times[kind].append((time.process_time() - start) * 1e3)
    least = {f"{kind}_ms": min(found) for kind, found in times.items()}
    return {
        "name": name,
        "ratio": round(least["plain_ms"] / least["accelerated_ms"], 2),
        "goal": round(goal, 2),
        "better": "higher",
        **{key: round(value, 1) for key, value in least.items()},
        "largest_difference": float((first[0] - first[1]).abs().max() / first[0].abs().max()),
        "replaced": str(replaced).splitlines(),
    }


def table(found: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Training step of a layer, before and after `accelerate`",
        "",
        "Written by `python benchmarks/accelerate/run.py`. Forward and backward, least processor time in ms.",
        "The goals are what was measured by hand before this function was written.",
        "",
        "| layer | plain | accelerated | ratio | goal | largest relative difference of the output |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['name']} | {row['plain_ms']:.0f} | {row['accelerated_ms']:.0f} | **{row['ratio']}** "
            f"| {row['goal']} | {row['largest_difference']:.0e} |"
        )
    sizes = ", ".join(f"{key}={value}" for key, value in about["sizes"].items())
    lines += ["", f"{sizes}; {footer(about)}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the comparison for every layer."""
    options = read_options(__doc__, repeats=3)
    found = [compare(name, options.repeats) for name in LAYERS]
    sizes = {"N": NODES, "T": STEPS, "B": BATCH, "input channels": CHANNELS, "width": WIDTH, "edges": EDGES}
    about = environment(options, PACKAGES) | {"sizes": sizes}
    write_results(FOLDER, found, about, table(found, about))


if __name__ == "__main__":
    main()
