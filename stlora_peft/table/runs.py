"""The trainings and fits behind a table, each kept as soon as it is done."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stlora_peft.backbones import new_backbone
from stlora_peft.baselines import BASELINES, baseline_batches
from stlora_peft.callbacks import JobBars
from stlora_peft.data import City, CityData
from stlora_peft.errors import message
from stlora_peft.evaluation import evaluate, measure
from stlora_peft.files import read_json, write_json
from stlora_peft.methods import build_adapter
from stlora_peft.metrics import Metrics
from stlora_peft.provenance import source_commit
from stlora_peft.sources import described
from stlora_peft.storage import load_backbone, save_adapter, save_backbone
from stlora_peft.table.plan import Plan
from stlora_peft.training import train

Row = dict[str, Any]
RESULTS, ROWS, MODELS = "results.json", "rows.json", "models"
LONGER = "-longer"
"""End of the name of a backbone that was trained on for as many steps as its adapter took."""


def make_table(cities: Sequence[City], plan: Plan, output_dir: str | os.PathLike[str]) -> list[Row]:
    """Measure every row of a table, or read those that are there already.

    Each seed of a backbone on a city means up to four trainings with one budget: the backbone from scratch; the same
    first weights with an adapter, both from scratch (**joint**); an adapter on the trained and frozen backbone
    (**adapt**); and, as its control, the trained backbone alone for as many steps as that adapter took. The rows of a
    backbone, the trained backbone and the adapter on it are kept in a folder of their own, so an interrupted table
    goes on where it stopped, and several programs may fill one folder at once, each with other cities or other
    backbones.

    Args:
        cities: Cities with different names.
        plan: What to compare.
        output_dir: Folder for ``results.json`` and, under ``models``, the trained backbones and their adapters.

    Returns:
        Rows with the keys ``city``, ``regime``, ``model``, ``stlora``, ``seed``, and ``mae``, ``rmse``, ``mape``,
        each by the steps ``"3"``, ``"6"``, ``"12"`` and ``"average"``; ``settings``, a hash of all that a row depends
        on but its seed; ``commit``, that of the code which measured it, where it lies in git. Those of backbones also
        have ``parameters``, ``trainable_parameters``, ``best_val_mae``, ``best_epoch``, ``epochs`` and ``seconds``
        (of the training since it was last taken up). A baseline has no seed: its numbers stand in every regime and
        for every seed. ``model`` is ``"NAME-longer"`` for the control.

    Raises:
        ValueError: If two cities have one name, a city has too few steps, or the folder holds rows of other settings.
        ImportError: If a baseline or a backbone needs a package that is not installed.
    """
    _check_names(cities)
    for name in plan.baselines:
        BASELINES[name].require_packages()
    total = len(cities) * (len(plan.baselines) + len(plan.backbones) * len(plan.seeds) * (1 + _trainings(plan)))
    bars = JobBars("table", total=total, show=plan.options.progress)
    parts = [part for city in cities for part in _parts(city, plan, Path(output_dir, MODELS, city.name), bars)]
    for part in parts:
        part.check()  # before the first hour of work
    with bars:
        rows = [row for part in parts for row in part.rows()]
    write_json(Path(output_dir) / RESULTS, rows)
    return rows


def _parts(city: City, plan: Plan, folder: Path, bars: JobBars) -> list[_Rows]:
    """What is measured on a city, in the order of the table."""
    data = plan.data(city)
    baselines: list[_Rows] = [_BaselineRows(name, folder / name, data, plan, bars) for name in plan.baselines]
    return baselines + [
        _BackboneRows(name, folder / f"{name}-seed{seed}", data, plan, bars, seed)
        for name in plan.backbones
        for seed in plan.seeds
    ]


def _trainings(plan: Plan) -> int:
    """Trainings that follow that of the backbone."""
    return ("joint" in plan.regimes) + 2 * ("adapt" in plan.regimes)


@dataclass(frozen=True)
class _Rows:
    """What is measured of one model on one city; the jobs that are done are kept in a folder."""

    name: str
    folder: Path
    data: CityData
    plan: Plan
    bars: JobBars

    @cached_property
    def settings(self) -> str:
        """Hash of all that the rows depend on."""
        return self.plan.settings(self.data, self.name)

    @cached_property
    def done(self) -> dict[str, Row]:
        """Numbers by job, those of an earlier run to begin with."""
        file = self.folder / ROWS
        return dict(read_json(file)["jobs"]) if file.exists() else {}

    def check(self) -> None:
        """Refuse a folder with rows of other settings, and write down those of the work to come."""
        file = self.folder / ROWS
        kept = read_json(file) if file.exists() else {"settings": self.settings, "jobs": {}}
        found = kept.get("settings") if isinstance(kept, dict) and "jobs" in kept else None
        if found != self.settings:
            raise ValueError(
                message(
                    f"rows '{file}' cannot be continued",
                    expected=f"rows of the settings {self.settings} (city, sizes, options)",
                    got="something else" if found is None else f"rows of {found}",
                    fix=f"give another output folder, or delete '{self.folder}' to measure it again",
                )
            )
        if not file.exists():
            write_json(file, kept)

    def rows(self) -> list[Row]:
        """Do what has not been done, and label all of it."""
        raise NotImplementedError

    def numbers(self, job: str) -> Row:
        """Numbers of a job, which is done where it has not been."""
        if job not in self.done:
            self.done[job] = self.measure(job) | {"commit": source_commit()}
            write_json(self.folder / ROWS, {"settings": self.settings, "jobs": self.done})
            shutil.rmtree(self.folder / f"{job}.unfinished", ignore_errors=True)
        row = self.done[job]
        mae = row["mae"]["average"]
        text = "not finite" if mae is None else f"{mae:.4g}"
        self.bars.advance(f"{self.title(job)}: test MAE {text}")
        return row

    def title(self, job: str) -> str:
        """Call a job."""
        return f"{self.data.city.name}, {self.name}, {job}"

    def measure(self, job: str) -> Row:
        """Do a job."""
        raise NotImplementedError

    def row(self, regime: str, seed: int, job: str, model: str, *, stlora: bool = False) -> Row:
        """Put the label of a row before its numbers."""
        label = {"city": self.data.city.name, "regime": regime, "model": model, "stlora": stlora, "seed": seed}
        return {**label, **self.done[job], "settings": self.settings}


@dataclass(frozen=True)
class _BaselineRows(_Rows):
    """A baseline."""

    def rows(self) -> list[Row]:
        """The same numbers in every regime and for every seed."""
        self.numbers("fit")
        return [self.row(regime, seed, "fit", self.name) for regime in self.plan.regimes for seed in self.plan.seeds]

    def measure(self, job: str) -> Row:
        """Fit it on the training part."""
        with self.bars.part(self.title(job)) as progress:
            baseline = BASELINES[self.name].fit(self.data, progress)
        return _errors(measure(baseline_batches(baseline, self.data.test), self.data.test.horizon))


@dataclass(frozen=True)
class _BackboneRows(_Rows):
    """A backbone with one seed, without and with an adapter."""

    seed: int

    def rows(self) -> list[Row]:
        """Rows of every regime, those of the backbone alone first."""
        self.numbers("backbone")
        found = []
        for regime in self.plan.regimes:
            found.append(self.row(regime, self.seed, "backbone", self.name))
            self.numbers(regime)
            if regime == "adapt":
                self.numbers("longer")
                found.append(self.row(regime, self.seed, "longer", self.name + LONGER))
            found.append(self.row(regime, self.seed, regime, self.name, stlora=True))
        return found

    def title(self, job: str) -> str:
        """Call a job."""
        return f"{super().title(job)}, seed {self.seed}"

    def measure(self, job: str) -> Row:
        """Train what a job is about, and forecast the test part with what validated best."""
        torch.manual_seed(self.seed)
        model, options = self.untrained(job), replace(self.plan.options, seed=self.seed, progress=False)
        if job == "longer":
            epochs = self.done["adapt"]["epochs"]
            options = replace(options, max_epochs=epochs, patience=epochs)
        unfinished = self.folder / f"{job}.unfinished"
        with self.bars.job(self.title(job)) as callbacks:
            result = train(model, self.data, options, output_dir=unfinished, callbacks=callbacks)
        self.save(job, model)
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        return {
            **_errors(evaluate(model, self.data.test, self.data, batch_size=options.eval_batch_size)),
            "best_val_mae": result.best_val_mae if math.isfinite(result.best_val_mae) else None,
            "best_epoch": result.best_epoch,
            "epochs": result.epochs,
            "seconds": round(result.seconds, 3),
            "parameters": sum(count for count, _ in counts),
            "trainable_parameters": sum(count for count, trains in counts if trains),
        }

    def untrained(self, job: str) -> nn.Module:
        """Build the model that a job trains."""
        if job in ("backbone", "joint"):
            sizes = self.plan.sizes.get(self.name, {})
            backbone = new_backbone(self.name, self.data, seed=self.seed, **sizes)
        else:
            backbone = load_backbone(self.folder).backbone
        if job in ("backbone", "longer"):
            return backbone
        return build_adapter(backbone, self.data, same_city=True, freeze_backbone=job == "adapt")

    def save(self, job: str, model: Any) -> None:
        """Keep the trained backbone, and the adapter that needs nothing but it."""
        if job == "backbone":
            save_backbone(self.folder, model, **described([self.data]))
        if job == "adapt":
            save_adapter(self.folder / "adapter", model)


def _errors(metrics: Metrics) -> Row:
    """Errors by name, and then by step."""
    steps = metrics.to_dict()
    return {name: {step: scores[name] for step, scores in steps.items()} for name in ("mae", "rmse", "mape")}


def _check_names(cities: Sequence[City]) -> None:
    """Refuse a table without cities, or with two of one name."""
    names = [city.name for city in cities]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            message(
                "cities of a table cannot be told apart" if names else "a table needs a city",
                expected="at least one city, each with a name of its own",
                got=", ".join(names) or "none",
                fix="leave one out, or name it otherwise: 'stlora convert' names a city after the file that it writes",
            )
        )
