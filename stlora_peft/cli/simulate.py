"""``stlora simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from stlora_peft.cli.files import check_new
from stlora_peft.cli.options import Force, Output
from stlora_peft.cli.screen import bold

EXAMPLE = "Example:  stlora simulate --nodes 30 --days 14 --seed 0 --out city.npz"


def simulate(
    out: Annotated[Path, typer.Option(metavar="FILE", help="City file to write (.npz).", show_default=False)],
    output: Output,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Number of sensors.")] = 30,
    days: Annotated[float, typer.Option(metavar="DAYS", help="Length of the record in days.")] = 14,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Another seed is another city.")] = 0,
    measure: Annotated[
        Literal["speed", "flow", "both"],
        typer.Option(help="Speed in km/h, flow in vehicles per step, or both as two channels."),
    ] = "speed",
    character: Annotated[
        Literal["radial", "grid"], typer.Option(help="Spokes and arterials, or a lattice with much downtown.")
    ] = "radial",
    interval: Annotated[int, typer.Option(metavar="N", min=1, help="Minutes between two readings.")] = 5,
    start: Annotated[
        str, typer.Option(metavar="TIME", help="Local time of the first reading, ISO.")
    ] = "2024-01-01T00:00",
    force: Force = False,
) -> None:
    """Simulate the traffic of a city and write it to a file."""
    screen = output.screen()
    check_new(out, force)
    with screen.working(f"simulating {nodes} sensors for {days:g} days"):
        import numpy as np

        from stlora_peft.data import simulate_city

        city = simulate_city(
            num_nodes=nodes,
            days=days,
            seed=seed,
            quantity=measure,
            character=character,
            interval_minutes=interval,
            start=start,
        )
        city.save(out)
    missing = float(np.isnan(city.values).mean())
    screen.say(
        f"{bold(city.name)}: {city.num_nodes} sensors, {city.edge_index.shape[1]} edges, "
        f"{city.num_steps:,} steps of {interval} minutes "
        f"from {city.start:%Y-%m-%d %H:%M}, {escape(city.quantity)}, {missing:.1%} missing"
    )
    screen.facts(city=out)
    screen.next("stlora", "pretrain", out, "--backbone", "stgcn", "--out", f"runs/{out.stem}")
    screen.finish(
        {
            "out": str(out),
            "name": city.name,
            "num_nodes": city.num_nodes,
            "num_edges": city.edge_index.shape[1],
            "num_steps": city.num_steps,
            "interval_minutes": city.interval_minutes,
            "quantity": city.quantity,
            "missing": missing,
        }
    )
