"""``stlora forecast``."""

from __future__ import annotations

import csv
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from stlora_peft.cli.files import check_new
from stlora_peft.cli.loading import AdapterFolder, Loaded, load
from stlora_peft.cli.options import Base, Force, Output, Reading
from stlora_peft.cli.screen import bold
from stlora_peft.cli.tables import unit
from stlora_peft.errors import message

if TYPE_CHECKING:
    import torch

    from stlora_peft.data import City

EXAMPLE = "Example:  stlora forecast shenzhen-flow.npz --base runs/la --adapter runs/shenzhen --out forecast.csv"
HISTORY = 4  # windows of readings to draw before a forecast


def forecast(
    reading: Reading,
    base: Base,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Table to write (.csv).", show_default=False)],
    output: Output,
    adapter: AdapterFolder = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|STEP",
            help="Last step that the forecast may see: an ISO time, or a number counted from 0.",
            show_default="the end of the record",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw a few sensors (.png).", show_default=False),
    ] = None,
    force: Force = False,
) -> None:
    """Forecast a city from one point of its record on, in the readings' own units."""
    screen = output.screen()
    with screen.working("forecasting"):
        from stlora_peft.figures import draw_forecast, pick_nodes, require_matplotlib

        check_new(out, force)
        if plot is not None:
            check_new(plot, force)
            require_matplotlib()
        loaded = load(reading.city(), base, adapter)
        city = loaded.city
        window = loaded.saved.backbone.window
        step = find_step(city, at, window)
        values = forecast_from(loaded, step)
        write_table(out, city, step, values)
        if plot is not None:
            draw_forecast(plot, city, step, values.numpy(), history=HISTORY * window, nodes=pick_nodes(city))
    horizon = len(values)
    screen.say(
        f"{bold(city.name)}: {city.num_nodes} sensors, {horizon} steps ({horizon * city.interval_minutes} minutes) "
        f"after {step_name(city, step)}; {escape(unit(city))}"
    )
    screen.facts(forecast=out, **({} if plot is None else {"picture": plot}))
    screen.finish(
        {
            "out": str(out),
            "plot": None if plot is None else str(plot),
            "city": city.name,
            "quantity": city.quantity,
            "last_step": step,
            "last_time": None if city.start is None else step_name(city, step),
            "horizon": horizon,
            "num_nodes": city.num_nodes,
        }
    )


def forecast_from(loaded: Loaded, step: int) -> torch.Tensor:
    """Forecast what follows a step.

    Args:
        loaded: The forecaster and its city.
        step: Last step of the input window.

    Returns:
        Forecast in the city's units.

    Shapes:
        - **output:** ``[t n c]`` with the horizon on ``t``
    """
    import torch

    from stlora_peft.data import Scaler
    from stlora_peft.data.splits import input_series

    city, window = loaded.city, loaded.saved.backbone.window
    scaler = loaded.scaler or Scaler.fit(city.values[: step + 1])
    series = input_series(city, scaler, window, loaded.saved.time_features)
    x = series[step + 1 - window : step + 1][None]  # [b t n c]
    model = loaded.adapted or loaded.alone()
    with torch.no_grad():
        scaled = model(x, torch.from_numpy(city.edge_index), torch.from_numpy(city.edge_weight))
    forecast: torch.Tensor = scaler.inverse(scaled)[0]
    return forecast


def find_step(city: City, at: str | None, window: int) -> int:
    """Find the step that the user means.

    Args:
        city: The city.
        at: ISO time, number of a step, or None for the last one.
        window: Steps that must lie before it, itself included.

    Returns:
        Number of the step.

    Raises:
        ValueError: If it is neither, or leaves no room for the window.
    """
    if at is None:
        step = city.num_steps - 1
    elif at.lstrip("-").isdigit():
        step = int(at)
    else:
        step = _step_of_time(city, at)
    if not window - 1 <= step < city.num_steps:
        raise ValueError(
            message(
                f"city '{city.name}' has no window of {window} steps that ends there",
                expected=f"a step from {window - 1} to {city.num_steps - 1}, "
                f"{step_name(city, window - 1)} to {step_name(city, city.num_steps - 1)}",
                got=f"step {step}" if at is None or at.lstrip("-").isdigit() else f"{at}, step {step}",
                fix="give another --at, or a longer record",
            )
        )
    return step


def _step_of_time(city: City, at: str) -> int:
    """Number of the last step that is not after a time."""
    try:
        time = datetime.fromisoformat(at)
        if city.start is None or (time.tzinfo is None) != (city.start.tzinfo is None):
            raise ValueError
    except ValueError as error:
        unknown = city.start is None
        raise ValueError(
            message(
                "option '--at' cannot be read",
                expected="the number of a step" if unknown else f"a number, or a time such as '{city.start}'",
                got=repr(at),
                fix="say with --start when the record begins" if unknown else "write the time as YYYY-MM-DDTHH:MM",
            )
        ) from error
    return (time - city.start) // timedelta(minutes=city.interval_minutes)


def step_name(city: City, step: int) -> str:
    """Call a step by its time where the record's start is known."""
    if city.start is None:
        return f"step {step}"
    return (city.start + timedelta(minutes=city.interval_minutes * step)).isoformat(sep=" ", timespec="minutes")


def write_table(path: Path, city: City, step: int, values: torch.Tensor) -> None:
    """Write the forecast as CSV, one line for each sensor and forecast step.

    Args:
        path: The file.
        city: The city.
        step: Last step that the forecast saw.
        values: The forecast, ``[t n c]``.
    """
    from stlora_peft.files import atomic_write

    many = values.shape[2] > 1
    header = ["step" if city.start is None else "time", "node_id", "horizon_minutes"]
    header += ["channel"] * many + ["forecast"] + ["unit"] * bool(city.quantity)
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for node, channel, ahead in product(range(city.num_nodes), range(values.shape[2]), range(len(values))):
            when = step_name(city, step + ahead + 1).removeprefix("step ").replace(" ", "T")
            cells = [when, city.node_ids[node], (ahead + 1) * city.interval_minutes, *([channel] * many)]
            cells.append(f"{values[ahead, node, channel].item():.6g}")
            writer.writerow(cells + [city.quantity] * bool(city.quantity))
