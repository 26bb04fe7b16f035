"""Training of a backbone or an adapter on a city, on ``transformers.Trainer``."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from stlora_peft.allocator import keeping_freed_memory
from stlora_peft.data import CityData, Windows
from stlora_peft.errors import message
from stlora_peft.evaluation import check_fit
from stlora_peft.launch import is_main_process
from stlora_peft.sources import check_sources

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class TrainingOptions:
    r"""How a model is trained; the same for a backbone and for an adapter.

    Args:
        learning_rate: Step size of AdamW, constant over the training.
        weight_decay: Decoupled weight decay, on matrices only (not on biases, norms and other vectors).
        max_epochs: Passes over the training windows at most.
        patience: Passes in a row without a better validation error after which training stops. None trains on all
            given windows without validation, for the whole of ``max_epochs`` or ``max_steps``.
        max_steps: Steps to make, in place of ``max_epochs``.
        batch_size: Windows in one step, over all processes.
        eval_batch_size: Windows in one forward pass of the validation.
        max_grad_norm: Longer gradients are shortened to this norm; 0 leaves them as they are.
        ema_decay: Decay :math:`d` of the moving average over the steps,
            :math:`\bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t)\theta_t` with
            :math:`d_t = \min(d, \tfrac{1 + t}{10 + t})`, that is validated and kept in place of the last step; 0
            switches it off.
        seed: Seed of the order of the windows and of dropout.
        cache_frozen: Keep what the frozen part of a model computes for each window instead of computing it at every
            pass, see :class:`stlora_peft.frozen.FrozenActivations`. It makes no difference to the result but that of
            rounding.
        nodes_per_step: Train and validate on parts of the graph of at most so many nodes each, in place of the whole
            graph: a step is some windows of one part, and a pass meets every window at every node. What is frozen is
            computed at every pass then. See :mod:`stlora_peft.sampling`.
        hops: How far around a part the nodes that its own hear are computed too.
        mixed_precision: Number format of the forward pass: ``"no"`` (float32), ``"bf16"`` or ``"fp16"``.
        progress: Draw a progress bar on standard error.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> TrainingOptions(learning_rate=3e-3, max_epochs=5).batch_size
        32
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    max_epochs: int = 50
    patience: int | None = 10
    max_steps: int | None = None
    batch_size: int = 32
    eval_batch_size: int = 64
    max_grad_norm: float = 5.0
    ema_decay: float = 0.98
    seed: int = 0
    cache_frozen: bool = True
    nodes_per_step: int | None = None
    hops: int = 2
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    progress: bool = True

    @property
    def budget(self) -> str:
        """What the trainings of one table share, in words."""
        return f"{self.length}, batches of {self.batch_size} windows, moving average with decay {self.ema_decay:g}"

    @property
    def length(self) -> str:
        """How long a training takes, in words."""
        steps = f"{self.max_epochs} epochs" if self.max_steps is None else f"{self.max_steps} steps"
        return steps if self.patience is None else f"{steps}, patience {self.patience}"

    def chosen(self, *without: str) -> dict[str, Any]:
        """Return the options by name; those of the parts only where the graph has parts.

        Args:
            without: Names to leave out.
        """
        unused = ("nodes_per_step", "hops") if self.nodes_per_step is None else ()
        return {name: value for name, value in asdict(self).items() if name not in (*without, *unused)}

    def windows(self, data: CityData) -> Windows:
        """Choose the windows that are trained on: all given ones where nothing validates."""
        return data.given if self.patience is None else data.train

    def __post_init__(self) -> None:
        """Check every range."""
        for name in ("max_epochs", "batch_size", "eval_batch_size"):
            self._require(name, getattr(self, name) >= 1, f"{name} >= 1")
        for name in ("patience", "max_steps", "nodes_per_step"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, f"{name} >= 1, or None")
        for name in ("weight_decay", "max_grad_norm", "seed", "hops"):
            self._require(name, getattr(self, name) >= 0, f"{name} >= 0")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "0 <= ema_decay < 1")
        self._require("learning_rate", self.learning_rate > 0, "learning_rate > 0")
        self._require("mixed_precision", self.mixed_precision in ("no", "bf16", "fp16"), "'no', 'bf16' or 'fp16'")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        """Raise unless the condition on the option holds."""
        if not holds:
            raise ValueError(
                message(
                    f"training option '{name}' is out of range",
                    expected=expected,
                    got=f"{name} = {getattr(self, name)!r}",
                    fix=f"give another {name}",
                )
            )


@dataclass(frozen=True)
class TrainingResult:
    """What came out of a training.

    Args:
        best_val_mae: Lowest validation MAE; the model is left in the state that reached it. Infinite where nothing
            validated: the model is left in the average of the last steps.
        best_epoch: Passes over the data after which it was reached; 0 means that training did not help and the model
            is as it was given.
        epochs: Passes that were made.
        seconds: Wall time, validation included.
        seconds_to_best: Wall time until the lowest validation MAE was reached.
        history: One entry for each pass: ``epoch``, ``train_mae`` but for the one before the first step, and
            ``val_mae`` where it was validated.

    Units:
        Errors in the city's units; of several cities in standard deviations of each city's readings.
    """

    best_val_mae: float
    best_epoch: int
    epochs: int
    seconds: float
    seconds_to_best: float = 0.0
    history: tuple[dict[str, float], ...] = field(default=(), repr=False)


def train(
    model: nn.Module,
    data: CityData | Sequence[CityData],
    options: TrainingOptions | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    r"""Train the parameters of a model that require gradients, in place.

    The loss is the masked mean absolute error in the city's units. What is validated, before the first step and after
    every pass over the data, is the moving average of the trained tensors over the steps; the model ends in its best
    state, which may be the one it came in. With ``patience=None`` nothing validates, all given windows train, and the
    model ends in the average. The same seed gives the same numbers bit for bit on the same machine.
    Modules that are bound to the number of nodes must fit the city already, see :func:`stlora_peft.tuner.rebuild` and
    :func:`stlora_peft.tuner.reestimate`.

    Of several cities every batch is of one, and a pass meets all windows of all of them, the batches shuffled. Errors
    are in the scaled units of each city then, :math:`|\hat y - y| / \sigma`, so that flows in vehicles do not drown
    speeds; the validation error is the mean over the cities. Modules that are bound to the number of nodes hold the
    nodes of all cities, one city after the other, and a batch sees and moves those of its own city alone.

    Args:
        model: A backbone, or a :class:`peft.PeftModel` around one. ``accelerate`` chooses the device and leaves the
            model there.
        data: The city with its training and validation windows, its scaler and its graph; or several cities.
        options: How to train.
        output_dir: Folder for checkpoints (safetensors, JSON, and the Trainer's own optimiser files). A training that
            was interrupted goes on from the newest of them. Without it nothing is written.
        callbacks: Further callbacks of the Trainer.

    Returns:
        The best validation error and how it was reached.

    Raises:
        ValueError: If window, horizon or channels of the data do not fit the model, if nothing can be trained or
            validated, if it diverges without a validation, if ``output_dir`` holds the checkpoints of another
            training, or if several cities cannot be trained on together, see
            :func:`stlora_peft.sources.check_sources`.

    Example:
        >>> from stlora_peft.backbones import build_backbone
        >>> from stlora_peft.data import adaptation_split, prepare, simulate_city
        >>> city = simulate_city(num_nodes=4, days=4, seed=0)
        >>> split = adaptation_split(city.num_steps, city.steps_per_day, days=1)
        >>> model = build_backbone("lstm", in_channels=3, hidden_size=4)
        >>> options = TrainingOptions(max_epochs=1, progress=False)
        >>> train(model, prepare(city, split, window=12, horizon=12), options).epochs
        1
    """
    from stlora_peft.callbacks import KeepBest, MovingAverage, ProgressBar  # the Trainer is slow to import
    from stlora_peft.sampling.sources import SourcesTrainer
    from stlora_peft.sampling.trainer import PartTrainer
    from stlora_peft.trainer import CityTrainer

    options = options or TrainingOptions()
    cities = [data] if isinstance(data, CityData) else list(data)
    _check_trainable(model, cities, options)
    best, average = KeepBest(options.patience), MovingAverage(options.ema_decay)
    began = time.perf_counter()
    with ExitStack() as stack:
        if output_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(output_dir)
        watchers: list[TrainerCallback] = [average, best, *callbacks]
        if options.progress and is_main_process():
            watchers.append(stack.enter_context(ProgressBar()))
        stack.enter_context(_deterministic())
        if options.nodes_per_step is None:  # parts of many sizes would leave gaps that none of the next fits
            stack.enter_context(keeping_freed_memory())
        kept: dict[str, Any] = {"keep": output_dir is not None, "average": average, "best": best, "watchers": watchers}
        if len(cities) > 1:
            trainer: CityTrainer = SourcesTrainer(model, cities, options, folder, **kept)
        else:
            trainer_class = CityTrainer if options.nodes_per_step is None else PartTrainer
            trainer = trainer_class(model, cities[0], options, folder, **kept)
        trainer.run()
    return TrainingResult(
        best_val_mae=best.best_mae,
        best_epoch=best.best_epoch,
        epochs=round(trainer.state.epoch or 0),
        seconds=time.perf_counter() - began,
        seconds_to_best=max(best.reached - began, 0.0) if best.tensors else 0.0,
        history=tuple(_history(trainer.state.log_history)),
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Ask CUDA for kernels that give the same numbers every time; the CPU's do."""
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _check_trainable(model: nn.Module, cities: Sequence[CityData], options: TrainingOptions) -> None:
    """Refuse what cannot be trained, before anything is changed."""
    check_sources(model, cities)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            message(
                "nothing to train",
                expected="at least one parameter that requires gradients",
                got="a model whose parameters are all frozen",
                fix="add an adapter with get_peft_model, or call requires_grad_(True) on what shall be trained",
            )
        )
    for data in cities:
        check_fit(model, data.train)
        _check_truths(data, options)


def _check_truths(data: CityData, options: TrainingOptions) -> None:
    """Refuse a city without anything to compare with."""
    validation = [] if options.patience is None else [("validation", data.val)]
    for part, windows in [("training", options.windows(data)), *validation]:
        if not windows.has_truth():
            raise ValueError(
                message(
                    f"no {part} window of city '{data.city.name}' has a truth to compare with",
                    expected="at least one window with a measured value",
                    got=f"{len(windows)} windows",
                    fix="give more days",
                )
            )


def _history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """Merge the Trainer's log into one entry for each validation."""
    entries: dict[int, dict[str, float]] = {}
    for line in log:
        entry = entries.setdefault(round(line["epoch"]), {"epoch": round(line["epoch"])})
        entry |= {new: line[old] for old, new in (("loss", "train_mae"), ("eval_mae", "val_mae")) if old in line}
    return [entry for entry in entries.values() if "val_mae" in entry or "train_mae" in entry]
