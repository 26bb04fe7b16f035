import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_city import small_city, small_data
from toys import raised
from two_processes import EXAMPLE, adapt, lstm, run
from typer.testing import CliRunner

from stlora_peft import cli
from stlora_peft.cli.launch import check_launch
from stlora_peft.data import Windows
from stlora_peft.launch import process_count, process_index
from stlora_peft.processes import Share, check_processes, measured, share_of, total
from stlora_peft.storage import load_adapter, load_backbone, save_backbone
from stlora_peft.tensorfiles import load_tensors

TRAININGS = ["lstm", "stgcn", "st-lora on stgcn", "predictor on lstm", "stops early", "all given days"]
HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--main_process_port", "0"]  # a free one


def start(*words: object) -> subprocess.Popen[str]:
    """Start a command in two processes that meet on this machine alone."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*LAUNCH, *map(str, words)], env=env, text=True, **pipes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trainings of ``two_processes.py`` come to in two processes, and in one."""
    folder = tmp_path_factory.mktemp("processes")
    for name in ("one", "two"):
        (folder / name).mkdir()
    data = small_data(small_city(num_nodes=3, seed=1))
    save_backbone(folder / "base", lstm(data), scaler=data.scaler, time_features="day", city="home", quantity="speed")
    small_city(name="away").save(folder / "away.npz")
    launched = start(HERE / "two_processes.py", folder)
    run(folder / "one")
    out, err = launched.communicate(timeout=120)
    assert launched.returncode != 0
    assert "SIGKILL" in err, err
    (folder / "whole.json").write_text(out)
    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_training_in_two_processes_equals_that_in_one(folder: Path, name: str) -> None:
    alone, shared, other = (
        json.loads((folder / path).read_text())[name]
        for path in ("one/results-0.json", "two/results-0.json", "two/results-1.json")
    )
    assert shared == other  # also when to stop
    for before, after in zip(alone[0], shared[0], strict=True):
        assert after == pytest.approx(before, rel=2e-6)  # every loss and every validation
    assert shared[1:] == [pytest.approx(alone[1], rel=2e-6), *alone[2:]]
    tensors, mine, theirs = (
        load_tensors(folder / f"{path}.safetensors") for path in (f"one/{name}-0", f"two/{name}-0", f"two/{name}-1")
    )
    for key, tensor in tensors.items():
        torch.testing.assert_close(mine[key], tensor, rtol=1e-5, atol=2e-6)
        assert torch.equal(mine[key], theirs[key])


def test_adapting_in_two_processes_prints_once_and_writes_one_adapter(folder: Path) -> None:
    answer = json.loads((folder / "whole.json").read_text())
    assert answer["training"]["epochs"] == 10
    assert not (folder / "whole.unfinished").exists()
    adapted = load_adapter(load_backbone(folder / "base").backbone, folder / "whole")
    assert adapted.active_peft_config.node_ids == [f"away-{node}" for node in range(4)]


def test_a_killed_process_costs_no_more_than_the_steps_since_the_checkpoint(folder: Path) -> None:
    assert not (folder / "killed").exists()
    states = (folder / "killed.unfinished" / "validate").glob("checkpoint-*/trainer_state.json")
    assert 1 <= max(json.loads(path.read_text())["epoch"] for path in states) < 10
    again = start("--module", "stlora_peft.cli", *adapt(folder, "killed"))
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert err.count("Going on from") == 1
    whole, resumed = json.loads((folder / "whole.json").read_text()), json.loads(out)
    assert resumed["training"]["history"] == whole["training"]["history"]
    expected = load_tensors(folder / "whole" / "adapter_model.safetensors")
    found = load_tensors(folder / "killed" / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not (folder / "killed.unfinished").exists()


def test_example_of_index_dataset_prints_the_same_in_two_processes(folder: Path) -> None:
    first, second = ((folder / "two" / f"example-{index}.txt").read_text().splitlines() for index in (0, 1))
    assert len(first) == 4
    assert all(line in EXAMPLE.read_text().split('"""')[1] for line in first)
    assert second == []


# -- in one process ------------------------------------------------------------------------------------------


@pytest.fixture
def windows() -> Windows:
    series = torch.arange(20.0).reshape(20, 1, 1)
    return Windows(series, series, torch.arange(10), window=3, horizon=2)


def test_shares_of_a_batch_are_the_batch(windows: Windows) -> None:
    batch = [7, 2, 9, 4, 0]
    shares = [Share(windows, index, 2).__getitems__(batch) for index in (0, 1)]
    assert [share["start"].tolist() for share in shares] == [[7, 9, 0], [2, 4]]
    whole = windows.__getitems__([7, 9, 0, 2, 4])
    for key in ("x", "y"):
        assert torch.equal(torch.cat([share[key] for share in shares]), whole[key])
    assert len(Share(windows, 0, 2)) == 10
    assert torch.equal(Share(windows, 0, 2)[3]["x"], windows[3]["x"])


def test_share_of_a_process_without_a_window_counts_nowhere(windows: Windows) -> None:
    shares = [Share(windows, index, 3).__getitems__([5, 1]) for index in (0, 1, 2)]
    assert ["idle" in share for share in shares] == [False, False, True]
    assert torch.equal(shares[2]["x"], windows[5]["x"][None])
    assert shares[2]["y"].isnan().all()


def test_one_process_shares_nothing(windows: Windows) -> None:
    loss = torch.tensor(2.0)
    assert (process_count(), process_index()) == (1, 0)
    assert measured(torch.ones(3)) is None
    assert total(loss) is loss
    assert share_of(windows) is windows


def test_share_of_the_validation_takes_every_window_once(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    starts = []
    for index in range(3):
        monkeypatch.setenv("RANK", str(index))
        starts += share_of(windows).starts.tolist()
    assert sorted(starts) == windows.starts.tolist()


def test_processes_that_cannot_train_together_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    assert raised(lambda: check_processes(1, 32)) == {
        "where": "the processes do not know of one another",
        "expected": "4 processes, as the environment says "
        "(WORLD_SIZE, PMI_SIZE, OMPI_COMM_WORLD_SIZE, MV2_COMM_WORLD_SIZE)",
        "got": "1 found by accelerate",
        "fix": "start them with 'accelerate launch' or torchrun, or unset these variables to train in one",
    }
    assert raised(lambda: check_processes(4, 3)) == {
        "where": "there are more processes than windows in a step",
        "expected": "batch_size >= 4, so that each of 4 processes has a window of every whole batch",
        "got": "batch_size = 3",
        "fix": "give a larger batch_size, which counts the windows of all processes, or start fewer processes",
    }


def test_commands_that_share_no_work_refuse_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(cli.app, ["evaluate", "city.npz", "--base", "base"], prog_name="stlora")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "Error in process 1: command 'evaluate' runs in one process.",
        "  expected: one process, or one of the commands that share their work out: pretrain, adapt",
        "  got:      2 processes",
        "  to fix:   run 'stlora evaluate' by itself",
    ]


def test_one_process_where_accelerate_was_asked_for_more_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_launch("adapt")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    check_launch("adapt")
    assert "accelerate launch --multi_gpu --num_processes 2 --module stlora_peft.cli adapt" in capsys.readouterr().err
