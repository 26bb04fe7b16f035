"""The form of an adapter chosen by validation on held-out days, for a city that nobody has a form for."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn

from stlora_peft.callbacks import JobBars
from stlora_peft.data import CityData
from stlora_peft.data.city import hash_with_city
from stlora_peft.data.folds import Fold, held_out_folds
from stlora_peft.errors import message
from stlora_peft.evaluation import evaluate
from stlora_peft.files import read_json, write_json
from stlora_peft.launch import is_main_process, process_count
from stlora_peft.methods import DEFAULT_FORM, FORMS, build_adapter
from stlora_peft.sampling import city_parts, evaluate_parts
from stlora_peft.training import TrainingOptions, train
from stlora_peft.tuner.identity import fingerprint

if TYPE_CHECKING:
    from transformers import TrainerCallback

STEPS = 200
_UNUSED = ("max_epochs", "max_steps", "patience", "eval_batch_size", "progress", "cache_frozen")

Job = Callable[[str], "AbstractContextManager[list[TrainerCallback]]"]
"""Gives the callbacks of one training, from its title."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what each candidate was worth.

    Args:
        name: The chosen one, a key of :data:`stlora_peft.methods.FORMS`.
        folds: MAE on the held-out windows of each fold, by candidate.
        left_out: Why a candidate could not be trained, by name.
        steps: Steps of each training.
        seconds: Wall time of all trainings.

    Units:
        Errors in the city's units.

    Example:
        >>> choice = Choice("gate", {"embedding": (3.0, 2.0), "gate": (2.0, 2.0)}, steps=200)
        >>> choice.errors, choice.settings
        ({'embedding': 2.5, 'gate': 2.0}, {'conditioning': 'gate'})
    """

    name: str
    folds: Mapping[str, tuple[float, ...]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    steps: int = STEPS
    seconds: float = 0.0

    @property
    def errors(self) -> dict[str, float]:
        """Mean error over the folds, by candidate."""
        return {name: statistics.fmean(errors) for name, errors in self.folds.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of :class:`stlora_peft.STLoraConfig` that make the chosen form."""
        return dict(FORMS[self.name])

    def to_dict(self) -> dict[str, Any]:
        """Return everything under its name, for JSON."""
        return {
            "chosen": self.name,
            "errors": self.errors,
            "folds": {name: list(errors) for name, errors in self.folds.items()},
            "left_out": dict(self.left_out),
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
        }


def choose_conditioning(
    backbone: nn.Module,
    data: CityData,
    options: TrainingOptions | None = None,
    *,
    candidates: Iterable[str] = tuple(FORMS),
    steps: int = STEPS,
    settings: Mapping[str, Any] | None = None,
    file: str | os.PathLike[str] | None = None,
    job: Job | None = None,
) -> Choice:
    r"""Choose the form of an adapter by its error on days that it was not trained on.

    .. math:: \hat f = \arg\min_f \frac{1}{K} \sum_{k=1}^{K} \mathrm{MAE}\left(f_k, \text{fold } k\right)

    with :math:`f_k` the form :math:`f` trained for a fixed number of steps without fold :math:`k` of
    :func:`stlora_peft.data.folds.held_out_folds`. Nothing stops early: the few windows of a fold judge worse of steps
    than of forms. Of equal errors the first candidate's counts, and the default comes first. The scaler is that of all
    given days, the same for every candidate.

    Args:
        backbone: The backbone as it was pretrained; it is not changed.
        data: The city. Its test part is not looked at.
        options: How to train. Epochs and patience are not used.
        candidates: Keys of :data:`stlora_peft.methods.FORMS`. The default form is always among them.
        steps: Steps of each training.
        settings: Arguments of :class:`stlora_peft.STLoraConfig` that all candidates share.
        file: Where the errors found so far are kept. The same call goes on from them; several processes start again.
        job: What draws a training; None draws bars of its own where the options ask for them.

    Returns:
        The choice. A candidate that the backbone does not support, or that diverges, is left out by name.

    Cost:
        Three trainings of each candidate, two with two days, six with less: by default 12, 8 or 24 times 200 steps.

    Raises:
        ValueError: If a candidate is unknown, the given days are too few, ``file`` is of another choice, or no
            candidate can be trained.

    Example:
        >>> from stlora_peft.backbones import build_backbone
        >>> from stlora_peft.data import adaptation_split, prepare, simulate_city
        >>> city = simulate_city(num_nodes=3, days=4, interval_minutes=15, seed=0)
        >>> data = prepare(city, adaptation_split(city.num_steps, city.steps_per_day, days=2), window=4, horizon=4)
        >>> backbone = build_backbone("lstm", in_channels=3, hidden_size=4, window=4, horizon=4)
        >>> options = TrainingOptions(progress=False)
        >>> choice = choose_conditioning(backbone, data, options, candidates=["predictor"], steps=1)
        >>> list(choice.errors)
        ['embedding', 'predictor']
    """
    options = replace(options or TrainingOptions(), patience=None, max_steps=steps)
    names = _known(candidates)
    folds = held_out_folds(data)
    record = _Record(file, _settings(backbone, data, options, dict(settings or {}), len(folds)))
    refused: dict[str, ValueError] = {}
    with ExitStack() as stack:
        bars = JobBars("choose", len(names) * len(folds), show=job is None and options.progress and is_main_process())
        draw = stack.enter_context(bars).job if job is None else job
        for name in names:
            known = len(record.folds.get(name, ()))
            for number, fold in enumerate(folds[known:], known + 1):
                began = time.perf_counter()
                try:
                    with draw(f"{name}, fold {number} of {len(folds)}") as callbacks:
                        error = _fold_error(backbone, fold, options, {**(settings or {}), **FORMS[name]}, callbacks)
                except ValueError as refusal:
                    refused[name] = refusal
                    break
                record.add(name, error, time.perf_counter() - began)
                bars.advance(f"{name}: {error:.4g}")
    found = {name: tuple(record.folds[name]) for name in names if name not in refused}
    if not found:
        raise refused[names[0]]
    choice = Choice(names[0], found, {name: _in_a_line(why) for name, why in refused.items()}, steps, record.seconds)
    return replace(choice, name=min(found, key=choice.errors.__getitem__))


def _fold_error(
    backbone: nn.Module,
    fold: Fold,
    options: TrainingOptions,
    settings: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> float:
    """Train one candidate on one fold; its MAE on what is held back."""
    parts = None if options.nodes_per_step is None else city_parts(fold, options.nodes_per_step, options.hops)
    torch.manual_seed(options.seed)
    model: PeftModel = build_adapter(backbone, fold, parts=parts, **settings)
    train(model, fold, replace(options, progress=False), callbacks=callbacks)
    size = options.eval_batch_size
    if parts is None:
        return evaluate(model, fold.val, fold, batch_size=size).mae
    return evaluate_parts(model, fold.val, fold.scaler, parts, batch_size=size).mae


class _Record:
    """Errors found so far, in a file where there is one."""

    def __init__(self, file: str | os.PathLike[str] | None, settings: str) -> None:
        # Several processes train together: they must not go on from different places.
        self._file = None if file is None or process_count() > 1 else Path(file)
        self._settings = settings
        self.folds: dict[str, list[float]] = {}
        self.seconds = 0.0
        if self._file is not None and self._file.exists():
            self._read(self._file)

    def add(self, name: str, error: float, seconds: float) -> None:
        """Keep the error of a candidate's next fold."""
        self.folds.setdefault(name, []).append(error)
        self.seconds += seconds
        if self._file is not None:
            write_json(self._file, {"settings": self._settings, "folds": self.folds, "seconds": self.seconds})

    def _read(self, file: Path) -> None:
        stored = read_json(file)
        found = stored.get("settings") if isinstance(stored, dict) else None
        if found != self._settings:
            raise ValueError(
                message(
                    f"choice '{file}' cannot be continued",
                    expected=f"errors of the settings {self._settings} (backbone, city, given days, options)",
                    got=f"those of {found}",
                    fix="give another output folder, or delete the file to choose anew",
                )
            )
        self.folds, self.seconds = stored["folds"], stored["seconds"]


def _settings(
    backbone: nn.Module, data: CityData, options: TrainingOptions, settings: dict[str, Any], folds: int
) -> str:
    """Hash everything that the errors of one choice share."""
    length = [options.max_steps, folds, len(data.split.given), FORMS]
    return hash_with_city([fingerprint(backbone), options.chosen(*_UNUSED), length, settings], data.city)


def _known(candidates: Iterable[str]) -> list[str]:
    """Names of the candidates, the default form first."""
    names = list(dict.fromkeys((DEFAULT_FORM, *candidates)))
    unknown = [name for name in names if name not in FORMS]
    if unknown:
        raise ValueError(
            message(
                "unknown form of adapter to choose from",
                expected=f"names of {', '.join(FORMS)}",
                got=", ".join(unknown),
                fix="correct the list of candidates",
            )
        )
    return names


def _in_a_line(error: ValueError) -> str:
    """The four lines of an error in one."""
    return "; ".join(" ".join(line.split()) for line in str(error).splitlines())
