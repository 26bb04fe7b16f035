"""``stlora table``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stlora_peft.cli.files import read_list
from stlora_peft.cli.options import LearningRate, Output
from stlora_peft.cli.screen import Screen, new_table
from stlora_peft.cli.tables import unit

if TYPE_CHECKING:
    from stlora_peft.data import City
    from stlora_peft.table import Plan

EXAMPLE = (
    "Example:  stlora table --cities la-loop.npz,shenzhen-flow.npz "
    "--backbones lstm,stgcn,gwnet,agcrn,staeformer,d2stgnn --seeds 5 --out runs/table"
)
_PLAN, _TRAINING = "What is compared", "Training"


def table(
    cities: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="City files (.npz) between commas; 'stlora convert' makes them.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder for results.json, .md, .tex, .png, models.", show_default=False),
    ],
    output: Output,
    backbones: Annotated[
        str, typer.Option(metavar="LIST", help="Networks, in the order of the rows.", rich_help_panel=_PLAN)
    ] = "lstm,stgcn,gwnet,agcrn,staeformer,d2stgnn",
    baselines: Annotated[
        str, typer.Option(metavar="LIST", help="Of ha, var, svr; '' for none.", rich_help_panel=_PLAN)
    ] = "ha,var,svr",
    regimes: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="joint: backbone and adapter from scratch together; adapt: adapter on the trained, frozen backbone.",
            rich_help_panel=_PLAN,
        ),
    ] = "joint,adapt",
    seeds: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Trainings of each, with seeds 0 to N - 1; or which: 0,1,2.",
            rich_help_panel=_PLAN,
        ),
    ] = "5",
    shares: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Shares of the record that train and validate; the rest tests.",
            rich_help_panel=_PLAN,
        ),
    ] = "0.6,0.2",
    time_features: Annotated[
        Literal["none", "day", "week"],
        typer.Option(help="Clock that the networks read: time of day, or also day of week.", rich_help_panel=_PLAN),
    ] = "week",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A first look: narrow networks, every 4th window, 10 epochs.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Passes over the training windows, at most.",
            rich_help_panel=_TRAINING,
            show_default="100, quick: 10",
        ),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Epochs without a better validation before stopping.", rich_help_panel=_TRAINING
        ),
    ] = 10,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Windows in one step.", rich_help_panel=_TRAINING)
    ] = 32,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Train and validate on every N-th window; every test window is forecast.",
            rich_help_panel=_TRAINING,
            show_default="1, quick: 4",
        ),
    ] = None,
    learning_rate: LearningRate = 1e-3,
) -> None:
    """Compare backbones without and with ST-LoRA, as the table of its paper does.

    Every row is kept as soon as it is measured: an interrupted table goes on where it stopped, and several commands
    may fill one folder at once, each with other cities or other backbones. The last one, with all of them, only reads.
    """
    screen = output.screen()
    with screen.working("reading the cities"):
        from stlora_peft.data import load_city
        from stlora_peft.table import PAPER_SIZES, SMALL_SIZES, Plan, make_table
        from stlora_peft.training import TrainingOptions

        plan = Plan(
            backbones=_names(backbones),
            baselines=_names(baselines),
            regimes=_names(regimes),
            seeds=_seeds(seeds),
            sizes=SMALL_SIZES if quick else PAPER_SIZES,
            shares=_shares(shares),
            time_features=time_features,
            stride=stride or (4 if quick else 1),
            options=TrainingOptions(
                learning_rate=learning_rate,
                max_epochs=epochs or (10 if quick else 100),
                patience=patience,
                batch_size=batch_size,
            ),
        )
        places = [load_city(file) for file in _names(cities)]
    rows = make_table(places, plan, out)
    files = {"results": str(out / "results.json"), **write_reports(screen, out, rows, places, plan)}
    for city in places:
        _show(screen, rows, city)
    screen.facts(**files)
    screen.finish({"rows": rows, "files": files})


def write_reports(
    screen: Screen, out: Path, rows: list[dict[str, Any]], cities: Sequence[City], plan: Plan
) -> dict[str, str]:
    """Write the table and, where matplotlib is there, the figure.

    Args:
        screen: Where to say that there is no figure.
        out: Folder for both.
        rows: Rows of the table.
        cities: The cities.
        plan: How the rows were made.

    Returns:
        The files by name.
    """
    from stlora_peft.table.figure import draw_table
    from stlora_peft.table.reports import CityLabel, write_latex, write_markdown

    labels = {city.name: CityLabel(city.quantity, city.interval_minutes) for city in cities}
    files = {"table": str(out / "results.md"), "latex": str(out / "results.tex")}
    if screen.drawn(lambda: draw_table(out / "results.png", rows)):
        files["figure"] = str(out / "results.png")
    figure = "results.png" if "figure" in files else None
    write_markdown(out / "results.md", rows, labels, plan.configuration(), figure)
    write_latex(out / "results.tex", rows, labels)
    return files


def _show(screen: Screen, rows: list[dict[str, Any]], city: City) -> None:
    """Show the averages of a city, one table for each regime."""
    from stlora_peft.reports import horizon_name
    from stlora_peft.table.reports import METRICS, TITLES, ends_group, lines_of

    for regime in dict.fromkeys(row["regime"] for row in rows):
        lines = lines_of(rows, city.name, regime)
        steps = list(lines[0].errors["mae"])
        heads = [f"MAE\n{horizon_name(step, city.interval_minutes)}" for step in steps]
        others = [f"{METRICS[name]}\naverage" for name in ("rmse", "mape")]
        shown = new_table(f"{city.name}, {TITLES[regime]}; {unit(city)}", "", *heads, *others)
        for place, line in enumerate(lines):
            cells = [line.cell("mae", step) for step in steps]
            cells += [line.cell(name, "average") for name in ("rmse", "mape")]
            style = "italic" if line.difference else ""
            shown.add_row(line.name, *cells, end_section=ends_group(lines, place), style=style)
        screen.say(shown)


def _names(text: str) -> list[str]:
    """Read names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    """Read how many seeds, or which."""
    numbers = read_list("--seeds", text, int)
    return numbers if "," in text else list(range(numbers[0]))


def _shares(text: str) -> tuple[float, float]:
    """Read the shares of the training and of the validation part."""
    from stlora_peft.errors import message

    parts = read_list("--shares", text, float, unique=False)
    if len(parts) != 2:
        raise ValueError(
            message("option '--shares' cannot be read", expected="two shares", got=repr(text), fix="write 0.6,0.2")
        )
    return parts[0], parts[1]
