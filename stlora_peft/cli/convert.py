"""``stlora convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from stlora_peft.cli.files import check_new
from stlora_peft.cli.options import Force, Output, Reading, named
from stlora_peft.cli.screen import bold

EXAMPLE = (
    "Example:  stlora convert PEMS04.npz --graph PEMS04.csv --channels 0 --start 2018-01-01T00:00 "
    "--quantity 'flow (vehicles per 5 min)' --out cities/pems04.npz"
)


def convert(
    reading: Reading,
    out: Annotated[Path, typer.Option(metavar="FILE", help="City file to write (.npz).", show_default=False)],
    output: Output,
    force: Force = False,
) -> None:
    """Write a city with its graph into one file, and name it after that file.

    Reads METR-LA and PEMS-BAY (.h5 and an adjacency matrix), PEMS03, 04, 07 and 08 (.npz and a list of distances).
    """
    screen = output.screen()
    check_new(out, force)
    with screen.working("reading the city"):
        import numpy as np

        city = named(reading.city(), name=out.stem)
        city.save(out)
    missing = float(np.isnan(city.values).mean())
    facts = {
        "out": str(out),
        "num_nodes": city.num_nodes,
        "num_edges": city.edge_index.shape[1],
        "num_steps": city.num_steps,
        "interval_minutes": city.interval_minutes,
        "start": "" if city.start is None else city.start.isoformat(),
        "quantity": city.quantity,
        "missing": missing,
    }
    screen.say(
        f"{bold(city.name)}: {city.num_nodes} sensors, {facts['num_edges']} edges, {city.num_steps:,} steps of "
        f"{city.interval_minutes} minutes from {facts['start'] or 'an unknown time'}, "
        f"{escape(city.quantity) or 'no unit given'}, {missing:.1%} missing"
    )
    screen.facts(city=out)
    screen.next("stlora", "pretrain", out, "--backbone", "stgcn", "--out", f"runs/{out.stem}")
    screen.finish(facts)
