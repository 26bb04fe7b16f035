"""Ways to bring a backbone to another city, on real and simulated cities: what the defaults stand on.

    python benchmarks/accuracy/run.py [--settings LIST] [--backbones LIST] [--days LIST] [--methods LIST] ...
    python benchmarks/accuracy/run.py --quick     a small pair, in minutes; fails unless st-lora is ahead
    python benchmarks/accuracy/run.py --report    only write the tables and the picture of what has been measured

Every row is kept as soon as it is measured, in ``runs/accuracy``: an interrupted run goes on where it stopped, and
several runs of different settings fill one folder side by side. The committed rows, those in ``rows``, are not
measured again where backbone, city, options and recipe of the method are the same. Settings whose cities are not there
are skipped by name. Writes a file for each setting in ``rows``, ``results.md`` and ``results.png`` beside this file.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import torch  # noqa: E402 - the folders above come first
from cities import QUICK, SETTINGS, Cities, Setting  # noqa: E402
from report import check_quick, committed_rows, write_report  # noqa: E402

from stlora_peft.backbones import new_backbone  # noqa: E402
from stlora_peft.comparison import compare  # noqa: E402
from stlora_peft.data import prepare, pretraining_split  # noqa: E402
from stlora_peft.sources import described  # noqa: E402
from stlora_peft.storage import SavedBackbone, load_backbone, save_backbone  # noqa: E402
from stlora_peft.training import TrainingOptions, train  # noqa: E402

ROOT = FOLDER.parents[1]
METHODS = (
    "zero-shot,persistence,ha,scratch,head,norm,full,ia3,dora,lora,node-embedding,node-prompt,full+node-embedding,"
    "full+st-lora,st-lora,st-lora-gate,st-lora-core,st-lora-full,st-lora-bias,st-lora-embedding-layers,"
    "st-lora-predictor"
)
SEARCH = TrainingOptions(max_epochs=20, patience=5)
PRETRAINING = TrainingOptions(learning_rate=3e-3, max_epochs=24, patience=8, batch_size=64)


@dataclass(frozen=True)
class Plan:
    """What is measured in every setting."""

    backbones: Sequence[str]
    days: Sequence[float | None]
    methods: Sequence[str]
    seeds: Sequence[int]
    learning_rates: Sequence[float] = (1e-3, 3e-3)
    refit_steps: int = 600
    pretraining: TrainingOptions = PRETRAINING
    search: TrainingOptions = SEARCH


SMALL = Plan(
    ["stgcn"],
    [3],
    ["zero-shot", "lora", "st-lora"],
    [0, 1],
    learning_rates=[3e-3],
    refit_steps=300,
    pretraining=TrainingOptions(learning_rate=3e-3, max_epochs=6, batch_size=64),
)


def main() -> None:
    """Measure what is asked for and has not been measured, then write the report."""
    options = read_options()
    torch.set_num_threads(options.threads)
    if options.quick:
        with TemporaryDirectory() as folder:  # rows of an earlier state of the code would be no check
            for name, setting in QUICK.items():
                measure(setting, SMALL, options.data, Path(folder) / name)
            check_quick(Path(folder))
        return
    runs = options.runs / "accuracy"
    for name, setting in ({} if options.report else chosen_settings(options.settings)).items():
        missing = [file for file in setting.files if not (options.data / file).exists()]
        if missing:
            print(f"{name} is skipped: {', '.join(missing)} not in '{options.data}'; pass the folder with --data")
        else:
            measure(setting, plan_of(options), options.data, runs / name)
    write_report(runs, FOLDER, {name: setting.title for name, setting in SETTINGS.items()})


def measure(setting: Setting, plan: Plan, data: Path, folder: Path) -> None:
    """Compare the methods in one setting, for every backbone and number of days."""
    source, target = setting.load(data)
    most = 0.8 * target.num_steps / target.steps_per_day
    for backbone in plan.backbones:
        saved = pretrained(backbone, source, plan.pretraining, folder / backbone / "base")
        for days in plan.days:
            if days is not None and days > most:
                print(f"{folder.name}: {days:g} days is skipped, the record gives {most:.2g} before its test part")
                continue
            known = committed_rows(FOLDER, folder.name, backbone, days)
            compare(
                saved,
                target,
                days=days,
                known=known,
                methods=plan.methods,
                seeds=plan.seeds,
                learning_rates=plan.learning_rates,
                options=plan.search,
                refit_steps=plan.refit_steps,
                output_dir=folder / backbone / ("all" if days is None else f"{days:g}"),
            )


def pretrained(name: str, source: Cities, options: TrainingOptions, folder: Path) -> SavedBackbone:
    """Train a backbone on the source, or on several, unless that has been done."""
    if not (folder / "backbone.json").exists():
        sources = source if isinstance(source, tuple) else (source,)
        data = [prepare(city, pretraining_split(city.num_steps)) for city in sources]
        backbone = new_backbone(name, data, seed=0)
        checkpoints = folder.with_name("base.unfinished")
        train(backbone, data, options, output_dir=checkpoints)
        save_backbone(folder, backbone, **described(data))
        shutil.rmtree(checkpoints)
    return load_backbone(folder)


def chosen_settings(names: str) -> dict[str, Setting]:
    """Settings by name; an unknown one ends the program."""
    unknown = sorted(set(names.split(",")) - set(SETTINGS))
    if unknown:
        sys.exit(f"unknown settings {', '.join(unknown)}; known are {', '.join(SETTINGS)}")
    return {name: SETTINGS[name] for name in names.split(",")}


def plan_of(options: argparse.Namespace) -> Plan:
    """What the command line asks for."""
    return Plan(
        options.backbones.split(","),
        [None if days == "all" else float(days) for days in options.days.split(",")],
        options.methods.split(","),
        [int(seed) for seed in options.seeds.split(",")],
    )


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--backbones", default="stgcn,lstm,gwnet")
    parser.add_argument("--days", default="1,3,7,all")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
