"""Importing torch-geometric-temporal with, without and beside torch_sparse, each in a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCENARIO = """
import json, sys
from importlib.abc import MetaPathFinder
import stlora_peft.backbones as backbones

def loaded(*names):
    return sorted(name for name in sys.modules if name.split(".")[0] in names)

def attempt():
    try:
        return backbones.STGCN.name
    except ImportError as error:
        return str(error)

NODE_BOUND = ("gwnet", "staeformer", "d2stgnn")

class Blocker(MetaPathFinder):
    name, error = "", None
    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            raise self.error or ModuleNotFoundError(f"No module named '{fullname}'", name=fullname)

blocker = Blocker()
sys.meta_path.insert(0, blocker)
report = {"after import": loaded("torch_geometric", "torch_geometric_temporal", "torch_sparse")}
for blocker.name, blocker.error in (
    ("torch_geometric", None),
    ("torch_geometric_temporal", None),
    ("torch_geometric_temporal.signal", OSError("undefined symbol")),
    ("tqdm", None),
):
    sys.modules.pop("tqdm", None)
    report[blocker.name] = {
        "text": attempt(),
        "leftovers": loaded("torch_geometric_temporal", "torch_sparse"),
        "own": [
            backbones.build_backbone("lstm", in_channels=3).name,
            *(backbones.build_backbone(name, in_channels=3, num_nodes=2).name for name in NODE_BOUND),
        ],
    }
blocker.name = ""
report["unblocked"] = attempt()

from torch_geometric.typing import SparseTensor
from torch_geometric_temporal.nn.recurrent import TGCN2, evolvegcno
report["stand-in"] = {
    "again": backbones.tgt.load() is sys.modules["torch_geometric_temporal"],
    "placeholder": evolvegcno.SparseTensor is SparseTensor,
    "left": loaded("torch_sparse"),
}
print(json.dumps(report))
"""

REAL = """
import json, sys
from stlora_peft.backbones import tgt
tgt.load()
import torch_sparse
from torch_geometric_temporal.nn.recurrent import evolvegcno
print(json.dumps({"real": evolvegcno.SparseTensor is torch_sparse.SparseTensor, "file": torch_sparse.__file__}))
"""


def run(code: str, *paths: Path) -> Any:
    """Last line that ``code`` prints in a fresh interpreter, as JSON."""
    search = os.pathsep.join([*map(str, paths), *sys.path])
    environment = {**os.environ, "PYTHONPATH": search}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def scenario() -> Any:
    """Import, four failures in a row and a success in one interpreter, which takes seconds to start."""
    return run(SCENARIO)


def text(got: str, fix: str) -> str:
    return (
        "torch-geometric-temporal cannot be imported.\n"
        "  expected: torch-geometric and torch-geometric-temporal 0.56.2, "
        "which this backbone is made of\n"
        f"  got:      {got}\n"
        f"  to fix:   {fix}"
    )


def test_import_of_the_package_leaves_graph_libraries_alone(scenario: Any) -> None:
    assert scenario["after import"] == []


def test_load_without_torch_sparse_lends_the_placeholder_of_pyg_and_takes_it_back(scenario: Any) -> None:
    assert scenario["stand-in"] == {"again": True, "placeholder": True, "left": []}


def test_load_with_torch_sparse_installed_uses_it(tmp_path: Path) -> None:
    package = tmp_path / "torch_sparse"
    package.mkdir()
    (package / "__init__.py").write_text("class SparseStorage: ...\nclass SparseTensor: ...\n")
    assert run(REAL, tmp_path) == {"real": True, "file": str(package / "__init__.py")}


@pytest.mark.parametrize(
    ("package", "install"),
    [
        ("torch_geometric", "pip install torch-geometric"),
        ("torch_geometric_temporal", "pip install --no-deps torch-geometric-temporal==0.56.2"),
    ],
)
def test_build_stgcn_without_a_package_gives_its_install_line(scenario: Any, package: str, install: str) -> None:
    fix = f"{install} (the tuner itself works without it, on any backbone of your own)"
    assert scenario[package]["text"] == text(f"no module named '{package}'", fix)


def test_build_stgcn_without_a_dependency_names_the_dependency(scenario: Any) -> None:
    assert scenario["tqdm"]["text"] == text("no module named 'tqdm'", "pip install tqdm")


def test_build_stgcn_with_a_broken_binary_shows_its_error(scenario: Any) -> None:
    expected = text(
        "OSError: undefined symbol", "install releases of torch, torch-geometric and torch-sparse that fit together"
    )
    assert scenario["torch_geometric_temporal.signal"]["text"] == expected


def test_load_that_fails_leaves_nothing_behind_and_our_own_backbones_working(scenario: Any) -> None:
    for case in ("torch_geometric", "torch_geometric_temporal", "torch_geometric_temporal.signal", "tqdm"):
        assert scenario[case]["leftovers"] == [], case
        assert scenario[case]["own"] == ["lstm", "gwnet", "staeformer", "d2stgnn"]


def test_load_after_a_failure_succeeds_once_the_cause_is_gone(scenario: Any) -> None:
    assert scenario["unblocked"] == "stgcn"
