"""What a user gets from pip, and the promises of the packaging files; each scan has a test that it can fail."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import stlora_peft
from stlora_peft.backbones.tgt import INSTALL

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PYPROJECT = tomllib.loads(read("pyproject.toml"))
PROJECT = PYPROJECT["project"]
FLOOR = PROJECT["requires-python"].removeprefix(">=")
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", read("constraints.txt"), re.MULTILINE))

HEAVY = (
    "torch_geometric_temporal",
    "pandas",
    "h5py",
    "matplotlib",
    "sklearn",
    "statsmodels",
    "typer",
    "transformers.trainer",
)
OPTIONAL_EXTRAS = ("tgt", "readers", "figures", "baselines")
OPTIONAL = (
    "torch_geometric",
    "torch_geometric_temporal",
    "torch_sparse",
    "pandas",
    "h5py",
    "matplotlib",
    "sklearn",
    "statsmodels",
)
DATA_SUFFIXES = set(".bin .csv .gz .h5 .hdf5 .npy .npz .parquet .pkl .pt .pth .safetensors .zip".split())
PICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def loaded_after(statement: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that a fresh interpreter has loaded after ``statement``."""
    code = f"import json, sys\n{statement}\nprint(json.dumps([n for n in {tuple(names)!r} if n in sys.modules]))"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        hidden = fullname.partition(".")[0] in {hidden!r}
        return None if hidden else super().find_spec(fullname, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_without(packages: Iterable[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where ``packages`` are not installed, as far as an import can tell."""
    return run_python(HIDE.format(hidden=tuple(packages)) + code)


def sources() -> list[Path]:
    return sorted((ROOT / "stlora_peft").rglob("*.py"))


def imported_packages(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    absolute = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0 and n.module]
    plain = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    return {name.partition(".")[0] for name in absolute + plain}


def unpickling_calls(source: str) -> list[str]:
    """Every way of reading a pickle that ``source`` uses."""
    found = [f"import {name}" for name in sorted(imported_packages(source) & PICKLERS)]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        call = ast.unparse(node.func)
        allowed = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
        if call == "torch.load" or node.func.attr == "read_pickle" or allowed:
            found.append(call)
    return found


def repository_files() -> list[Path]:
    """Files that are, or would be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git repository")
    return [ROOT / line for line in result.stdout.splitlines() if (ROOT / line).is_file()]


def misplaced_data(files: Iterable[Path], root: Path) -> list[str]:
    """Files that are too large, or data outside ``tests/data``."""
    small = [f for f in files if f.stat().st_size <= 500_000]
    stored = root / "tests" / "data"
    right = {
        f for f in small if f.suffix not in DATA_SUFFIXES or (stored in f.parents and f.stat().st_size <= 100_000)
    }
    return sorted(str(f.relative_to(root)) for f in files if f not in right)


def python_versions(text: str, version: str) -> int:
    """How often ``text`` names this Python version; ``matplotlib==3.11.2`` is not one."""
    return len(re.findall(rf"(?<![\d.])(?<!==){re.escape(version)}(?!\d|\.\d)", text))


def test_import_package_loads_no_heavy_module() -> None:
    assert loaded_after("import stlora_peft", HEAVY) == []


def test_loaded_after_heavy_import_names_it() -> None:
    assert loaded_after("import typer", HEAVY) == ["typer"]


def test_core_install_adapts_a_model_of_the_user() -> None:
    result = run_without(
        OPTIONAL,
        "import torch\n"
        "from peft import get_peft_model\n"
        "from stlora_peft import STLoraConfig\n"
        "options = {'num_nodes': 5, 'target_modules': ['0'], 'node_layout': {'0': 'b t n c'}, 'predictor': None}\n"
        "config = STLoraConfig(conditioning='gate', **options)\n"
        "model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), config)\n"
        "print(tuple(model(torch.zeros(2, 4, 5, 3)).shape))\n",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "(2, 4, 5, 2)"


def test_core_install_shows_the_help_of_the_command() -> None:
    code = "sys.argv = ['stlora', '--help']\nfrom stlora_peft.cli import main\nsys.exit(main())"
    result = run_without(OPTIONAL, code)
    assert result.returncode == 0, result.stderr
    assert "forecast" in result.stdout


def test_core_install_stgcn_names_the_package_to_install() -> None:
    code = "from stlora_peft.backbones import build_backbone\nbuild_backbone('stgcn', num_nodes=5, in_channels=1)"
    result = run_without(OPTIONAL, code)
    assert result.returncode == 1
    assert "to fix:   pip install torch-geometric" in result.stderr


def test_run_without_hides_a_package_and_its_parts() -> None:
    result = run_without(
        ["json"], "import importlib.util\nprint(importlib.util.find_spec('json'))\nimport json.decoder"
    )
    assert result.returncode == 1
    assert result.stdout == "None\n"
    assert "No module named 'json'" in result.stderr


@pytest.mark.parametrize("name", [m.name for m in pkgutil.walk_packages(stlora_peft.__path__, "stlora_peft.")])
def test_every_module_imports(name: str) -> None:
    for package in ("torch_geometric", "torch_geometric_temporal", "h5py", "matplotlib"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    assert import_module(name).__doc__


def test_version_is_that_of_the_project_file() -> None:
    try:
        metadata.version("stlora-peft")
    except metadata.PackageNotFoundError:
        pytest.skip("stlora-peft is on the path but not installed")
    assert stlora_peft.__version__ == PROJECT["version"]


def test_wheel_holds_the_package_its_types_and_its_license_only(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    wheel = next(builder.build(directory=str(tmp_path), versions=["standard"]))
    names = zipfile.ZipFile(wheel).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    assert code == {str(f.relative_to(ROOT)) for f in sources()} | {"stlora_peft/py.typed"}
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_python_floor_is_written_once() -> None:
    files = [
        "pyproject.toml",
        "Makefile",
        ".ci/run",
        ".github/workflows/ci.yml",
        ".pre-commit-config.yaml",
        "CONTRIBUTING.md",
    ]
    counts = {name: python_versions(read(name), FLOOR) for name in files}
    assert {name: count for name, count in counts.items() if count} == {"pyproject.toml": 1}


def test_python_versions_counts_versions_and_no_pins() -> None:
    assert python_versions('python = ">=3.11"\nPython 3.11 and Python 3.11.', "3.11") == 3
    assert python_versions("matplotlib==3.11.2, numpy 13.11, 3.110", "3.11") == 0


def test_readme_names_no_other_python_than_the_floor() -> None:
    named = re.findall(r"Python (\d+\.\d+)", read("README.md"))
    assert set(named) <= {FLOOR}


def test_changelog_begins_with_unreleased() -> None:
    headings = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"


def test_constraints_torch_is_the_installed_one() -> None:
    assert torch.__version__.partition("+")[0] == PINS["torch"]


def test_install_line_of_torch_geometric_temporal_is_the_tested_one() -> None:
    assert INSTALL["torch_geometric_temporal"].endswith(f"=={PINS['torch_geometric_temporal']}")


def test_constraints_pin_every_declared_dependency() -> None:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    declared = {re.split(r"[\[<>=]", line)[0] for line in PROJECT["dependencies"] + extras} - {"stlora-peft"}
    assert declared - set(PINS) == set()


def test_ruff_version_is_one_in_all_three_files() -> None:
    hook = re.search(r"ruff-pre-commit\s+rev: v(\S+)", read(".pre-commit-config.yaml"))
    assert hook is not None
    assert {hook[1], PINS["ruff"]} == {PYPROJECT["tool"]["ruff"]["required-version"].removeprefix("==")}


def test_package_imports_only_what_it_declares() -> None:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in OPTIONAL_EXTRAS for line in extras[name])]
    declared = {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in lines}
    declared = {{"scikit_learn": "sklearn"}.get(name, name) for name in declared}
    apart = {"stlora_peft", "torch_geometric_temporal"}  # the latter is installed by a line of its own
    used = set().union(*(imported_packages(f.read_text(encoding="utf-8")) for f in sources()))
    assert used - set(sys.stdlib_module_names) - declared - apart == set()


def test_imported_packages_sees_nested_and_absolute_imports_only() -> None:
    source = "import a.b as c\ndef f():\n    from d.e import g\nfrom . import h\n"
    assert imported_packages(source) == {"a", "d"}


def test_package_reads_no_pickle() -> None:
    found = {str(f.relative_to(ROOT)): unpickling_calls(f.read_text(encoding="utf-8")) for f in sources()}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", ["import pickle"]),
        ("from joblib import load", ["import joblib"]),
        ("torch.load(path, weights_only=True)", ["torch.load"]),
        ("frames.read_pickle(path)", ["frames.read_pickle"]),
        ("np.load(path, allow_pickle=True)", ["np.load"]),
        ("np.load(path, allow_pickle=False)\njson.load(file)", []),
    ],
)
def test_unpickling_calls_names_each_way(source: str, expected: list[str]) -> None:
    assert unpickling_calls(source) == expected


def test_repository_holds_no_data_but_small_test_files() -> None:
    assert misplaced_data(repository_files(), ROOT) == []


def test_misplaced_data_finds_data_and_large_files(tmp_path: Path) -> None:
    sizes = {
        "city.npz": 10,
        "tests/data/adapter.safetensors": 10,
        "tests/data/big.npz": 100_001,
        "a.py": 500_001,
        "b.py": 9,
    }
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert misplaced_data([tmp_path / name for name in sizes], tmp_path) == ["a.py", "city.npz", "tests/data/big.npz"]


def test_workflow_actions_are_pinned_by_commit() -> None:
    uses = re.findall(r"uses: (\S+)", read(".github/workflows/ci.yml"))
    assert uses
    assert [line for line in uses if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", line)] == []
