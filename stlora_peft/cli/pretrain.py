"""``stlora pretrain``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stlora_peft.cli.files import check_new
from stlora_peft.cli.options import Force, LearningRate, Output, Parts, Reading, Seed, Training
from stlora_peft.cli.screen import bold
from stlora_peft.cli.tables import errors_table
from stlora_peft.cli.training import Resumable, training_line, training_summary
from stlora_peft.errors import message
from stlora_peft.launch import is_main_process

if TYPE_CHECKING:
    from stlora_peft.data import City

EXAMPLE = "Example:  stlora pretrain la-loop.npz --backbone stgcn --out runs/la"
_OF_ONE_CITY = ("--graph", "--ids", "--start")
_BACKBONE = "Backbone"


def pretrain(
    reading: Reading,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the backbone.", show_default=False)],
    training: Training,
    parts: Parts,
    output: Output,
    further: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="CITY",
            help="Further cities to train the same backbone on, each a file that holds everything.",
            show_default=False,
        ),
    ] = None,
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
    """Train a backbone on a city with a long record, or on several.

    The first 70 % of a record train, the next 10 % validate, the last 20 % are only forecast.
    """
    screen = output.screen()
    with screen.working("reading the city"):
        from stlora_peft.backbones import new_backbone
        from stlora_peft.data import prepare, pretraining_split
        from stlora_peft.sources import backbone_of, check_sources, described
        from stlora_peft.storage import DESCRIPTION, save_backbone

        check_new(out / DESCRIPTION, force)
        options = parts.apply(training.options(learning_rate=learning_rate, seed=seed))
        cities = _read(reading, further or [])
        data = [prepare(city, pretraining_split(city.num_steps), window, horizon, time_features) for city in cities]
        key = "hidden_size" if backbone == "lstm" else "hidden_channels"
        model = new_backbone(backbone, data, seed=seed, **({} if width is None else {key: width}))
        check_sources(model, data)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    places = " and ".join(f"{bold(city.name)} ({city.num_nodes} sensors)" for city in cities)
    screen.say(
        f"Training {bold(backbone)} ({parameters:,} parameters) on {places}: "
        f"{sum(len(one.train) for one in data):,} windows of {window} steps, to forecast {horizon} steps"
    )
    checkpoints = Resumable(out, force)
    result = checkpoints.train(screen, "pretrain", model, data, options)
    if not is_main_process():
        return
    known = described(data)
    save_backbone(out, model, **known)
    checkpoints.delete()
    sizes, errors = [city.num_nodes for city in cities], []
    with screen.working("forecasting the test part"):
        for number, one in enumerate(data):
            own = model if len(data) == 1 else backbone_of(model, sizes, number)
            errors.append({"persistence": parts.persistence(one), backbone: parts.errors(own, one)})
    for city, found in zip(cities, errors, strict=True):
        screen.say(errors_table(f"Test errors on {city.name}", found, city))
    screen.facts(training=training_line(result), backbone=out)
    screen.next("stlora", "adapt", "OTHER-CITY.npz", "--base", out, "--days", 3, "--out", out.parent / "other-city")
    tests = [{name: metrics.to_dict() for name, metrics in found.items()} for found in errors]
    screen.finish(
        {
            "out": str(out),
            "backbone": backbone,
            "hyperparameters": model.hyperparameters,
            "parameters": parameters,
            "city": known["city"],
            "quantity": known["quantity"],
            "time_features": time_features,
            "training": training_summary(result),
            **({"test": tests[0]} if len(tests) == 1 else {"sources": _sources(cities, tests)}),
        }
    )


def _read(reading: Reading, further: list[Path]) -> list[City]:
    """Read all cities.

    Raises:
        ValueError: If an option describes one of several.
    """
    given = [word for word in reading.words() if word in _OF_ONE_CITY]
    if further and given:
        raise ValueError(
            message(
                f"option '{given[0]}' belongs to one city",
                expected=f"{len(further) + 1} files that hold everything about their cities",
                got=", ".join(given),
                fix=f"make such a file of each city first: stlora convert CITY {given[0]} ... --out CITY.npz",
            )
        )
    return [reading.city(), *(replace(reading, city_file=path).city() for path in further)]


def _sources(cities: list[City], tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name, quantity and test errors of each city, for JSON."""
    return [
        {"city": city.name, "quantity": city.quantity, "num_nodes": city.num_nodes, "test": test}
        for city, test in zip(cities, tests, strict=True)
    ]
