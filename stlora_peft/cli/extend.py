"""``stlora extend``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from stlora_peft.cli.files import check_adapter_folder
from stlora_peft.cli.loading import load
from stlora_peft.cli.options import Base, Force, Output, Reading
from stlora_peft.cli.screen import bold, new_table
from stlora_peft.errors import message
from stlora_peft.reports import KIB

if TYPE_CHECKING:
    from stlora_peft.data import City
    from stlora_peft.extension import Nearest

EXAMPLE = "Example:  stlora extend shenzhen-new.npz --base runs/la --adapter runs/shenzhen --out runs/shenzhen-new"
SHOWN = 20  # new sensors in the table; --json has all of them

Days = Annotated[
    float | None,
    typer.Option(
        metavar="DAYS",
        help="Days from the start of the record whose readings are compared, up to the whole record.",
        show_default="all before the last 20 % of the record, which 'stlora evaluate' measures on",
    ),
]


def extend(
    reading: Reading,
    base: Base,
    adapter: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the adapter to extend.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the larger adapter.", show_default=False)],
    output: Output,
    neighbours: Annotated[
        int, typer.Option(metavar="N", min=1, help="Old sensors that a new one is made of, at most.")
    ] = 1,
    days: Days = None,
    force: Force = False,
) -> None:
    """Give the sensors that are new in an adapted city a place in its adapter, without training.

    A new sensor starts as the old sensor whose readings are most like its own, or as a mean of several. What the
    adapter has learned about the old sensors stays as it is.
    """
    screen = output.screen()
    with screen.working("comparing the new sensors with the old ones"):
        from stlora_peft.extension import extend_with, nearest_nodes
        from stlora_peft.storage import ADAPTER_WEIGHTS, load_adapter, save_adapter

        check_adapter_folder(out, force)
        city = reading.city()
        backbone = load(city, base, None).saved.backbone
        model = load_adapter(backbone, adapter)
        nearest = nearest_nodes(model, city, neighbours, given=given_steps(city, days))
        save_adapter(out, extend_with(model, backbone, city, nearest))
    old = city.num_nodes - len(nearest)
    size = (out / ADAPTER_WEIGHTS).stat().st_size
    screen.say(f"Extended the adapter of {bold(city.name)}: {old} sensors, and {len(nearest)} new ones")
    screen.say(nearest_table(nearest))
    screen.facts(adapter=f"{out} ({size / KIB:,.0f} KiB)")
    screen.next("stlora", "evaluate", reading.city_file, "--base", base, "--adapter", out, *reading.words())
    screen.finish(
        {
            "out": str(out),
            "base": str(base),
            "adapter": str(adapter),
            "city": city.name,
            "quantity": city.quantity,
            "days": days,
            "old_sensors": old,
            "new_sensors": nearest,
            "adapter_bytes": size,
        }
    )


def given_steps(city: City, days: float | None) -> range:
    """Steps of the record that may be compared.

    Args:
        city: The city.
        days: Days from the start of the record; None takes all before the test part.

    Returns:
        The steps.

    Raises:
        ValueError: If ``days`` is no part of the record.
    """
    from stlora_peft.data import adaptation_split

    if days is None:
        return adaptation_split(city.num_steps, city.steps_per_day).given
    steps = round(days * city.steps_per_day) if math.isfinite(days) else 0
    if not 0 < steps <= city.num_steps:
        raise ValueError(
            message(
                "option '--days' is out of range",
                expected=f"days above 0 and up to {city.num_steps / city.steps_per_day:g}, the whole record",
                got=f"{days:g}",
                fix="give other days, or leave the option out",
            )
        )
    return range(steps)


def nearest_table(nearest: Nearest) -> Table:
    """Table of the new sensors, each with the old ones that it is made of.

    Args:
        nearest: New sensors with their nearest old ones and the weights of these.
    """
    table = new_table("What new sensors are made of", "new sensor", "old sensor", "weight")
    for sensor, found in list(nearest.items())[:SHOWN]:
        for place, (other, weight) in enumerate(found.items()):
            last = place == len(found) - 1
            table.add_row(Text("" if place else sensor), Text(other), f"{weight:.2f}", end_section=last)
    if len(nearest) > SHOWN:
        table.caption = f"and {len(nearest) - SHOWN} more, which --json lists"
    return table
