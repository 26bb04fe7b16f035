"""``stlora pretrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stlora_peft.cli.files import check_new
from stlora_peft.cli.options import Force, LearningRate, Output, Parts, Reading, Seed, Training
from stlora_peft.cli.screen import bold
from stlora_peft.cli.tables import errors_table
from stlora_peft.cli.training import Resumable, training_line, training_summary
from stlora_peft.launch import is_main_process

EXAMPLE = "Example:  stlora pretrain la-loop.npz --backbone stgcn --out runs/la"
_BACKBONE = "Backbone"


def pretrain(
    reading: Reading,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the backbone.", show_default=False)],
    training: Training,
    parts: Parts,
    output: Output,
    backbone: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Network: stgcn, gwnet, ...; a wrong name lists all.",
            rich_help_panel=_BACKBONE,
        ),
    ] = "stgcn",
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Hidden channels.", rich_help_panel=_BACKBONE, show_default="the network's own"
        ),
    ] = None,
    window: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Input steps; 12 of 5 minutes are an hour.", rich_help_panel=_BACKBONE),
    ] = 12,
    horizon: Annotated[
        int, typer.Option(metavar="N", min=1, help="Steps to forecast.", rich_help_panel=_BACKBONE)
    ] = 12,
    time_features: Annotated[
        Literal["none", "day", "week"],
        typer.Option(help="Clock that it reads: time of day, or also day of week.", rich_help_panel=_BACKBONE),
    ] = "day",
    learning_rate: LearningRate = 1e-3,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Train a backbone on a city with a long record.

    The first 70 % of the record train, the next 10 % validate, the last 20 % are only forecast.
    """
    screen = output.screen()
    with screen.working("reading the city"):
        from stlora_peft.backbones import new_backbone
        from stlora_peft.data import prepare, pretraining_split
        from stlora_peft.storage import DESCRIPTION, save_backbone

        check_new(out / DESCRIPTION, force)
        options = parts.apply(training.options(learning_rate=learning_rate, seed=seed))
        city = reading.city()
        data = prepare(city, pretraining_split(city.num_steps), window, horizon, time_features)
        key = "hidden_size" if backbone == "lstm" else "hidden_channels"
        model = new_backbone(backbone, data, seed=seed, **({} if width is None else {key: width}))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    screen.say(
        f"Training {bold(backbone)} ({parameters:,} parameters) on {bold(city.name)} ({city.num_nodes} sensors): "
        f"{len(data.train):,} windows of {window} steps, to forecast {horizon} steps"
    )
    checkpoints = Resumable(out, force)
    result = checkpoints.train(screen, "pretrain", model, data, options)
    if not is_main_process():
        return
    known = {"city": city.name, "quantity": city.quantity}
    save_backbone(out, model, scaler=data.scaler, time_features=time_features, **known)
    checkpoints.delete()
    with screen.working("forecasting the test part"):
        errors = {"persistence": parts.persistence(data), backbone: parts.errors(model, data)}
    screen.say(errors_table(f"Test errors on {city.name}", errors, city))
    screen.facts(training=training_line(result), backbone=out)
    screen.next("stlora", "adapt", "OTHER-CITY.npz", "--base", out, "--days", 3, "--out", out.parent / "other-city")
    screen.finish(
        {
            "out": str(out),
            "backbone": backbone,
            "hyperparameters": model.hyperparameters,
            "parameters": parameters,
            **known,
            "time_features": time_features,
            "training": training_summary(result),
            "test": {name: metrics.to_dict() for name, metrics in errors.items()},
        }
    )
