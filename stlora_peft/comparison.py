"""Comparison of methods over seeds on one city, on equal terms and resumable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from torch import nn

from stlora_peft.callbacks import JobBars
from stlora_peft.data import City, CityData, adaptation_split, prepare
from stlora_peft.data.city import hash_with_city
from stlora_peft.errors import message
from stlora_peft.evaluation import check_fit
from stlora_peft.files import read_json, write_json
from stlora_peft.measurement import Row, Run
from stlora_peft.methods import Method, find_methods
from stlora_peft.provenance import source_commit
from stlora_peft.storage import SavedBackbone
from stlora_peft.training import TrainingOptions

REFIT_STEPS = 600
RESULTS = "results.json"
# Options that the rows of one table may differ in.
_NOT_SHARED = (
    "learning_rate",
    "seed",
    "progress",
    "eval_batch_size",
    "cache_frozen",
)


def compare(
    saved: SavedBackbone,
    city: City,
    *,
    days: float | None,
    methods: Sequence[str] = ("zero-shot", "head", "full", "lora", "st-lora"),
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] = (1e-3, 3e-3),
    options: TrainingOptions | None = None,
    refit_steps: int = REFIT_STEPS,
    output_dir: str | os.PathLike[str] | None = None,
    known: Sequence[Row] = (),
) -> list[Row]:
    """Adapt a backbone to a city by several methods and measure each on the city's test part.

    Every method starts from the same pretrained weights and has the same optimiser, batches, budget and early
    stopping. With the first seed each is trained once with every learning rate of one grid, the last quarter of the
    given days validating. With the rate of the lowest validation error it is then trained anew with each seed, on all
    given days and for ``refit_steps`` steps: what validates is the most recent quarter, and of a single day all that
    the evening has to teach. The test part is looked at once, by that model.

    Args:
        saved: The pretrained backbone.
        city: The city to bring it to.
        days: Days of the city that are given, the last quarter of them for validation; None gives all before the
            test part.
        methods: Names of :data:`stlora_peft.methods.METHODS`.
        seeds: Seeds; each starts adapters, the order of the windows and dropout. The first one chooses the rate.
        learning_rates: The grid.
        options: How to train; its ``learning_rate`` and ``seed`` are not used.
        refit_steps: Steps of the last training, on all given days. It is the only one where the grid has one rate. 0
            leaves it out: the model that validated best is tested.
        output_dir: Folder for ``results.json``, which is written after every row. Rows that it holds already are not
            measured again.
        known: Rows that were measured elsewhere. Those of the same settings, days and recipe of their method are not
            measured again; others are passed over.

    Returns:
        One row for each method and seed, with the keys ``method``, ``implementation``, ``days``, ``seed``, ``mae``,
        ``rmse``, ``mape`` (the averages), ``horizons`` (the same at steps 3, 6, 12 and ``average``), ``daily`` (sums
        of absolute errors and their counts by day, see :mod:`stlora_peft.significance`), ``learning_rate``,
        ``best_val_mae`` and ``best_epoch`` (None where nothing validated), ``seconds_to_best`` (wall time to that
        epoch), ``trainable_parameters``, ``total_parameters``, ``seconds`` (the training that counts),
        ``search_seconds`` (all trainings), ``peak_memory`` (bytes that the training that counts took at most beyond
        those in use before; None where the system does not say), ``adapter_bytes`` (what the city needs on disk
        beside the backbone), ``choice`` (what was chosen and what each candidate was worth, see
        :meth:`stlora_peft.selection.Choice.to_dict`; None where nothing was), ``settings`` (a hash of everything that
        the rows of one table share), ``recipe`` (a hash of what the rows of one method share: what is trained, the
        adapter's configuration) and ``commit`` (of the package's source; None where it is not a repository).

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
    settings = _settings(saved, city, options, [*learning_rates, refit_steps])
    recipes = {name: _recipe(method, saved.backbone, data) for name, method in chosen.items()}
    file = None if output_dir is None else Path(output_dir) / RESULTS
    known = [row for row in known if (row["settings"], row["days"]) == (settings, days)]
    rows = [row for row in known if (row["method"], row["recipe"]) in {(name, recipes[name][0]) for name in chosen}]
    rows += [] if file is None else _earlier_rows(file, settings, recipes)
    measured = {(row["method"], row["days"], row["seed"]): row for row in rows}
    if file is not None and rows:
        write_json(file, list(measured.values()))
    jobs = [(name, days, seed) for name in chosen for seed in seeds]
    with JobBars("compare", total=len(jobs), show=options.progress) as bars:
        for name, _, seed in jobs:
            if (name, days, seed) not in measured:
                first = measured.get((name, days, seeds[0]), {}).get("learning_rate")
                rates = learning_rates if first is None else [first]
                run = Run(saved.backbone, data, replace(options, seed=seed), rates, refit_steps, bars)
                found = run.measure(chosen[name], f"{name}, seed {seed}")
                shared = {"settings": settings, "recipe": recipes[name][0], "commit": source_commit()}
                measured[name, days, seed] = {"method": name, "days": days, "seed": seed, **found, **shared}
                if file is not None:
                    write_json(file, list(measured.values()))
            mae = measured[name, days, seed]["mae"]
            bars.advance(f"{name}, seed {seed}: test MAE " + ("not finite" if mae is None else f"{mae:.4g}"))
    return [measured[job] for job in jobs]


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


def _settings(saved: SavedBackbone, city: City, options: TrainingOptions, learning_rates: Sequence[float]) -> str:
    """Hash everything that the rows of one table must share."""
    shared = options.chosen(*_NOT_SHARED)
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
