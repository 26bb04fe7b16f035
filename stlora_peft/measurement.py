"""One row of a comparison: a method trained with one seed, measured on the test part."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from stlora_peft.baselines import Baseline, baseline_batches
from stlora_peft.callbacks import JobBars
from stlora_peft.checkpoints import trainable_state
from stlora_peft.data import CityData, Windows
from stlora_peft.evaluation import evaluate, evaluate_persistence, measure
from stlora_peft.memory import PeakMemory
from stlora_peft.methods import Build, Candidate, Method, build_adapter
from stlora_peft.methods.trained import CHOSEN
from stlora_peft.metrics import Metrics
from stlora_peft.selection import Choice, choose_conditioning
from stlora_peft.significance import DailyErrors
from stlora_peft.storage import ADAPTER_WEIGHTS, save_adapter
from stlora_peft.tensorfiles import tensors_to_bytes
from stlora_peft.training import TrainingOptions, TrainingResult, train

Row = dict[str, Any]


def adapter_bytes(candidate: nn.Module) -> int:
    """Size of the file that a city would need beside the backbone to keep this model.

    Args:
        candidate: An adapted model: an adapter's file, or else, also where the backbone trains with it, the parameters
            that require gradients and the buffers.

    Returns:
        Bytes of the safetensors file.

    Example:
        >>> layer = nn.Linear(10, 10)
        >>> adapter_bytes(layer) > 4 * 110
        True
    """
    joint = isinstance(candidate, PeftModel) and not getattr(candidate.active_peft_config, "freeze_backbone", True)
    if joint or not isinstance(candidate, PeftModel):
        return len(tensors_to_bytes(trainable_state(candidate)))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(folder, candidate)
        return (Path(folder) / ADAPTER_WEIGHTS).stat().st_size


@dataclass(frozen=True)
class Run:
    """What the runs of all methods with one seed share.

    Args:
        backbone: The pretrained backbone.
        data: The city.
        options: How to train; its learning rate is not used.
        learning_rates: The grid.
        refit_steps: Steps of the last training, on all given days; 0 leaves it out.
        bars: Progress bars.
    """

    backbone: nn.Module
    data: CityData
    options: TrainingOptions
    learning_rates: Sequence[float]
    refit_steps: int
    bars: JobBars

    def measure(self, method: Method, title: str) -> Row:
        """Build a method's model, train it, and measure it.

        Args:
            method: The method.
            title: Words before its progress bar.

        Returns:
            The row's numbers under the names that :func:`stlora_peft.comparison.compare` lists.
        """
        if method.baseline is not None:
            return self._fit(method.baseline, title)
        daily = DailyErrors(self.data.test, self.data.city.steps_per_day)
        if method.build is None:
            val = evaluate_persistence(self.data.val, self.data)
            test = evaluate_persistence(self.data.test, self.data, daily=daily)
            return _row(test, daily, "last reading", best_val_mae=val.mae)
        if not method.trained:
            torch.manual_seed(0)  # what trains nothing is the same for every seed
            candidate = method.build(self.backbone, self.data)
            details = _sizes(candidate.model, trained=False)
            details["best_val_mae"] = self._errors(candidate.model, self.data.val).mae
        else:
            train = self._train_chosen if method.chooses else self._train
            candidate, details = train(method.build, title)
            details |= _sizes(candidate.model)
        return _row(self._errors(candidate.model, self.data.test, daily), daily, candidate.implementation, **details)

    def _fit(self, kind: type[Baseline], title: str) -> Row:
        """Fit a baseline on the given part, which holds the validation part: there is no error to choose by."""
        with self.bars.part(title) as progress:
            baseline = kind.fit(self.data, progress)
        daily = DailyErrors(self.data.test, self.data.city.steps_per_day)
        test = measure(baseline_batches(baseline, self.data.test), self.data.test.horizon, daily)
        return _row(test, daily, baseline.description)

    def _train(self, build: Build, title: str) -> tuple[Candidate, Row]:
        """Choose a rate by validation where there is a choice, and train on all given days with it."""
        tried = []
        if len(self.learning_rates) > 1 or not self.refit_steps:
            tried = [self._trained(build, title, learning_rate=rate) for rate in self.learning_rates]
        best = min(tried, key=lambda one: one.result.best_val_mae, default=None)
        details: Row = {"learning_rate": best.rate if best else self.learning_rates[0]}
        if best is not None:
            details |= {name: getattr(best.result, name) for name in ("best_val_mae", "best_epoch", "seconds_to_best")}
        if best is None or self.refit_steps:
            final = {"learning_rate": details["learning_rate"], "patience": None, "max_steps": self.refit_steps}
            best = self._trained(build, f"{title}, all given days", **final)
            tried.append(best)
        details |= {"seconds": best.result.seconds, "peak_memory": best.peak_memory}
        return best.candidate, details | {"search_seconds": sum(one.result.seconds for one in tried)}

    def _train_chosen(self, build: Build, title: str) -> tuple[Candidate, Row]:
        """Search the rate with the default form, choose the form with that rate, and train what was chosen."""
        seconds = 0.0
        rate = self.learning_rates[0]
        if len(self.learning_rates) > 1:
            tried = [self._trained(build, title, learning_rate=rate) for rate in self.learning_rates]
            rate = min(tried, key=lambda one: one.result.best_val_mae).rate
            seconds = sum(one.result.seconds for one in tried)
        choice = self._choose(title, rate)
        chosen = replace(self, learning_rates=[rate])
        candidate, details = chosen._train(_of_choice(choice), f"{title}, {choice.name}")
        details["search_seconds"] += seconds + choice.seconds
        return candidate, details | {"choice": choice.to_dict()}

    def _choose(self, title: str, rate: float) -> Choice:
        """Choose the form of an adapter."""
        options = replace(self.options, learning_rate=rate)
        return choose_conditioning(
            self.backbone, self.data, options, job=lambda part: self.bars.job(f"{title}, {part}")
        )

    def _trained(self, build: Build, title: str, **options: Any) -> _Training:
        """Train a fresh model; its first weights, and all else that is drawn, follow from the seed."""
        torch.manual_seed(self.options.seed)
        candidate = build(self.backbone, self.data)
        how = replace(self.options, progress=False, **options)
        with self.bars.job(f"{title}, rate {how.learning_rate:g}") as callbacks, PeakMemory() as memory:
            result = train(candidate.model, self.data, how, callbacks=callbacks)
        return _Training(candidate, result, how.learning_rate, memory.bytes)

    def _errors(self, model: nn.Module, windows: Windows, daily: DailyErrors | None = None) -> Metrics:
        """Measure a model."""
        return evaluate(model, windows, self.data, batch_size=self.options.eval_batch_size, daily=daily)


def _of_choice(choice: Choice) -> Build:
    """Build the chosen form."""

    def build(backbone: nn.Module, data: CityData) -> Candidate:
        return Candidate(build_adapter(backbone, data, **choice.settings), CHOSEN)

    return build


@dataclass(frozen=True)
class _Training:
    """A model that was trained, and how."""

    candidate: Candidate
    result: TrainingResult
    rate: float
    peak_memory: int | None


def _row(test: Metrics, daily: DailyErrors, implementation: str, **details: Any) -> Row:
    """Put the numbers of one run under their names."""
    row: Row = {
        "implementation": implementation,
        **test.average.to_dict(),
        "horizons": test.to_dict(),
        "daily": daily.to_list(),
        "best_val_mae": None,
        "best_epoch": None,
        "seconds_to_best": None,
        "learning_rate": None,
        "trainable_parameters": 0,
        "total_parameters": 0,
        "adapter_bytes": 0,
        "seconds": 0.0,
        "search_seconds": 0.0,
        "peak_memory": None,
        "choice": None,
    }
    return {name: _plain(value) for name, value in (row | details).items()}


def _plain(value: Any) -> Any:
    """None for a number that is not finite, which JSON cannot hold."""
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _sizes(model: nn.Module, trained: bool = True) -> Row:
    """Count a model's parameters and what is stored of it for the city."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {
        "trainable_parameters": sum(count for count, trains in counts if trains) if trained else 0,
        "total_parameters": sum(count for count, _ in counts),
        "adapter_bytes": adapter_bytes(model) if trained or isinstance(model, PeftModel) else 0,
    }
