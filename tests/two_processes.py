"""What ``test_processes.py`` runs in two processes, and in one: trainings, each with everything that came out."""

import copy
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from small_city import small_city, small_data
from torch import nn
from transformers import Trainer

from stlora_peft import cli
from stlora_peft.backbones import build_backbone
from stlora_peft.checkpoints import trainable_state
from stlora_peft.data import CityData
from stlora_peft.launch import process_index
from stlora_peft.methods import build_adapter
from stlora_peft.processes import check_same_start, measured, total
from stlora_peft.shared_norms import sharing_norms
from stlora_peft.tensorfiles import save_tensors
from stlora_peft.training import TrainingOptions, train

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "04_index_dataset.py"
BATCH = 24  # the city has 121 training windows: the last batch of an epoch is one window, for two processes
OPTIONS: dict[str, Any] = {"max_epochs": 2, "learning_rate": 3e-3, "batch_size": BATCH, "progress": False}


def sparse_data(num_nodes: int = 4, seed: int = 0) -> CityData:
    """A city whose first days miss most of their readings, so that the processes measure different numbers."""
    city = small_city(num_nodes=num_nodes, seed=seed)
    city.values[: 60 if num_nodes == 4 else 0, 1:] = float("nan")
    return small_data(city)


def lstm(data: CityData) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("lstm", in_channels=3, hidden_size=4)


def stgcn(data: CityData) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("stgcn", num_nodes=data.city.num_nodes, in_channels=3, hidden_channels=4)


def adapted(make: Callable[[CityData], nn.Module], data: CityData, **settings: Any) -> nn.Module:
    """Put an adapter on, without dropout and noise: each process draws its own."""
    backbone = make(sparse_data(num_nodes=3, seed=1))
    torch.manual_seed(1)
    return build_adapter(backbone, data, lora_dropout=0.0, emb_noise=0.0, **settings)


def without_output_bias(model: nn.Module) -> None:
    """Freeze the bias of the forecast, whose gradient counts the errors above zero against those below.

    Where they balance it is zero but for rounding, of which AdamW makes a whole step.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("head.bias", "head.output.bias", "bias_out")):
            parameter.requires_grad_(False)


def trainings(data: CityData) -> Iterator[tuple[str, nn.Module, TrainingOptions]]:
    """Name, model and options of each."""
    yield "lstm", lstm(data), TrainingOptions(**OPTIONS)
    yield "stgcn", stgcn(data), TrainingOptions(**OPTIONS)
    yield "st-lora on stgcn", adapted(stgcn, data), TrainingOptions(**OPTIONS)
    frugal = adapted(lstm, data, target_modules=[])
    yield "predictor on lstm", frugal, TrainingOptions(**OPTIONS)
    yield "stops early", lstm(data), TrainingOptions(**OPTIONS | {"learning_rate": 1e4, "patience": 1})
    whole = {"patience": None, "max_steps": 7, "max_grad_norm": 1e-3}
    yield "all given days", adapted(lstm, data), TrainingOptions(**OPTIONS | whole)


def run(folder: Path) -> None:
    """Write what comes out of every training."""
    data = sparse_data()
    results = {}
    for name, model, options in trainings(data):
        without_output_bias(model)
        result = train(model, data, options)
        save_tensors(folder / f"{name}-{process_index()}.safetensors", trainable_state(model))
        results[name] = [result.history, result.best_val_mae, result.best_epoch, result.epochs]
    (folder / f"results-{process_index()}.json").write_text(json.dumps(results))


def check_norm(norm: nn.Module) -> None:
    """Compare a normalisation of two unlike parts of a batch with torch's of the whole batch, and its gradients."""
    alone, whole = copy.deepcopy(norm), torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)) + 2
    weights = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1))
    rows = slice(0, 4) if process_index() == 0 else slice(4, 7)
    expected_x, x = whole.clone().requires_grad_(), whole[rows].clone().requires_grad_()
    for _ in range(2):
        expected = alone(expected_x)
        with sharing_norms(norm):
            found = norm(x)
    (expected * weights).sum().backward()
    (found * weights[rows]).sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected[rows], **close)
    torch.testing.assert_close(x.grad, expected_x.grad[rows], **close)
    for mine, theirs in zip(norm.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(total(mine.grad), theirs.grad, **close)
    for mine, theirs in zip(norm.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def check_norms() -> None:
    for settings in ({}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}):
        check_norm(nn.BatchNorm1d(3, **settings))
    norm, x = nn.BatchNorm1d(3).eval(), torch.randn(2, 3)
    with sharing_norms(norm):
        assert torch.equal(norm(x), x / (1 + norm.eps) ** 0.5)


def check_sums() -> None:
    index = process_index()
    tenths = torch.full((2,), 0.1 + index, dtype=torch.float64)
    assert total(tenths).tolist() == [0.1 + 1.1] * 2
    truth = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])[index]  # the first process has measured one, the other two
    assert measured(truth) == 3 / 2
    with pytest.raises(ValueError, match="different checkpoints") as error:
        check_same_start(5 * index)
    assert str(error.value).splitlines()[1:] == [
        "  expected: the same folder of checkpoints in all processes",
        "  got:      checkpoints of steps 0 (process 0), 5 (process 1)",
        "  to fix:   write to a folder that all machines share, or delete the checkpoints to start again",
    ]


def adapt(folder: Path, out: str) -> list[str]:
    """Words of the command that adapts the backbone in the folder."""
    how = ["--days", "8", "--epochs", "10", "--patience", "10", "--refit-steps", "3", "--json"]
    return ["adapt", str(folder / "away.npz"), "--base", str(folder / "base"), "--out", str(folder / out), *how]


def kill_after_a_checkpoint() -> None:
    """Let the second process be killed where it would write the second checkpoint; the first is whole by then."""
    save, saved = Trainer._save_checkpoint, []

    def killed(self: Trainer, *arguments: Any) -> None:
        saved.append(self.state.global_step)
        if process_index() == 1 and len(saved) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, *arguments)

    Trainer._save_checkpoint = killed


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    run(work / "two")
    check_norms()
    check_sums()
    with (work / "two" / f"example-{process_index()}.txt").open("w") as file, redirect_stdout(file):
        runpy.run_path(str(EXAMPLE))
    cli.app(adapt(work, "whole"), standalone_mode=False)
    kill_after_a_checkpoint()
    cli.app(adapt(work, "killed"), standalone_mode=False)  # in the same processes: to start others takes seconds
