"""What importing the package does, and does not, in an interpreter that has done nothing else."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from stlora_peft import STLoraConfig
from stlora_peft.tuner.registration import stlora_type

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch_geometric_temporal", "torch_geometric", "pandas", "matplotlib", "typer", "transformers.trainer")


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that can import this source tree."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def assert_runs(code: str) -> None:
    result = fresh(code)
    assert result.returncode == 0, result.stderr


def test_import_registers_the_type_and_nothing_heavy():
    assert_runs(
        "import sys, stlora_peft\n"
        "from peft import PeftConfig\n"
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners\n"
        "assert tuners['STLORA'] is stlora_peft.STLoraModel\n"
        "assert all(hasattr(stlora_peft, name) for name in stlora_peft.__all__)\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )


def test_without_the_import_peft_does_not_know_the_type():
    """The test above can fail: PEFT alone has no such entry."""
    result = fresh("from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners\ntuners['STLORA']")
    assert result.returncode == 1
    assert "KeyError: 'STLORA'" in result.stderr
    with pytest.raises(AssertionError, match="KeyError"):
        assert_runs("{}['STLORA']  # KeyError")


def test_member_and_config_are_unpickled_before_the_package_was_imported(tmp_path):
    (tmp_path / "objects").write_bytes(pickle.dumps([stlora_type(), STLoraConfig(num_nodes=3).to_dict()]))
    assert_runs(
        "import pickle\n"
        f"member, content = pickle.load(open({str(tmp_path / 'objects')!r}, 'rb'))\n"
        "from peft.utils.peft_types import PeftType\n"
        "assert member is PeftType.STLORA and content['peft_type'] is member\n"
    )


def test_tuner_works_where_torch_geometric_cannot_be_imported():
    assert_runs(
        "import sys\n"
        "sys.modules['torch_geometric'] = sys.modules['torch_geometric_temporal'] = None\n"
        "import torch, stlora_peft\n"
        "from peft import get_peft_model\n"
        "from stlora_peft.backbones import build_backbone\n"
        "backbone = build_backbone('lstm', in_channels=3, hidden_size=4)\n"
        "model = get_peft_model(backbone, stlora_peft.STLoraConfig(num_nodes=5))\n"
        "assert model(torch.zeros(2, 12, 5, 3), torch.empty(2, 0, dtype=torch.long)).shape == (2, 12, 5, 1)\n"
    )
