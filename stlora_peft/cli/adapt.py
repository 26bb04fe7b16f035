"""``stlora adapt``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from stlora_peft.cli.files import check_adapter_folder
from stlora_peft.cli.options import Base, Force, LearningRate, Output, Parts, Reading, Seed, Training
from stlora_peft.cli.screen import bold
from stlora_peft.cli.tables import forms_table, number, unit
from stlora_peft.cli.training import Resumable, training_line, training_summary
from stlora_peft.errors import message
from stlora_peft.launch import is_main_process
from stlora_peft.reports import KIB

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from stlora_peft.cli.screen import Screen
    from stlora_peft.data import CityData
    from stlora_peft.selection import Choice
    from stlora_peft.training import TrainingOptions

EXAMPLE = "Example:  stlora adapt shenzhen-flow.npz --base runs/la --days 3 --out runs/shenzhen"
_ADAPTER = "Adapter"

Days = Annotated[
    float | None,
    typer.Option(
        metavar="DAYS",
        help="Days from the start of the record that may be used; their last quarter validates.",
        show_default="all before the last 20 % of the record",
    ),
]


RefitSteps = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        help="Steps of the last training, on all given days; 0 keeps the model that validated best.",
        rich_help_panel="Training",
    ),
]


@dataclass(frozen=True)
class Adapter:
    """What kind of adapter is trained."""

    conditioning: Annotated[
        Literal["gate", "core", "full", "embedding", "bias", "shared", "auto"],
        typer.Option(
            metavar="FORM",
            help="How a node takes part in the update: gate, core, full, embedding, bias, shared. auto tries "
            "embedding, gate, core and the predictor alone on days that it holds back, and takes the best; it costs "
            "12 short trainings (24 with one day).",
            rich_help_panel=_ADAPTER,
        ),
    ] = "embedding"
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Rank of the update.",
            rich_help_panel=_ADAPTER,
            show_default="8; 2 on a backbone of 250,000 parameters or more",
        ),
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="The update is scaled by alpha / rank.",
            rich_help_panel=_ADAPTER,
            show_default="twice the rank",
        ),
    ] = None
    predictor: Annotated[
        bool, typer.Option(help="Node-specific predictor behind the backbone.", rich_help_panel=_ADAPTER)
    ] = True

    frugal: Annotated[
        bool,
        typer.Option(
            "--frugal",
            help="A small adapter: updates of rank 1, a narrow predictor, 8 numbers for each node. On a backbone of "
            "250,000 parameters or more about a hundredth of it: only in the layers that the backbone names for this, "
            "4 numbers for each node, no predictor. Rank, alpha and predictor are its own.",
            rich_help_panel=_ADAPTER,
        ),
    ] = False

    def check(self, no_training: bool) -> None:
        """Refuse options that leave each other nothing to say.

        Args:
            no_training: Nothing is to be trained.

        Raises:
            ValueError: If the form is to be chosen with ``--frugal`` or without training, or if something is said that
                ``--frugal`` decides.
        """
        other = "--no-training" if no_training else "--frugal"
        if self.conditioning == "auto" and (no_training or self.frugal):
            raise ValueError(
                message(
                    f"--conditioning auto has nothing to choose with {other}",
                    expected="one of the two options",
                    got=f"--conditioning auto {other}",
                    fix=f"leave out {other}, or --conditioning",
                )
            )
        said = {
            "--rank": self.rank is not None,
            "--alpha": self.alpha is not None,
            "--no-predictor": not self.predictor,
        }
        decided = ", ".join(name for name, is_said in said.items() if is_said)
        if self.frugal and decided:
            raise ValueError(
                message(
                    "--frugal has a rank, an alpha and a predictor of its own",
                    expected="--frugal alone",
                    got=f"--frugal with {decided}",
                    fix=f"leave out --frugal, or {decided}",
                )
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the adapter's configuration, but for the form where it is to be chosen."""
        settings: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha}
        settings |= {} if self.conditioning == "auto" else {"conditioning": self.conditioning}
        settings |= {} if self.predictor else {"predictor": None}
        return settings

    def build(
        self, backbone: nn.Module, data: CityData, seed: int, parts: Parts, choice: Choice | None = None
    ) -> PeftModel:
        """Put an untrained adapter on a copy of the backbone."""
        import torch

        from stlora_peft.methods import build_adapter, frugal

        torch.manual_seed(seed)
        chosen = {} if choice is None else choice.settings
        small = frugal(backbone) if self.frugal else {}
        return build_adapter(backbone, data, parts=parts.of(data), **{**self.settings, **small, **chosen})


def adapt(
    reading: Reading,
    base: Base,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the adapter.", show_default=False)],
    adapter: Adapter,
    training: Training,
    parts: Parts,
    output: Output,
    days: Days = None,
    learning_rate: LearningRate = 3e-3,
    refit_steps: RefitSteps = 600,
    no_training: Annotated[
        bool,
        typer.Option("--no-training", help="Only fit the predictor to the given days in closed form, in seconds."),
    ] = False,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Adapt a backbone to another city with a few days of its data.

    The backbone stays as it is. What is trained is the city's adapter, a small folder of its own. A first training
    holds the last quarter of the given days back and says what the adapter is worth there; the adapter that is written
    is then trained on all of them.
    """
    adapter.check(no_training)
    if no_training and not is_main_process():
        return
    screen = output.screen()
    with screen.working("reading the city and the backbone"):
        from stlora_peft.comparison import adaptation_data
        from stlora_peft.methods import calibrated
        from stlora_peft.storage import ADAPTER_WEIGHTS, load_backbone, save_adapter

        check_adapter_folder(out, force)
        options = parts.apply(training.options(learning_rate=learning_rate, seed=seed))
        saved = load_backbone(base)
        city = reading.city()
        data = adaptation_data(saved, city, days)
    windows = data.given if no_training or refit_steps else data.train
    screen.say(
        f"Adapting {bold(saved.backbone.name)} of {escape(saved.city)} to {bold(city.name)} "
        f"({city.num_nodes} sensors): "
        f"{len(windows):,} windows from the first {len(data.split.given) / city.steps_per_day:g} day(s)"
    )
    checkpoints = Resumable(out, force)
    if no_training:
        with screen.working("fitting the predictor"):
            model = calibrated(adapter.build(saved.backbone, data, seed, parts), data)
        facts = {"training": "none: the predictor was fitted in closed form"}
        summary: dict[str, Any] = {"training": None}
    else:
        choice = _choose(screen, checkpoints, adapter, saved.backbone, data, options)
        build = partial(adapter.build, saved.backbone, data, seed, parts, choice)
        model, facts, summary = _train(screen, checkpoints, build, data, options, refit_steps)
        summary |= {} if choice is None else {"choice": choice.to_dict()}
    if not is_main_process():
        return
    save_adapter(out, model)
    checkpoints.delete()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    backbone_size = sum(parameter.numel() for parameter in saved.backbone.parameters())
    size = (out / ADAPTER_WEIGHTS).stat().st_size
    screen.say("")
    screen.facts(
        **facts,
        parameters=f"{trained:,}, {trained / backbone_size:.1%} of the backbone's {backbone_size:,}",
        adapter=f"{out} ({size / KIB:,.0f} KiB)",
    )
    screen.next("stlora", "evaluate", reading.city_file, "--base", base, "--adapter", out, *reading.words())
    screen.finish(
        {
            "out": str(out),
            "base": str(base),
            "city": city.name,
            "quantity": city.quantity,
            "days": days,
            "trainable_parameters": trained,
            "backbone_parameters": backbone_size,
            "adapter_bytes": size,
            **summary,
        }
    )


def _choose(
    screen: Screen,
    checkpoints: Resumable,
    adapter: Adapter,
    backbone: nn.Module,
    data: CityData,
    options: TrainingOptions,
) -> Choice | None:
    """Choose the form of the adapter where none is named, and show what each was worth."""
    if adapter.conditioning != "auto":
        return None
    from stlora_peft.selection import choose_conditioning

    file = checkpoints.folder / "choice.json"
    if file.exists():
        screen.note(f"Going on from '{file}'; --force starts again.")
    choice = choose_conditioning(backbone, data, options, settings=adapter.settings, file=file)
    count = len(choice.folds[choice.name])
    columns = {"mean": choice.errors}
    for place in range(count):
        columns[f"fold {place + 1}"] = {name: errors[place] for name, errors in choice.folds.items()}
    screen.say(forms_table("MAE on given days that were held back", columns, data.city))
    for name, reason in choice.left_out.items():
        screen.say(f"{name} is left out: {escape(reason)}")
    screen.say(
        f"Chosen: {bold(choice.name)}, by {count} trainings of {choice.steps} steps for each form, "
        f"{choice.seconds:.0f} s"
    )
    return choice


def _train(
    screen: Screen,
    checkpoints: Resumable,
    build: Callable[[], PeftModel],
    data: CityData,
    options: TrainingOptions,
    refit_steps: int,
) -> tuple[PeftModel, dict[str, str], dict[str, Any]]:
    """Train on a part of the given days and validate, then anew on all of them; what to show of it, and for JSON."""
    model = build()
    result = checkpoints.train(screen, "validate", model, data, options, "validate")
    before = result.history[0]["val_mae"]
    after = f"{number(before)} before, {number(result.best_val_mae)} after; {unit(data.city)}"
    facts = {"validation_MAE": after, "validated": training_line(result)}
    refit = None
    if refit_steps:
        model = build()
        whole = replace(options, patience=None, max_steps=refit_steps)
        refit = checkpoints.train(screen, "adapt", model, data, whole, "refit")
        facts["all_given_days"] = training_line(refit)
    summary = {"training": training_summary(result), "refit": training_summary(refit) if refit else None}
    return model, facts, {"val_mae_before": before, **summary}
