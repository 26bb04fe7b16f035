"""Comparison of methods over seeds on one city, on equal terms and resumable."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import nn

from stlora_peft.baselines import Baseline, baseline_batches
from stlora_peft.callbacks import JobBars
from stlora_peft.checkpoints import trainable_state
from stlora_peft.data import City, CityData, Windows, adaptation_split, prepare
from stlora_peft.data.city import hash_with_city
from stlora_peft.errors import message
from stlora_peft.evaluation import check_fit, evaluate, evaluate_persistence, measure
from stlora_peft.files import read_json, write_json
from stlora_peft.methods import Build, Candidate, Method, find_methods
from stlora_peft.metrics import Metrics
from stlora_peft.storage import ADAPTER_WEIGHTS, SavedBackbone, save_adapter
from stlora_peft.tensorfiles import tensors_to_bytes
from stlora_peft.training import TrainingOptions, TrainingResult, train

Row = dict[str, Any]
RESULTS = "results.json"
_NOT_SHARED = ("learning_rate", "seed", "progress", "eval_batch_size")  # options that rows of one table may differ in


def compare(
    saved: SavedBackbone,
    city: City,
    *,
    days: float | None,
    methods: Sequence[str] = ("zero-shot", "head", "full", "lora", "st-lora"),
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] = (1e-3, 3e-3),
    options: TrainingOptions | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> list[Row]:
    """Adapt a backbone to a city by several methods and measure each on the city's test part.

    Every method starts from the same pretrained weights and has the same optimiser, batches, budget and early
    stopping. Each is trained once with every learning rate of one grid; the one with the lowest validation error
    counts. The test part is looked at once, by the model that was chosen.

    Args:
        saved: The pretrained backbone.
        city: The city to bring it to.
        days: Days of the city that are given, the last quarter of them for validation; None gives all before the
            test part.
        methods: Names of :data:`stlora_peft.methods.METHODS`.
        seeds: Seeds; each starts adapters, the order of the windows and dropout.
        learning_rates: The grid.
        options: How to train; its ``learning_rate`` and ``seed`` are not used.
        output_dir: Folder for ``results.json``, which is written after every row. Rows that it holds already are not
            measured again.

    Returns:
        One row for each method and seed, with the keys ``method``, ``implementation``, ``days``, ``seed``, ``mae``,
        ``rmse``, ``mape`` (the averages), ``horizons`` (the same at steps 3, 6, 12 and ``average``),
        ``learning_rate``, ``best_val_mae`` (None where all given days were fitted), ``best_epoch``,
        ``trainable_parameters``, ``total_parameters``, ``seconds`` (the training that counts), ``search_seconds``
        (the whole grid), ``adapter_bytes`` (what the city needs on disk beside the backbone), ``settings`` (a hash
        of everything that the rows of one table share) and ``recipe`` (a hash of what the rows of one method share:
        what is trained, the adapter's configuration).

    Raises:
        ValueError: If a method is unknown, a list is empty, the backbone does not fit the city, or ``output_dir``
            holds rows that were measured under other settings or by another recipe of the method.
        ImportError: If a baseline needs a package that is not installed.
    """
    options = options or TrainingOptions()
    chosen = find_methods(methods)
    for kind in (method.baseline for method in chosen.values()):
        if kind is not None:
            kind.require_packages()
    _check_not_empty(seeds=seeds, learning_rates=learning_rates)
    data = adaptation_data(saved, city, days)
    check_fit(saved.backbone, data.train)
    settings = _settings(saved, city, options, learning_rates)
    recipes = {name: _recipe(method, saved.backbone, data) for name, method in chosen.items()}
    file = None if output_dir is None else Path(output_dir) / RESULTS
    rows = [] if file is None else _earlier_rows(file, settings, recipes)
    known = {(row["method"], row["days"], row["seed"]): row for row in rows}
    jobs = [(name, days, seed) for name in chosen for seed in seeds]
    with JobBars("compare", total=len(jobs), show=options.progress) as bars:
        for name, _, seed in jobs:
            if (name, days, seed) not in known:
                run = _Run(saved.backbone, data, replace(options, seed=seed), learning_rates, bars)
                found = run.measure(chosen[name], f"{name}, seed {seed}")
                shared = {"settings": settings, "recipe": recipes[name][0]}
                known[name, days, seed] = {"method": name, "days": days, "seed": seed, **found, **shared}
                if file is not None:
                    write_json(file, list(known.values()))
            mae = known[name, days, seed]["mae"]
            bars.advance(f"{name}, seed {seed}: test MAE " + ("not finite" if mae is None else f"{mae:.4g}"))
    return [known[job] for job in jobs]


def adaptation_data(saved: SavedBackbone, city: City, days: float | None) -> CityData:
    """Prepare a city for a backbone: its window, horizon and time features, and the given days.

    Args:
        saved: The pretrained backbone.
        city: The city to bring it to.
        days: Days that are given; None gives all before the test part.

    Returns:
        The city's windows, with a scaler from the given days only.
    """
    split = adaptation_split(city.num_steps, city.steps_per_day, days)
    return prepare(
        city,
        split,
        window=saved.backbone.window,
        horizon=saved.backbone.horizon,
        time_features=saved.time_features,
    )


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
class _Run:
    """What the runs of all methods with one seed share."""

    backbone: nn.Module
    data: CityData
    options: TrainingOptions
    learning_rates: Sequence[float]
    bars: JobBars

    def measure(self, method: Method, title: str) -> Row:
        """Build a method's model, train it with each learning rate, and measure the one that validates best."""
        if method.baseline is not None:
            return self.fit(method.baseline, title)
        if method.build is None:
            val, test = (evaluate_persistence(part, self.data) for part in (self.data.val, self.data.test))
            return _row(test, val.mae, "last reading")
        if not method.trained:
            candidate = method.build(self.backbone, self.data)
            val, test = (self.errors(candidate.model, part) for part in (self.data.val, self.data.test))
            return _row(test, val.mae, candidate.implementation, _sizes(candidate.model, trained=False))
        trained = [self.train(method.build, rate, title) for rate in self.learning_rates]
        candidate, result, rate = min(trained, key=lambda one: one[1].best_val_mae)
        details = {
            "learning_rate": rate,
            "best_epoch": result.best_epoch,
            "seconds": round(result.seconds, 3),
            "search_seconds": round(sum(one[1].seconds for one in trained), 3),
        }
        test = self.errors(candidate.model, self.data.test)
        return _row(test, result.best_val_mae, candidate.implementation, {**_sizes(candidate.model), **details})

    def fit(self, kind: type[Baseline], title: str) -> Row:
        """Fit a baseline on the given part, which holds the validation part: there is no error to choose by."""
        with self.bars.part(title) as progress:
            baseline = kind.fit(self.data, progress)
        test = measure(baseline_batches(baseline, self.data.test), self.data.test.horizon)
        return _row(test, math.nan, baseline.description)

    def train(self, build: Build, rate: float, title: str) -> tuple[Candidate, TrainingResult, float]:
        """Train a fresh model; its first weights, and all else that is drawn, follow from the seed."""
        torch.manual_seed(self.options.seed)
        candidate = build(self.backbone, self.data)
        options = replace(self.options, learning_rate=rate, progress=False)
        with self.bars.job(f"{title}, rate {rate:g}") as callbacks:
            return candidate, train(candidate.model, self.data, options, callbacks=callbacks), rate

    def errors(self, model: nn.Module, windows: Windows) -> Metrics:
        """Measure a model."""
        return evaluate(model, windows, self.data, batch_size=self.options.eval_batch_size)


def _row(test: Metrics, val_mae: float, implementation: str, details: Row | None = None) -> Row:
    """Put the numbers of one run under their names."""
    row: Row = {
        "implementation": implementation,
        **test.average.to_dict(),
        "horizons": test.to_dict(),
        "best_val_mae": val_mae if math.isfinite(val_mae) else None,
        "best_epoch": None,
        "learning_rate": None,
        "trainable_parameters": 0,
        "total_parameters": 0,
        "adapter_bytes": 0,
        "seconds": 0.0,
        "search_seconds": 0.0,
    }
    return row | (details or {})


def _sizes(model: nn.Module, trained: bool = True) -> Row:
    """Count a model's parameters and what is stored of it for the city."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {
        "trainable_parameters": sum(count for count, trains in counts if trains) if trained else 0,
        "total_parameters": sum(count for count, _ in counts),
        "adapter_bytes": adapter_bytes(model) if trained else 0,
    }


def _settings(saved: SavedBackbone, city: City, options: TrainingOptions, learning_rates: Sequence[float]) -> str:
    """Hash everything that the rows of one table must share."""
    shared = {name: value for name, value in asdict(options).items() if name not in _NOT_SHARED}
    return hash_with_city([saved.fingerprint, saved.time_features, shared, list(learning_rates)], city)


def _recipe(method: Method, backbone: nn.Module, data: CityData) -> tuple[str, str]:
    """Hash how a method is realised on this backbone, and say it in words."""
    if method.build is None:
        return method.description, method.description
    candidate = method.build(backbone, data)
    return candidate.recipe, candidate.implementation


def _earlier_rows(file: Path, settings: str, recipes: dict[str, tuple[str, str]]) -> list[Row]:
    """Read the rows of an earlier run, which must be one of the same settings and the same recipes."""
    if not file.exists():
        return []
    rows = read_json(file)
    keys = {"method", "days", "seed", "settings", "recipe", "implementation"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
        _refuse(file, "a list of rows with the keys " + ", ".join(sorted(keys)), "something else")
    others = sorted({row["settings"] for row in rows} - {settings})
    if others:
        _refuse(file, f"rows of the settings {settings} (backbone, city, options)", f"rows of {', '.join(others)}")
    for row in rows:
        recipe, implementation = recipes.get(row["method"], (row["recipe"], ""))
        if row["recipe"] != recipe:
            expected = f"rows of '{row['method']}' by the recipe {recipe} ({implementation})"
            _refuse(file, expected, f"rows by {row['recipe']} ({row['implementation']})")
    return list(rows)


def _refuse(file: Path, expected: str, got: str) -> NoReturn:
    """Raise the error of results that cannot be continued."""
    raise ValueError(
        message(
            f"results '{file}' cannot be continued",
            expected=expected,
            got=got,
            fix="give another output folder, or delete the file to measure everything again",
        )
    )


def _check_not_empty(**lists: Sequence[float]) -> None:
    """Refuse an empty list."""
    for name, values in lists.items():
        if not values:
            raise ValueError(message(f"no {name} were given", expected="at least one", got="none", fix="name some"))
