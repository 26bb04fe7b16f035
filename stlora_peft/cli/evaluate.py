"""``stlora evaluate``."""

from __future__ import annotations

from stlora_peft.cli.loading import AdapterFolder, load
from stlora_peft.cli.options import Base, Output, Parts, Reading
from stlora_peft.cli.tables import errors_table

EXAMPLE = "Example:  stlora evaluate shenzhen-flow.npz --base runs/la --adapter runs/shenzhen"


def evaluate(reading: Reading, base: Base, parts: Parts, output: Output, adapter: AdapterFolder = None) -> None:
    """Measure forecasts on the last 20 % of a city's record: backbone alone, with adapter, and persistence.

    Persistence repeats the last reading at every step of the forecast.
    """
    screen = output.screen()
    with screen.working("forecasting the test part"):
        loaded = load(reading.city(), base, adapter)
        data, city = loaded.data(), loaded.city
        models = {"backbone alone": loaded.alone()} | ({"with adapter": loaded.adapted} if loaded.adapted else {})
        errors = {
            "persistence": parts.persistence(data),
            **{name: parts.errors(model, data) for name, model in models.items()},
        }
    screen.say(errors_table(f"Test errors on {city.name}, {len(data.test):,} windows", errors, city))
    if adapter is not None:
        arguments = [reading.city_file, "--base", base, "--adapter", adapter, *reading.words()]
        screen.next("stlora", "forecast", *arguments, "--out", "forecast.csv")
    screen.finish(
        {
            "city": city.name,
            "quantity": city.quantity,
            "windows": len(data.test),
            "test": {name: metrics.to_dict() for name, metrics in errors.items()},
        }
    )
