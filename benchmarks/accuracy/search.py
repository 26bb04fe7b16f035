"""The search for better defaults: what was tried on the steps between the given days and the test part.

    python benchmarks/accuracy/search.py [--arms LIST] [--pairs LIST] [--days LIST] [--seeds LIST] ...
    python benchmarks/accuracy/search.py --again ...   measure known rows a second time and note what came out
    python benchmarks/accuracy/search.py --report      only write the page of what has been measured

An arm is what is trained (``search_arms.py``); a training says which of the given windows train and when it stops
(``TRAININGS`` below). Every row is kept as soon as it is measured: an interrupted search goes on where it stopped. The
test part is not looked at. Writes ``search.json`` beside this file and ``docs/tried.md``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import torch  # noqa: E402 - the folders above come first
from cities import SETTINGS  # noqa: E402
from run import PRETRAINING, ROOT, chosen_settings, pretrained  # noqa: E402
from search_arms import ARMS, Arm  # noqa: E402
from search_fit import fit  # noqa: E402
from search_report import write_page  # noqa: E402

from stlora_peft.data import City, CityData, adaptation_split, prepare  # noqa: E402
from stlora_peft.evaluation import evaluate  # noqa: E402
from stlora_peft.files import read_json, write_json  # noqa: E402
from stlora_peft.provenance import environment, source_commit  # noqa: E402
from stlora_peft.significance import DailyErrors  # noqa: E402
from stlora_peft.storage import SavedBackbone  # noqa: E402
from stlora_peft.training import TrainingOptions, train  # noqa: E402

Row = dict[str, Any]
ROWS = FOLDER / "search.json"
KEY = ("pair", "backbone", "base", "days", "training", "arm", "rate", "seed")
"""What tells rows apart; ``base`` is the fingerprint of the backbone's weights."""

TRAININGS = {
    "all": "all given windows, a fixed number of steps",
    "last quarter": "early stopping on the last quarter of the given days",
    "blocks": "early stopping on blocks of three hours, every fourth",
    "development": "all given windows, early stopping on the development part itself: an upper bound",
}
EARLY_STOPPING = TrainingOptions(max_epochs=40, patience=8, progress=False)
MEASURED = 300
"""Windows of the development part that are forecast, evenly spread."""


@dataclass(frozen=True)
class Job:
    """One row to measure; the names are those of ``KEY``."""

    pair: str
    backbone: str
    base: str
    days: float
    training: str
    arm: str
    rate: float
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it apart."""
        return tuple(getattr(self, name) for name in KEY)


def main() -> None:
    """Measure what is asked for and has not been measured, then write the page."""
    options = read_options()
    torch.set_num_threads(options.threads)
    rows: list[Row] = read_json(ROWS)["rows"] if ROWS.exists() else []
    for pair, setting in {} if options.report else chosen_settings(options.pairs).items():
        missing = [file for file in setting.files if not (options.data / file).exists()]
        if missing:
            print(f"{pair} is skipped: {', '.join(missing)} not in '{options.data}'; pass the folder with --data")
            continue
        sources, target = setting.load(options.data)
        source = sources[0] if isinstance(sources, tuple) else sources
        for backbone in options.backbones.split(","):
            folder = options.runs / "accuracy" / pair / backbone / "base"
            saved = pretrained(backbone, sources, PRETRAINING, folder)
            for job in jobs(pair, backbone, saved.fingerprint, options):
                known = next((row for row in rows if tuple(row[name] for name in KEY) == job.key), None)
                if (known is None) != options.again:
                    found = measure(job, saved, source, target, [int(step) for step in options.steps.split(",")])
                    print(f"{pair} {job.days:g} {job.training} {job.arm} {job.rate:g} {job.seed}: {found['mae']}")
                    if known is None:
                        rows.append(found)
                    else:
                        known["again"] = known.get("again", {}) | found["mae"]
                    write_json(ROWS, {"environment": environment(), "rows": rows})
    if not rows:
        sys.exit("nothing has been measured")
    write_page(rows, ROOT / "docs" / "tried.md", {name: setting.title for name, setting in SETTINGS.items()})


def jobs(pair: str, backbone: str, base: str, options: argparse.Namespace) -> Iterator[Job]:
    """Rows that the command line asks for; what is not trained has one row."""
    seeds, rates = ([kind(word) for word in words.split(",")] for kind, words in _numbers(options))
    asked = itertools.product(options.days.split(","), options.training.split(","), options.arms.split(","))
    for days, training, arm in asked:
        if ARMS[arm].trained:
            for rate, seed in itertools.product(rates, seeds):
                yield Job(pair, backbone, base, float(days), training, arm, rate, seed)
        elif training == "all":
            yield Job(pair, backbone, base, float(days), training, arm, 0.0, 0)


def _numbers(options: argparse.Namespace) -> tuple[tuple[type, str], ...]:
    return (int, options.seeds), (float, options.rates)


def measure(job: Job, saved: SavedBackbone, source: City, target: City, steps: Sequence[int]) -> Row:
    """Train an arm and measure it on the development part."""
    arm, began = ARMS[job.arm], time.perf_counter()
    data = training_data(development(target, saved, job.days), job.training)
    torch.manual_seed(job.seed)
    model = arm.build(saved, data, source)
    mae = {"0": round(evaluate(model, data.test, data).mae, 4)}
    found = trained(model, data, arm, job, steps) if arm.trained else {}
    return {
        **dict(zip(KEY, job.key, strict=True)),
        "mae": mae | {step: round(float(daily.sums.sum() / daily.counts.sum()), 4) for step, daily in found.items()},
        "daily": {step: daily.to_list() for step, daily in list(found.items())[-1:]},
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "seconds": round(time.perf_counter() - began, 1),
        "commit": source_commit() or "none",
    }


def trained(
    model: torch.nn.Module, data: CityData, arm: Arm, job: Job, steps: Sequence[int]
) -> dict[str, DailyErrors]:
    """Errors on the development part, by the number of steps or of the state that early stopping kept."""
    if job.training == "all":
        found = fit(model, data, steps, job.rate, job.seed, node_rate=arm.node_rate, weight_decay=arm.weight_decay)
        return {str(step): daily for step, daily in found.items()}
    result = train(model, data, replace(EARLY_STOPPING, learning_rate=job.rate, seed=job.seed))
    print(f"best of {result.epochs} epochs is {result.best_epoch}")
    daily = DailyErrors(data.test, data.city.steps_per_day)
    evaluate(model, data.test, data, daily=daily)
    return {"best": daily}


def development(target: City, saved: SavedBackbone, days: float) -> CityData:
    """Prepare a target whose test part is replaced by what lies between it and the given days."""
    split = adaptation_split(target.num_steps, target.steps_per_day, days)
    split = replace(split, test=range(split.given.stop, split.test.start))
    sizes = {"window": saved.backbone.window, "horizon": saved.backbone.horizon}
    data = prepare(target, split, **sizes, time_features=saved.time_features)
    every = max(1, len(data.test) // MEASURED)
    return replace(data, test=data.test.at(data.test.starts[::every]))


def training_data(data: CityData, training: str) -> CityData:
    """Choose which windows train and which validate.

    Args:
        data: A city.
        training: One of ``TRAININGS``.
    """
    if training == "blocks":
        return _blocks(data)
    return data if training == "last quarter" else replace(data, train=data.given, val=data.test)


def _blocks(data: CityData, hours: int = 3, every: int = 4) -> CityData:
    """Let every fourth block of three hours validate, moved by one from day to day; no target is in both."""
    given, windows = data.split.given, data.given
    steps = torch.arange(len(given))
    block = steps // round(hours * data.city.steps_per_day / 24)
    validates = (block + block // (24 // hours)) % every == 2
    targets = windows.starts[:, None] + windows.window + torch.arange(windows.horizon)
    inside = validates[targets - given.start]
    train, val = windows.starts[~inside.any(1)], windows.starts[inside.all(1)]
    return replace(data, train=windows.at(train), val=windows.at(val))


def read_options() -> argparse.Namespace:
    """Read the command line; an unknown arm or training ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--pairs", default="unlike,la-shenzhen,west-east")
    parser.add_argument("--backbones", default="stgcn")
    parser.add_argument("--days", default="1,3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rates", default="0.003")
    parser.add_argument("--steps", default="150,300,600", help="numbers of steps after which the error is measured")
    parser.add_argument("--training", default="all", help=", ".join(f"'{name}'" for name in TRAININGS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    for name, known in (("arms", ARMS), ("training", TRAININGS)):
        unknown = sorted(set(getattr(options, name).split(",")) - set(known))
        if unknown:
            sys.exit(f"unknown {name} {', '.join(unknown)}; known are {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
