"""``stlora compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stlora_peft.cli.adapt import Days, RefitSteps
from stlora_peft.cli.files import read_list
from stlora_peft.cli.options import Base, Output, Reading, Training
from stlora_peft.cli.screen import Screen, bold
from stlora_peft.cli.tables import comparison_table, forms_table

if TYPE_CHECKING:
    from stlora_peft.data import City
    from stlora_peft.reports import Row
    from stlora_peft.storage import SavedBackbone

EXAMPLE = (
    "Example:  stlora compare shenzhen-flow.npz --base runs/la --days 3 "
    "--methods zero-shot,head,full,lora,st-lora --seeds 0,1,2 --out runs/compare"
)
TABLE, FIGURE = "results.md", "results.png"


def compare(
    reading: Reading,
    base: Base,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for results.json, .md and .png.", show_default=False)
    ],
    training: Training,
    output: Output,
    days: Days = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Untrained: zero-shot, zero-shot+, persistence, ha, var, svr. Rivals: scratch, head, norm, full, "
            "ia3, dora, lora, node-embedding, node-prompt, full+node-embedding. Ours: st-lora, full+st-lora, "
            "st-lora-FORM, st-lora-FORM-layers (no predictor), st-lora-predictor, st-lora-frugal, "
            "st-lora-auto (takes the form that is best on held-out days).",
        ),
    ] = "zero-shot,persistence,head,full,lora,st-lora",
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Each is a training of its own.")] = "0,1,2",
    learning_rates: Annotated[
        str, typer.Option(metavar="LIST", help="Each method takes the one that validates best.")
    ] = "0.001,0.003",
    refit_steps: RefitSteps = 600,
    force: Annotated[bool, typer.Option("--force", help="Measure again what lies in the folder.")] = False,
) -> None:
    """Compare ways to bring a backbone to another city.

    Every row is kept as soon as it is measured: an interrupted comparison goes on where it stopped.
    """
    screen = output.screen()
    with screen.working("reading the city and the backbone"):
        from stlora_peft import comparison
        from stlora_peft.files import read_json
        from stlora_peft.reports import in_order
        from stlora_peft.storage import load_backbone

        saved = load_backbone(base)
        city = reading.city()
        results = out / comparison.RESULTS
        if force:
            results.unlink(missing_ok=True)
        elif results.exists():
            screen.note(f"Going on from '{results}'; --force measures everything again.")
        plan: dict[str, Any] = {
            "methods": [name.strip() for name in methods.split(",")],
            "seeds": read_list("--seeds", seeds, int),
            "learning_rates": read_list("--learning-rates", learning_rates, float),
        }
        options = training.options()
    rows = comparison.compare(saved, city, days=days, **plan, options=options, refit_steps=refit_steps, output_dir=out)
    settings = {
        "city": describe(city),
        "backbone": f"{saved.backbone.name} of {saved.city}, fingerprint {saved.fingerprint[:16]}",
        "learning rates": ", ".join(f"{rate:g}" for rate in plan["learning_rates"]),
        "budget": options.budget + (f"; then {refit_steps} steps on all given days" if refit_steps else ""),
    }
    stored = in_order(read_json(results), plan["methods"])
    files = {"results": str(results), **write_reports(screen, out, stored, city, saved, settings)}
    screen.say(comparison_table(rows, f"{saved.city} to {city.name}", city, screen.width))
    chosen = {f"{row['method']}, seed {row['seed']}": row["choice"] for row in rows if row.get("choice")}
    if chosen:
        errors = {name: choice["errors"] for name, choice in chosen.items()}
        screen.say(forms_table("MAE on given days that were held back", errors, city))
        for name, choice in chosen.items():
            screen.say(f"{name}: {bold(choice['chosen'])} is chosen")
    screen.facts(**files)
    screen.finish({"rows": rows, "files": files})


def write_reports(
    screen: Screen, out: Path, rows: Sequence[Row], city: City, saved: SavedBackbone, settings: dict[str, str]
) -> dict[str, str]:
    """Write the table and, where matplotlib is there, the figure.

    Args:
        screen: Where to say that there is no figure.
        out: Folder for both.
        rows: Rows of the comparison.
        city: The city.
        saved: The backbone.
        settings: What the rows share.

    Returns:
        The files by name.
    """
    from stlora_peft.comparison_figure import draw_comparison
    from stlora_peft.reports import write_markdown

    title = f"{saved.city} to {city.name}"
    files = {"table": str(out / TABLE)}
    if screen.drawn(lambda: draw_comparison(out / FIGURE, rows, title=title, quantity=city.quantity)):
        files["figure"] = str(out / FIGURE)
    write_markdown(
        out / TABLE,
        rows,
        title=title,
        quantity=city.quantity,
        interval_minutes=city.interval_minutes,
        settings=settings,
        figure=FIGURE if "figure" in files else None,
    )
    return files


def describe(city: City) -> str:
    """A city in one line."""
    days = city.num_steps / city.steps_per_day
    return f"{city.name}: {city.num_nodes} sensors, {days:.4g} days in steps of {city.interval_minutes} minutes"
