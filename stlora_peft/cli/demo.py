"""``stlora demo``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stlora_peft.cli.compare import describe, write_reports
from stlora_peft.cli.options import Output
from stlora_peft.cli.screen import Screen
from stlora_peft.cli.tables import comparison_table, errors_table, number
from stlora_peft.errors import message

if TYPE_CHECKING:
    from stlora_peft.demo import DemoSettings, Places

EXAMPLE = "Example:  stlora demo --out demo"
MARK = "demo.json"


def demo(
    output: Output,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for everything that is written.")] = Path("demo"),
) -> None:
    """Run the whole job on two simulated cities: pretrain, compare, adapt, save, load, draw. About three minutes."""
    screen = output.screen()
    began = time.perf_counter()
    with screen.working("starting"):
        from stlora_peft.demo import DemoSettings, Places
        from stlora_peft.figures import require_matplotlib
        from stlora_peft.files import write_json

        require_matplotlib()
        check_folder(out)
        write_json(out / MARK, {"finished": False})
        places = Places(out)
    with one_thread():
        result = run(screen, places, DemoSettings())
    result |= {"finished": True, "seconds": round(time.perf_counter() - began, 1)}
    write_json(out / MARK, result)
    screen.facts(
        cities=f"{places.source}, {places.target}",
        backbone=places.base,
        adapter=places.adapter,
        table=places.comparison / "results.md",
        figure=places.comparison / "results.png",
        picture=places.picture,
    )
    screen.say(f"\n{result['seconds']:.0f} seconds. Next, a forecast of the hour after the record's end:")
    words = [places.target, "--base", places.base, "--adapter", places.adapter]
    screen.command("stlora", "forecast", *words, "--out", out / "forecast.csv", "--plot", out / "forecast.png")
    screen.say("or a city of your own ('stlora adapt --help' says which files are read):")
    screen.command("stlora", "adapt", "CITY.npz", "--base", places.base, "--days", 3, "--out", "runs/city")
    screen.finish(result)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: a second one gains little on cities this small, and waits busily on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than an earlier demo.

    Args:
        folder: Where the demo is to write.

    Raises:
        ValueError: If it does.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / MARK).exists() or not any(folder.iterdir()))):
        raise ValueError(
            message(
                f"'{folder}' holds something that is not of the demo",
                expected=f"a new or empty folder, or one with '{MARK}' of an earlier demo in it",
                got="a folder with other files" if folder.is_dir() else "a file",
                fix="give another --out",
            )
        )


def run(screen: Screen, places: Places, settings: DemoSettings) -> dict[str, Any]:
    """Run the demo and tell its story.

    Args:
        screen: Where to tell it.
        places: Where to write.
        settings: Sizes.

    Returns:
        What JSON is to say.
    """
    from stlora_peft import demo
    from stlora_peft.callbacks import ProgressBar
    from stlora_peft.comparison import adaptation_data

    screen.heading("1/5", "Two cities")
    source, target = demo.simulate(places, settings)
    screen.say(f"source  {describe(source)}\ntarget  {describe(target)}, of which {settings.days:g} days are given")

    screen.heading("2/5", "Pretrain a backbone on the source city")
    with ProgressBar("pretrain stgcn") as bar:
        pretrained = demo.pretrain(places, settings, source, [bar])
    screen.say(errors_table(f"Test errors on {source.name}", pretrained.errors, source))

    screen.heading("3/5", "Bring it to the target city, by every method")
    rows = demo.compare_methods(places, settings, pretrained.saved, target)
    write_reports(screen, places.comparison, rows, target, pretrained.saved, demo.describe_settings(settings))
    screen.say(comparison_table(rows, f"{source.name} to {target.name}", target, screen.width))
    screen.say("[dim]One seed and one learning rate, to be quick; 'stlora compare' takes several of each.[/]")

    screen.heading("4/5", "Save the city's adapter and load it into a pristine backbone")
    data = adaptation_data(pretrained.saved, target, settings.days)
    with ProgressBar("adapt st-lora") as bar:
        model = demo.adapt(places, settings, pretrained.saved, data, [bar])
    trip = demo.load_into_pristine_backbone(places, model, data)
    same = "identical bit for bit" if trip.identical else "NOT IDENTICAL"
    screen.say(
        f"{trip.loaded.numel():,} test forecasts before saving and after loading: [bold]{same}[/], "
        f"largest difference {trip.difference:g}\n"
        f"Test MAE of the loaded adapter: {number(trip.mae)}; in the table above: {number(rows[-1]['mae'])}"
    )

    screen.heading("5/5", "Draw forecasts against readings")
    nodes = demo.draw(places, data, trip)
    screen.say(f"sensors {', '.join(nodes)}, chosen because their days differ most\n")
    return {
        "rows": rows,
        "pretraining": {name: metrics.to_dict() for name, metrics in pretrained.errors.items()},
        "identical": trip.identical,
        "largest_difference": trip.difference,
        "loaded_mae": trip.mae,
        "sensors": nodes,
        "out": str(places.folder),
    }
