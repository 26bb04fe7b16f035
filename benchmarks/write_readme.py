"""Write the README's generated parts: the support grids and the results table.

Run:       python benchmarks/write_readme.py            writes README.md
           python benchmarks/write_readme.py --check    exits 1 if README.md is not up to date
           python benchmarks/write_readme.py --quick    does not ask the compilers again, which takes minutes

Everything between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced.
"""

from __future__ import annotations

import copy
import inspect
import io
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
from stlora_peft.tuner.bare_layers import STLoraGates
from stlora_peft.tuner.conditioning import CONDITIONINGS
from stlora_peft.tuner.graph_layers import STLoraGraphConv
from stlora_peft.tuner.host_layers import STLoraConv, STLoraLinear
from stlora_peft.tuner.hosts import host_names
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.recurrent_layers import STLoraCell, STLoraRecurrent

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "la_to_shenzhen" / "results.md"
HASH = r"(?<=\b[0-9a-f]{8})[0-9a-f]{32}\b"  # what is left out of a commit
EDGES = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])


KINDS: dict[type[STLoraLayer], str] = {
    STLoraLinear: "linear",
    STLoraGates: "linear",  # before what it is derived from
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


COMPILERS = ("torch.compile", "torch.export")


def backbone_grid(known: dict[str, list[str]] | None) -> str:
    """Try every feature on every backbone and lay the answers out as a table.

    The compilers take minutes: where their answers are ``known``, by backbone, they are not asked again.
    """
    kinds = list(dict.fromkeys(KINDS.values()))
    header = ["backbone", *kinds, "node-bound", "another N", "merge (shared)", *COMPILERS]
    trials = [Trials(name) for name in sorted(BACKBONES)]
    rows = []
    for trial in trials:
        answers = trial.compilers() if known is None else known.get(trial.backbone.name, ["unknown"] * 2)
        rows.append([*trial.row(kinds), *answers])
    everywhere = {
        "the six forms of conditioning": Trials.forms,
        "the node-specific predictor": Trials.predicts,
        "several adapters": Trials.several,
        "saving and loading": Trials.loads,
    }
    return "\n".join([table(header, rows), "", *(said(what, trial, trials) for what, trial in everywhere.items())])


def said(what: str, trial: Callable[[Trials], bool], trials: list[Trials]) -> str:
    """Say that every backbone has a feature, or which have not."""
    without = [f"`{one.backbone.name}`" for one in trials if works(lambda one=one: trial(one)) == "no"]
    return f"- {what}: all" + (f" but {', '.join(without)}" if without else "")


def known_answers(readme: str) -> dict[str, list[str]]:
    """What the README says of the compilers, by backbone."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", readme.partition("<!-- /backbones -->")[0], re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")][-2:] for name, cells in rows}


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

    def kinds(self) -> set[str]:
        """Kinds of layers that are adapted unless the user names others."""
        return {kind_of(module) for module in self.adapted().modules() if isinstance(module, STLoraLayer)}

    def runs(self, model: nn.Module, num_nodes: int = 5) -> bool:
        """Whether a model gives finite forecasts."""
        return bool(model(torch.rand(2, 12, num_nodes, 3), EDGES).isfinite().all())

    def forms(self) -> bool:
        """Whether it runs in every form of conditioning."""
        return all(self.runs(self.adapted(conditioning=form)) for form in CONDITIONINGS)

    def predicts(self) -> bool:
        """Whether it has a predictor behind it by default."""
        return self.adapted().peft_config["default"].predictor is not None

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
        return close(model.merge_and_unload()(x, EDGES), before)

    def compiles(self) -> bool:
        """Whether the adapted backbone gives the same numbers compiled."""
        model, x = self.adapted(init_weights=False).get_base_model(), torch.rand(2, 12, 5, 3)
        torch.compiler.reset()  # or the compiler gives up on a method that it has met in other classes
        with torch.no_grad():
            return close(torch.compile(model, backend="aot_eager")(x, EDGES), model(x, EDGES))

    def exports(self, *, free: bool) -> bool:
        """Whether the adapted backbone gives the same numbers exported, saved and loaded; for another batch too."""
        model, x = self.adapted(init_weights=False), torch.rand(3, 12, 5, 3)
        shapes = {"args": ({0: torch.export.Dim("batch", min=2)}, None)} if free else None
        file = io.BytesIO()
        with torch.no_grad():
            torch.export.save(torch.export.export(model, (x, EDGES), dynamic_shapes=shapes, strict=False), file)
            file.seek(0)
            program, x = torch.export.load(file).module(), torch.rand(4 if free else 3, 12, 5, 3)
            return close(program(x, EDGES), model(x, EDGES))

    def exported(self) -> str:
        """For which batches it is exported."""
        if works(lambda: self.exports(free=True)) == "yes":
            return "yes"
        return "one batch size" if works(lambda: self.exports(free=False)) == "yes" else "no"

    def compilers(self) -> list[str]:
        """What each compiler makes of it."""
        return [works(self.compiles), self.exported()]

    def row(self, kinds: list[str]) -> list[str]:
        """The backbone's row of the grid; "-" is a layer that it does not have."""
        found = self.kinds()
        return [
            f"`{self.backbone.name}`",
            *("yes" if kind in found else "-" for kind in kinds),
            "yes" if self.backbone.stlora_spec.node_bound else "-",
            works(lambda: self.runs(self.adapted())),
            works(self.merges),
        ]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two forecasts agree up to rounding."""
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1))


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
    commit = re.search(r"\| commit \| (.*) \|", text)
    where = f"commit {re.sub(HASH, '', commit[1])}, " if commit else ""
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
    current = README.read_text()
    grid = backbone_grid(known_answers(current) if "--quick" in sys.argv else None)
    parts = {"backbones": grid, "layers": layer_grid(), "results": results()}
    wanted = fill(current, parts)
    if "--check" in sys.argv:
        print("README.md is up to date" if current == wanted else "README.md is out of date: run this without --check")
        return int(current != wanted)
    with atomic_write(README) as temporary:
        temporary.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
