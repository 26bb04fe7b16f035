"""What watches a training: the best state so far, when to stop, and the progress bar."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stlora_peft.checkpoints import copy_state, newest_checkpoint, trainable_state


class MovingAverage(TrainerCallback):
    r"""Averages what is trained over the steps, the later ones weighing more.

    .. math::
        \bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t)\theta_t, \qquad
        d_t = \min(d, \tfrac{1 + t}{10 + t}), \qquad \bar\theta_0 = \theta_0

    The steps of a small noisy data set scatter around what they are heading for; their average does not. Training
    itself goes on from the last step.

    Args:
        decay: :math:`d`, at least 0 and below 1; 0 is the last step itself.

    Attributes:
        tensors: The average of every tensor that training changes, floats in at least float32, others as they are.
        stepped: Says which rows of a parameter the last step changed and how many steps each has made, or None where
            it may have changed all of them. A row's average counts its own steps :math:`t`.

    References:
        Averaging of iterates: Polyak and Juditsky, SIAM J. Control Optim. 30(4), 1992.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, torch.Tensor] = {}
        self.stepped: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None] = lambda parameter: None
        self._live: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the state that training begins with, unless a checkpoint has brought an average."""
        self._live = trainable_state(kwargs["model"])
        self._parameters = dict(kwargs["model"].named_parameters())
        if not self.tensors:
            self.tensors = {name: _wide(tensor.detach()).clone() for name, tensor in self._live.items()}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in the state after a step."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, tensor in self._live.items():
            rows = self.stepped(self._parameters[name]) if name in self._parameters else None
            if rows is not None:
                self._average_rows(self.tensors[name], tensor, *rows)
            elif tensor.is_floating_point():
                self.tensors[name].lerp_(_wide(tensor.detach()), 1 - decay)
            else:
                self.tensors[name].copy_(tensor)

    def _average_rows(self, average: torch.Tensor, live: torch.Tensor, ids: torch.Tensor, steps: torch.Tensor) -> None:
        """Take in the rows that have made a step."""
        new = _wide(live.detach()[ids])
        decay = ((1 + steps) / (10 + steps)).clamp(max=self.decay).to(new.dtype)
        average[ids] = average[ids].lerp_(new, 1 - decay.reshape(-1, *[1] * (new.ndim - 1)))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put the average in the place of the model's own tensors for a while."""
        live = {name: tensor.detach().clone() for name, tensor in trainable_state(model).items()}
        copy_state(self.tensors, model)
        try:
            yield
        finally:
            copy_state(live, model)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Widen low precision, in which small steps would be lost."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class KeepBest(TrainerCallback):
    """Keeps a copy of the best state by validation error and stops when it has not improved for a while.

    The evaluation before the first step counts: training never returns a model that validates worse than the one it
    was given. Only what training can change is copied.

    Args:
        patience: Evaluations in a row without an improvement after which training stops; None never stops it.

    Attributes:
        best_mae: Lowest validation error so far.
        best_epoch: Epoch after which it was measured; 0 is the untrained model.
        waited: Evaluations since then.
        reached: When it was measured, by ``time.perf_counter``.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best_mae = float("inf")
        self.best_epoch = 0
        self.waited = 0
        self.reached = 0.0
        self.tensors: dict[str, torch.Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare with the best; a NaN is never better."""
        mae = kwargs["metrics"]["eval_mae"]
        if not self.tensors or mae < self.best_mae:
            live = trainable_state(kwargs["model"])
            self.tensors = {name: tensor.detach().clone() for name, tensor in live.items()}
            self.best_mae = mae if mae == mae else float("inf")
            self.best_epoch = round(state.epoch or 0)
            self.waited = 0
            self.reached = time.perf_counter()
        else:
            self.waited += 1
        control.should_training_stop |= self.exhausted


class KeepNewest(TrainerCallback):
    """Deletes the older checkpoints when a newer one is complete.

    The Trainer's own ``save_total_limit`` goes by the files' times, and warns where those are not reliable.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete every other checkpoint."""
        newest = newest_checkpoint(args.output_dir or ".")
        if newest is not None and args.should_save:
            for folder in newest.parent.glob("checkpoint-*"):
                if folder != newest:
                    shutil.rmtree(folder, ignore_errors=True)


class ProgressBar(TrainerCallback):
    """Draws a training on a rich progress display: the steps done, the epoch, the error.

    Args:
        description: Words before the bar.
        progress: Display that other bars share; where it is None the bar has one of its own, on standard error.
    """

    def __init__(self, description: str = "training", progress: Progress | None = None) -> None:
        self._description = description
        self._shared = progress
        self._progress = progress or new_progress()
        self._task: TaskID | None = None
        self._best = float("inf")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if self._shared is None:
            self._progress.start()
        self._task = self._progress.add_task(
            self._description, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar by a step."""
        if self._task is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the epoch and the validation error behind the bar."""
        if self._task is not None:
            mae = kwargs["metrics"]["eval_mae"]
            self._best = min(self._best, mae)
            note = f"epoch {round(state.epoch or 0)}, validation MAE {mae:.4g} (best {self._best:.4g})"
            self._progress.update(self._task, note=note)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the training error where nothing validates."""
        loss = kwargs["logs"].get("loss")
        if self._task is not None and loss is not None and args.eval_strategy == "no":
            self._progress.update(self._task, note=f"epoch {state.epoch or 0:.1f}, training MAE {loss:.4g}")

    def close(self) -> None:
        """Take the bar away, or leave its last state where it has a display of its own."""
        if self._task is None:
            return
        if self._shared is None:
            self._progress.stop()
        else:
            self._progress.remove_task(self._task)
        self._task = None

    def __enter__(self) -> ProgressBar:
        """Return the bar; it shows when training begins."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar, also when training breaks off."""
        self.close()


class JobBars:
    """A bar that counts jobs, and below it one for the training that is under way.

    Args:
        description: Words before the upper bar.
        total: Number of jobs.
        show: Draw them; otherwise nothing is printed.
    """

    def __init__(self, description: str, total: int, show: bool) -> None:
        self._progress = new_progress() if show else None
        self._task = self._progress.add_task(description, total=total, note="") if self._progress else None

    def advance(self, note: str) -> None:
        """Count a job that is done, and say what came of it."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, note=note)

    @contextmanager
    def job(self, description: str) -> Iterator[list[TrainerCallback]]:
        """Yield the callbacks that draw one training, and take its bar away afterwards."""
        if self._progress is None:
            yield []
            return
        with ProgressBar(description, self._progress) as bar:
            yield [bar]

    @contextmanager
    def part(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """Yield what draws the progress of one job that is no training, from the parts done and their number."""
        if self._progress is None:
            yield lambda done, total: None
            return
        progress, task = self._progress, self._progress.add_task(description, total=None, note="")
        yield lambda done, total: progress.update(task, completed=done, total=total)
        progress.remove_task(task)

    def __enter__(self) -> JobBars:
        """Show the upper bar."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the upper bar as it stands."""
        if self._progress is not None:
            self._progress.stop()


def new_progress() -> Progress:
    """Return a progress display on standard error that knows a column ``note``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
