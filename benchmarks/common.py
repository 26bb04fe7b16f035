"""What every timing has in common: options, what the numbers depend on, and where they are written."""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stlora_peft.files import atomic_write, write_json


def read_options(description: str | None, repeats: int) -> argparse.Namespace:
    """Read ``--threads`` and ``--repeats`` and set the number of threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=repeats)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def environment(options: argparse.Namespace, packages: Sequence[str]) -> dict[str, Any]:
    """What the numbers depend on."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "commit": git.stdout.strip() if git.returncode == 0 else "none",
        "threads": options.threads,
        "repeats": options.repeats,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "packages": {name: version(name) for name in packages},
    }


def processor() -> str:
    """Name of the processor, as far as the system says it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def footer(about: dict[str, Any], how: str = "repeats in turns") -> str:
    """The environment in one line."""
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
    return (
        f"{about['threads']} thread(s), {about['repeats']} {how}, commit {about['commit']}, "
        f"Python {about['python']} on {about['processor']}, {packages}."
    )


def untouched(backbone: nn.Module) -> nn.Module:
    """Train everything, with the layers of PyG and torch-geometric-temporal as they are."""
    from torch_geometric.nn import ChebConv

    from stlora_peft import decelerate
    from stlora_peft.backbones import tgt
    from stlora_peft.backbones.chebyshev import CachedChebConv
    from stlora_peft.backbones.stconv import STConv

    decelerate(backbone)
    for layer in backbone.modules():
        if type(layer) is STConv:
            layer.__class__ = tgt.load().nn.STConv
        elif type(layer) is CachedChebConv:
            layer.__class__ = ChebConv
    return backbone.requires_grad_(True)


def write_results(
    folder: Path,
    rows: list[dict[str, Any]],
    about: dict[str, Any],
    text: str,
    *,
    ratios: list[dict[str, Any]] | None = None,
) -> None:
    """Write ``results.json`` and ``results.md``, and show the table.

    Args:
        folder: Where to.
        rows: What was measured.
        about: What it depends on.
        text: The table.
        ratios: What ``make bench`` keeps of it, where that is not the rows themselves.
    """
    extra = {} if ratios is None else {"ratios": ratios}
    write_json(folder / "results.json", {"environment": about, "rows": rows} | extra)
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)
