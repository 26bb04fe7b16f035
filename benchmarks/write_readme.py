"""Write the README's generated parts: the support grids and the results table.

Run:       python benchmarks/write_readme.py            writes README.md
           python benchmarks/write_readme.py --check    exits 1 if README.md is not up to date
           python benchmarks/write_readme.py --quick    leaves out what the compilers can do, which takes minutes

Everything between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from stlora_peft import STLoraConfig
from stlora_peft.backbones import BACKBONES, backbone_class, build_backbone
from stlora_peft.files import atomic_write
from stlora_peft.tuner.conditioning import CONDITIONINGS
from stlora_peft.tuner.graph_layers import STLoraGraphConv
from stlora_peft.tuner.host_layers import STLoraConv, STLoraLinear
from stlora_peft.tuner.hosts import host_names
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.recurrent_layers import STLoraCell, STLoraRecurrent

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "la_to_shenzhen" / "results.md"
EDGES = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])


KINDS: dict[type[STLoraLayer], str] = {
    STLoraLinear: "linear",
    STLoraConv: "convolution",
    STLoraGraphConv: "graph convolution",
    STLoraRecurrent: "recurrent",
    STLoraCell: "recurrent",
}


def works(trial: Callable[[], bool]) -> str:
    """Run one trial of a feature: yes if it holds, no if it does not, or the feature or its compiler refuses."""
    try:
        return "yes" if trial() else "no"
    except Exception as error:  # torch.compile and torch.export raise errors of many kinds
        if isinstance(error, (NameError, ImportError, AttributeError)):
            raise
        return "no"


def backbone_grid() -> str:
    """Try every feature on every backbone and lay the answers out as a table."""
    header = [
        "backbone",
        "adapted by default",
        "node-bound",
        "five forms",
        "predictor",
        "another N",
        "several adapters",
        "save / load",
        "merge (shared)",
    ]
    return table(header, [Trials(name).row() for name in sorted(BACKBONES)])


def compilers() -> str:
    """Try the compilers on every backbone with an adapter and say which cannot."""
    trials = [Trials(name) for name in sorted(BACKBONES)]
    cannot = {
        "torch.compile": [trial.backbone.name for trial in trials if works(trial.compiles) == "no"],
        "torch.export": [trial.backbone.name for trial in trials if works(trial.exports) == "no"],
    }
    said = [
        f"`{compiler}` takes every one of them" + (f" but {', '.join(f'`{name}`' for name in names)}" if names else "")
        for compiler, names in cannot.items()
    ]
    return f"With an adapter on it, {', and '.join(said)}."


class Trials:
    """Everything that is tried on one backbone, built for 7 nodes and brought to 5."""

    def __init__(self, name: str) -> None:
        accepted = inspect.signature(backbone_class(name)).parameters
        sizes = {"num_nodes": 7, "hidden_channels": 16, "hidden_size": 16, "head_channels": 16}
        torch.manual_seed(0)
        known = {key: value for key, value in sizes.items() if key in accepted}
        self.backbone = build_backbone(name, in_channels=3, **known).eval()

    def adapted(self, num_nodes: int = 5, **settings: object) -> PeftModel:
        """A city's model."""
        return get_peft_model(copy.deepcopy(self.backbone), STLoraConfig(num_nodes=num_nodes, **settings)).eval()

    def kinds(self) -> str:
        """Kinds of layers that are adapted unless the user names others."""
        layers = [module for module in self.adapted().modules() if isinstance(module, STLoraLayer)]
        return ", ".join(word for word in dict.fromkeys(KINDS.values()) if word in map(kind_of, layers))

    def runs(self, model: nn.Module, num_nodes: int = 5) -> bool:
        """Whether a model gives finite forecasts."""
        return bool(model(torch.rand(2, 12, num_nodes, 3), EDGES).isfinite().all())

    def several(self) -> bool:
        """Whether a second city's adapter can be added and used."""
        model = self.adapted()
        model.add_adapter("other", STLoraConfig(num_nodes=6))
        model.set_adapter("other")
        return self.runs(model, 6)

    def loads(self) -> bool:
        """Whether a saved adapter gives the same numbers on the pristine backbone."""
        model, x = self.adapted(init_weights=False), torch.rand(2, 12, 5, 3)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(copy.deepcopy(self.backbone), folder).eval()
        return torch.equal(model(x, EDGES), loaded(x, EDGES))

    def merges(self) -> bool:
        """Whether a shared adapter folds into the weights."""
        model, x = self.adapted(conditioning="shared", init_weights=False), torch.rand(2, 12, 5, 3)
        before = model(x, EDGES)
        return torch.allclose(model.merge_and_unload()(x, EDGES), before, atol=1e-4)

    def compiles(self) -> bool:
        """Whether the adapted backbone gives the same numbers compiled."""
        model, x = self.adapted(init_weights=False).get_base_model(), torch.rand(2, 12, 5, 3)
        with torch.no_grad():
            return torch.allclose(torch.compile(model, backend="aot_eager")(x, EDGES), model(x, EDGES), atol=1e-4)

    def exports(self) -> bool:
        """Whether the adapted backbone gives the same numbers exported."""
        model, x = self.adapted(init_weights=False).get_base_model(), torch.rand(2, 12, 5, 3)
        with torch.no_grad():
            program = torch.export.export(model, (x, EDGES), strict=False)
            return torch.allclose(program.module()(x, EDGES), model(x, EDGES), atol=1e-4)

    def row(self) -> list[str]:
        """The backbone's row of the grid."""
        return [
            f"`{self.backbone.name}`",
            self.kinds(),
            "yes" if self.backbone.stlora_spec.node_bound else "-",
            works(lambda: all(self.runs(self.adapted(conditioning=form)) for form in CONDITIONINGS)),
            works(lambda: self.adapted().peft_config["default"].predictor is not None),
            works(lambda: self.runs(self.adapted())),
            works(self.several),
            works(self.loads),
            works(self.merges),
        ]


def kind_of(layer: STLoraLayer) -> str:
    """The kind of an adapted layer, in a word."""
    return next(word for cls, word in KINDS.items() if isinstance(layer, cls))


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
    if "--quick" not in sys.argv:
        parts["compilers"] = compilers()
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
