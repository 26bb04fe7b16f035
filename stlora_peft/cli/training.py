"""Training with a progress bar, as the commands show it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stlora_peft.launch import is_main_process

if TYPE_CHECKING:
    from torch import nn

    from stlora_peft.cli.screen import Screen
    from stlora_peft.data import CityData
    from stlora_peft.training import TrainingOptions, TrainingResult


class Resumable:
    """Folder for the checkpoints of a training, beside the folder of its result.

    While it is there, the same command goes on from it.

    Args:
        out: Folder of the result.
        force: Start again, whatever lies there.
    """

    def __init__(self, out: Path, force: bool) -> None:
        self.folder = out.with_name(out.name + ".unfinished")
        if force:
            self.delete()

    def delete(self) -> None:
        """Delete the folder once the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def train(
        self,
        screen: Screen,
        title: str,
        model: nn.Module,
        data: CityData | Sequence[CityData],
        options: TrainingOptions,
        part: str = "",
    ) -> TrainingResult:
        """Train a model under a progress bar.

        Args:
            screen: Where to say that an earlier training goes on.
            title: Words before the bar.
            model: What to train, in place.
            data: The city to train it on, or several.
            options: How to train.
            part: Name of this training, where the result takes several.

        Returns:
            What came out.

        Raises:
            ValueError: If the data do not fit the model, or the checkpoints are of another training.
        """
        from stlora_peft.callbacks import ProgressBar
        from stlora_peft.training import train

        folder = self.folder / part
        if folder.exists():
            screen.note(f"Going on from '{folder}'; --force starts again.")
        with ProgressBar(title) as bar:
            callbacks = [bar] if is_main_process() else []
            return train(model, data, replace(options, progress=False), output_dir=folder, callbacks=callbacks)


def training_line(result: TrainingResult) -> str:
    """Say in a line how a training went."""
    if not math.isfinite(result.best_val_mae):
        return f"{result.epochs} epochs, {result.seconds:.0f} s"
    return f"best epoch {result.best_epoch} of {result.epochs}, {result.seconds:.0f} s"


def training_summary(result: TrainingResult) -> dict[str, Any]:
    """Put the numbers of a training under their names, for JSON."""
    best = result.best_val_mae if math.isfinite(result.best_val_mae) else None
    rounded = {"seconds": round(result.seconds, 3), "seconds_to_best": round(result.seconds_to_best, 3)}
    return {**asdict(result), **rounded, "best_val_mae": best, "history": list(result.history)}
