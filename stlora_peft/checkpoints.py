"""Checkpoints of a training that may be interrupted."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stlora_peft.data import CityData
from stlora_peft.errors import message
from stlora_peft.files import read_json, write_json
from stlora_peft.tensorfiles import load_tensors, save_tensors

if TYPE_CHECKING:
    from stlora_peft.callbacks import KeepBest, MovingAverage
    from stlora_peft.training import TrainingOptions

STATE, AVERAGE, BEST, PROGRESS = "state.safetensors", "average.safetensors", "best.safetensors", "progress.json"
TRAINER_STATE = "trainer_state.json"  # the Trainer writes it last: a folder without it is half-written
_MAY_CHANGE = ("max_epochs", "max_steps", "patience", "eval_batch_size", "progress", "cache_frozen")


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training can change of a model: trainable parameters, and the buffers that are saved.

    Args:
        model: Any module; of a :class:`peft.PeftModel` the frozen backbone is left out.

    Returns:
        The live tensors by their names in the state dict.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.bias.requires_grad_(False)
        >>> list(trainable_state(layer))
        ['weight']
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def copy_state(source: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Copy tensors into a model's parameters and buffers of the same names, in place."""
    target = model.state_dict()
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)


def signature(model: nn.Module, data: CityData | Sequence[CityData], options: TrainingOptions) -> dict[str, Any]:
    """Describe a training, so that a checkpoint of another one is recognised.

    Args:
        model: The model to train.
        data: The city to train it on, or several.
        options: How to train. Those that only say when to stop are left out.

    Returns:
        Values that JSON can hold; the frozen weights are in it by a hash of their values.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    shapes = {name: list(tensor.shape) for name, tensor in trainable_state(model).items()}
    return {
        "options": options.chosen(*_MAY_CHANGE),
        "city": _for_each(
            data,
            lambda one: {"name": one.city.name, "nodes": one.city.num_nodes, "windows": len(options.windows(one))},
        ),
        "scaler": _for_each(data, lambda one: one.scaler.to_dict()),
        "trained tensors": shapes,
        "frozen weights": digest.hexdigest(),
    }


def _for_each(data: CityData | Sequence[CityData], describe: Callable[[CityData], Any]) -> Any:
    """What is said of a city, or a list of it for several."""
    return describe(data) if isinstance(data, CityData) else [describe(one) for one in data]


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the last complete checkpoint of a folder, or None.

    Args:
        folder: Folder of ``checkpoint-<step>`` folders; it need not exist.
    """
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{TRAINER_STATE}") if _is_whole(path)]
    numbered = [path for path in found if path.name.rpartition("-")[2].isdigit()]
    return max(numbered, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(path: Path) -> bool:
    """Whether the Trainer has written its state to the end; it writes the file in place."""
    try:
        read_json(path)
    except ValueError:
        return False
    return True


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    average: MovingAverage,
    best: KeepBest,
    described: dict[str, Any],
) -> None:
    """Write the state that training changes, its moving average, the best one so far, and how far it has come.

    Args:
        folder: Folder of this checkpoint.
        model: The model in training.
        average: The moving average of its states.
        best: The best state so far.
        described: The training's :func:`signature`.
    """
    folder = Path(folder)
    save_tensors(folder / STATE, trainable_state(model))
    save_tensors(folder / AVERAGE, average.tensors)
    if best.patience is not None:  # otherwise nothing validates
        save_tensors(folder / BEST, best.tensors)
    lowest = best.best_mae if math.isfinite(best.best_mae) else None
    progress = {"best_mae": lowest, "best_epoch": best.best_epoch, "waited": best.waited}
    write_json(folder / PROGRESS, {**progress, "training": described})


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    average: MovingAverage,
    best: KeepBest,
    described: dict[str, Any],
) -> None:
    """Load what :func:`save_checkpoint` wrote, into the model, ``average`` and ``best``.

    Args:
        folder: Folder of the checkpoint.
        model: The model to go on with.
        average: Receives the moving average.
        best: Receives the best state.
        described: The :func:`signature` of the training that is to go on.

    Raises:
        ValueError: If the checkpoint is of another training.
    """
    folder = Path(folder)
    progress = read_json(folder / PROGRESS)
    _check_same(folder, progress.get("training", {}), described)
    device = next(model.parameters()).device
    copy_state(load_tensors(folder / STATE), model)
    average.tensors = _load_to(device, folder / AVERAGE)
    if best.patience is not None:
        best.tensors = _load_to(device, folder / BEST)
    best.best_epoch, best.waited = progress["best_epoch"], progress["waited"]
    best.best_mae = math.inf if progress["best_mae"] is None else progress["best_mae"]


def _load_to(device: torch.device, path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in load_tensors(path).items()}


def _check_same(folder: Path, stored: dict[str, Any], described: dict[str, Any]) -> None:
    """Raise if the stored training differs from the described one, naming what differs."""
    wrong = [name for name in described if stored.get(name) != described[name]]
    if wrong:
        options = described["options"] if "options" in wrong else {}
        before = stored.get("options", {})
        changed = [
            f"{name} {before.get(name)} -> {value}" for name, value in options.items() if before.get(name) != value
        ]
        raise ValueError(
            message(
                f"checkpoint '{folder}' belongs to another training",
                expected="the same model, city and options as when it was written",
                got=f"other {', '.join(wrong)}" + (f" ({', '.join(changed)})" if changed else ""),
                fix="give another output folder, or delete this one to start again",
            )
        )
