"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from stlora_peft.cli.screen import new_table
from stlora_peft.reports import KIB, days_name, horizon_name, summarise

if TYPE_CHECKING:
    from stlora_peft.data import City
    from stlora_peft.metrics import Metrics

WIDE_TABLE = 100
ERRORS = {"mae": "MAE", "rmse": "RMSE", "mape": "MAPE %"}


def errors_table(title: str, errors: Mapping[str, Metrics], city: City) -> Table:
    """Table of the errors of several forecasters side by side, the lowest of each row in bold.

    Args:
        title: What it shows; the unit is added.
        errors: Errors by the name of the forecaster.
        city: The city, for unit and time step.
    """
    table = new_table(f"{title}; {unit(city)}", "", "horizon", *errors)
    found = {name: metrics.to_dict() for name, metrics in errors.items()}
    horizons = list(next(iter(found.values())))
    for key, heading in ERRORS.items():
        for place, horizon in enumerate(horizons):
            cells = _lowest_in_bold([rows[horizon][key] for rows in found.values()])
            last = place == len(horizons) - 1
            name = horizon_name(horizon, city.interval_minutes)
            table.add_row("" if place else heading, name, *cells, end_section=last)
    return table


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str, city: City, width: int) -> Table:
    """Table of methods, each with its errors over seeds and what it costs, the lowest MAE in bold.

    Where there is little room, the errors at single horizons are left out.

    Args:
        rows: Rows of :func:`stlora_peft.comparison.compare`.
        title: What was compared; the unit is added.
        city: The city, for unit and time step.
        width: Columns of the terminal.
    """
    summaries = summarise(rows)
    steps = [horizon for horizon in summaries[0].errors if horizon != "average" and width >= WIDE_TABLE]
    heads = [f"MAE\n{horizon_name(step, city.interval_minutes)}" for step in steps]
    title = f"{title}, {days_name(summaries[0].days)}: test errors; {unit(city)}"
    table = new_table(
        title, "method", "MAE", *heads, "RMSE", "MAPE %", "trained\nparameters", "file\nKiB", "training\ns"
    )
    lowest = min((summary.mae.mean for summary in summaries if summary.mae.mean is not None), default=None)
    for summary in summaries:
        average = summary.errors["average"]
        best = summary.mae.mean is not None and summary.mae.mean == lowest
        table.add_row(
            Text(summary.method, style="bold" if best else ""),
            Text(summary.mae.text(), style="bold" if best else ""),
            *(number(summary.errors[step]["mae"].mean) for step in steps),
            number(average["rmse"].mean),
            number(average["mape"].mean),
            f"{summary.trainable_parameters:,}",
            f"{summary.adapter_bytes / KIB:,.0f}",
            f"{summary.seconds:.0f}",
        )
    return table


def forms_table(title: str, errors: Mapping[str, Mapping[str, float]], city: City) -> Table:
    """Table of the forms of an adapter that were tried, the lowest error of each column in bold.

    Args:
        title: What it shows; the unit is added.
        errors: Errors by column and then by form; a form that was left out somewhere has none there.
        city: The city, for the unit.
    """
    table = new_table(f"{title}; {unit(city)}", "form", *errors)
    forms = list(dict.fromkeys(form for column in errors.values() for form in column))
    columns = [_lowest_in_bold([column.get(form) for form in forms]) for column in errors.values()]
    for form, *cells in zip(forms, *columns, strict=True):
        table.add_row(form, *cells)
    return table


def unit(city: City) -> str:
    """What a city's errors are measured in."""
    return city.quantity or "in the readings' own units"


def number(value: float | None) -> str:
    """Write an error with as many digits as can matter; None is one that could not be measured.

    Example:
        >>> number(2.34567), number(123.456), number(None)
        ('2.346', '123.5', '-')
    """
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def _lowest_in_bold(values: list[float | None]) -> list[Text]:
    """Write numbers, the lowest in bold."""
    lowest = min((value for value in values if value is not None), default=None)
    bold = lowest is not None and len(values) > 1
    return [Text(number(value), style="bold" if bold and value == lowest else "") for value in values]
