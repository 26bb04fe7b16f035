"""Write the README's generated parts: the support grids and the results table.

Run:       python benchmarks/write_readme.py          writes README.md
           python benchmarks/write_readme.py --check  exits 1 if README.md is not up to date

Everything between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from stlora_peft import STLoraConfig
from stlora_peft.backbones import BACKBONES, build_backbone
from stlora_peft.files import atomic_write
from stlora_peft.tuner.conditioning import CONDITIONINGS
from stlora_peft.tuner.hosts import host_names

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "la_to_shenzhen" / "results.md"
EDGES = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])


def works(trial: Callable[[], bool]) -> str:
    """Run one trial of a feature: yes if it holds, no if it does not or is refused."""
    try:
        return "yes" if trial() else "no"
    except (ValueError, RuntimeError):
        return "no"


def backbone_grid() -> str:
    """Try every feature on every backbone and lay the answers out as a table."""
    header = [
        "backbone",
        *CONDITIONINGS,
        "predictor",
        "another N",
        "several adapters",
        "save / load",
        "merge (shared)",
    ]
    return table(header, [backbone_row(name) for name in sorted(BACKBONES)])


def backbone_row(name: str) -> list[str]:
    """One backbone's row of the grid."""
    sizes = {"num_nodes": 7} if name == "stgcn" else {}
    backbone = build_backbone(name, in_channels=1, **sizes).eval()

    def adapted(num_nodes: int = 5, **settings: object) -> PeftModel:
        return get_peft_model(copy.deepcopy(backbone), STLoraConfig(num_nodes=num_nodes, **settings)).eval()

    def runs(model: nn.Module, num_nodes: int = 5) -> bool:
        return bool(model(torch.rand(2, 12, num_nodes, 1), EDGES).isfinite().all())

    def has_predictor() -> bool:
        return adapted().peft_config["default"].predictor is not None

    def several() -> bool:
        model = adapted()
        model.add_adapter("other", STLoraConfig(num_nodes=6))
        model.set_adapter("other")
        return runs(model, 6)

    def loads() -> bool:
        model, x = adapted(init_weights=False), torch.rand(2, 12, 5, 1)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), folder).eval()
        return torch.equal(model(x, EDGES), loaded(x, EDGES))

    def merges() -> bool:
        model, x = adapted(conditioning="shared", init_weights=False), torch.rand(2, 12, 5, 1)
        before = model(x, EDGES)
        return torch.allclose(model.merge_and_unload()(x, EDGES), before, atol=1e-4)

    forms = [works(lambda form=form: runs(adapted(conditioning=form))) for form in CONDITIONINGS]
    return [
        f"`{name}`",
        *forms,
        works(has_predictor),
        works(lambda: runs(adapted())),
        works(several),
        works(loads),
        works(merges),
    ]


def layer_grid() -> str:
    """Adaptable layers by class, and whether a shared update merges into them."""
    rows = []
    for name, host in host_names().items():
        rows.append([f"`{name}`", "yes", "yes" if host.mergeable else "no"])
    return table(["layer", "node-conditioned", "merge (shared)"], rows)


def results() -> str:
    """The table of the comparison and its settings, without the page's title and picture."""
    text = RESULTS.read_text()
    rows = [line for line in text.split("## Methods")[0].splitlines() if line.startswith("|")]
    methods = text.split("## Methods")[1].split("## Settings")[0].strip()
    commit = re.search(r"\| commit \| (\w{8})", text)
    where = f"commit {commit[1]}, " if commit else ""
    return "\n".join(
        [*rows, "", methods, "", f"MAE and RMSE in vehicles per step; {where}[settings](docs/results.md)."]
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(text: str, parts: dict[str, str]) -> str:
    """Replace each named part of ``text``."""
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no part '{name}'")
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def main() -> int:
    """Write or check the README."""
    torch.manual_seed(0)
    parts = {"backbones": backbone_grid(), "layers": layer_grid(), "results": results()}
    current = README.read_text()
    wanted = fill(current, parts)
    if "--check" in sys.argv:
        print("README.md is up to date" if current == wanted else "README.md is out of date: run this without --check")
        return int(current != wanted)
    with atomic_write(README) as temporary:
        temporary.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
