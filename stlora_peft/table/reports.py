"""A table in Markdown and in LaTeX."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stlora_peft.files import atomic_write
from stlora_peft.provenance import environment
from stlora_peft.reports import Spread, horizon_name
from stlora_peft.table.plan import BASELINES
from stlora_peft.table.runs import LONGER, Row

METRICS = {"mae": "MAE", "rmse": "RMSE", "mape": "MAPE %"}
DECIMALS = {"mae": 3, "rmse": 3, "mape": 2}
TITLES = {
    "joint": "joint: backbone and adapter trained from scratch together",
    "adapt": "adapt: backbone trained, then frozen under the adapter",
}
LEGEND = (
    "Errors on the test part, mean ± sample standard deviation over seeds. `+` is the backbone with an adapter, Δ the "
    "difference that it makes, seed by seed (below zero: better); `NAME-longer` is the backbone alone, trained on for "
    "as many steps as its adapter was, and Δ longer the difference to it. A baseline has no seed."
)


@dataclass(frozen=True)
class CityLabel:
    """What is said of a city in a table.

    Args:
        quantity: What is measured, with its unit.
        interval_minutes: Minutes of a step.
    """

    quantity: str
    interval_minutes: int


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Args:
        name: What it shows.
        errors: Spread over seeds, by metric and step.
        difference: Whether it is the difference of two other lines.
    """

    name: str
    errors: Mapping[str, Mapping[str, Spread]]
    difference: bool = False

    def cells(self) -> list[str]:
        """Metrics of each step in turn, as text."""
        steps = next(iter(self.errors.values()))
        return [self.cell(metric, step) for step in steps for metric in self.errors]

    def cell(self, metric: str, step: str) -> str:
        """Mean and spread of a metric at a step; those of a difference have a sign.

        Args:
            metric: ``"mae"``, ``"rmse"`` or ``"mape"``.
            step: ``"3"``, ..., ``"average"``.
        """
        spread = self.errors[metric][step]
        plus = "+" if self.difference and (spread.mean or 0) > 0 else ""
        return plus + spread.text(DECIMALS[metric])


def lines_of(rows: Sequence[Row], city: str, regime: str) -> list[Line]:
    """Put the rows of one city and regime together, in the order of the paper's table.

    A baseline is one line. A backbone is a line, one with its adapter (``+``) and their difference; in the regime
    ``adapt`` also one for the backbone that was trained on for as many steps, and the difference to it. Differences
    are taken seed by seed.

    Args:
        rows: Rows of :func:`stlora_peft.table.make_table`.
        city: Name of the city.
        regime: ``"joint"`` or ``"adapt"``.
    """
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        if (row["city"], row["regime"]) == (city, regime):
            groups.setdefault((row["model"], row["stlora"]), []).append(row)
    lines = []
    for (model, stlora), group in groups.items():
        lines.append(Line(model + "+" * stlora, _spreads(group[:1] if model in BASELINES else group)))
        for other, name in ((model, "Δ"), (model + LONGER, "Δ longer")):
            if stlora and (other, False) in groups:
                lines.append(Line(name, _spreads(_differences(group, groups[other, False])), difference=True))
    return lines


def ends_group(lines: Sequence[Line], place: int) -> bool:
    """Whether the line at ``place`` is the last of the baselines or of a backbone.

    Args:
        lines: Lines of a table.
        place: Number of a line.
    """
    if place + 1 == len(lines):
        return True
    line, following = lines[place], lines[place + 1]
    return line.difference > following.difference or (line.name in BASELINES) > (following.name in BASELINES)


def tables_of(rows: Sequence[Row]) -> dict[tuple[str, str], list[Line]]:
    """Lines of every city and regime, in the order of the rows.

    Args:
        rows: Rows of :func:`stlora_peft.table.make_table`.
    """
    return {key: lines_of(rows, *key) for key in dict.fromkeys((row["city"], row["regime"]) for row in rows)}


def write_markdown(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    cities: Mapping[str, CityLabel],
    configuration: Mapping[str, Any],
    figure: str | None = None,
) -> None:
    """Write a table as a page of Markdown.

    Args:
        path: The file.
        rows: Rows of :func:`stlora_peft.table.make_table`.
        cities: Labels of the cities, by name.
        configuration: What was chosen, see :meth:`stlora_peft.table.Plan.configuration`.
        figure: File name of the figure, where there is one.
    """
    text = ["# Backbones without and with ST-LoRA", "", LEGEND, ""]
    if figure is not None:
        text += [f"![Change of the average MAE by ST-LoRA, for each backbone and city]({figure})", ""]
    for (city, regime), lines in tables_of(rows).items():
        text += [f"## {city}, {TITLES[regime]}", "", f"MAE and RMSE: {_unit(cities[city])}.", ""]
        text += [*_markdown(lines, cities[city].interval_minutes), ""]
    text += ["## Settings", "", "| | |", "|---|---|"]
    settings = {**configuration, **environment(rows)}
    text += [f"| {name} | {_words(value)} |" for name, value in settings.items()]
    _write(path, text)


def _markdown(lines: Sequence[Line], interval_minutes: int) -> list[str]:
    """Lines of a Markdown table; the difference lines in italics."""
    heads = [f"{name} {horizon_name(step, interval_minutes)}" for step in _steps(lines) for name in METRICS.values()]
    table = ["| model | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for line in lines:
        mark = "*" if line.difference else ""
        table.append("| " + " | ".join(f"{mark}{cell}{mark}" for cell in [line.name, *line.cells()]) + " |")
    return table


def write_latex(path: str | os.PathLike[str], rows: Sequence[Row], cities: Mapping[str, CityLabel]) -> None:
    r"""Write a table as LaTeX, one ``table*`` for each city and regime; it needs the packages booktabs and graphicx.

    Args:
        path: The file.
        rows: Rows of :func:`stlora_peft.table.make_table`.
        cities: Labels of the cities, by name.
    """
    text: list[str] = []
    for (city, regime), lines in tables_of(rows).items():
        caption = _escaped(f"Test errors on {city}, {TITLES[regime]}. MAE and RMSE: {_unit(cities[city])}.")
        text += [r"\begin{table*}", rf"\caption{{{caption}}}", r"\centering", r"\resizebox{\textwidth}{!}{%"]
        text += [*_tabular(lines, cities[city].interval_minutes), "}", r"\end{table*}", ""]
    _write(path, text)


def _tabular(lines: Sequence[Line], interval_minutes: int) -> list[str]:
    """Lines of a ``tabular``, with a rule before each backbone."""
    steps, width = _steps(lines), len(METRICS)
    spans = [rf"\multicolumn{{{width}}}{{c}}{{{horizon_name(step, interval_minutes)}}}" for step in steps]
    firsts = range(2, 2 + width * len(steps), width)
    rules = [rf"\cmidrule(lr){{{first}-{first + width - 1}}}" for first in firsts]
    table = [rf"\begin{{tabular}}{{l{'r' * width * len(steps)}}}", r"\toprule"]
    table += [" & ".join(["", *spans]) + r" \\", "".join(rules)]
    table.append(" & ".join(["Model", *(_escaped(name) for _ in steps for name in METRICS.values())]) + r" \\")
    for place, line in enumerate(lines):
        if place == 0 or ends_group(lines, place - 1):
            table.append(r"\midrule")
        table.append(" & ".join(map(_escaped, [line.name, *line.cells()])) + r" \\")
    return [*table, r"\bottomrule", r"\end{tabular}"]


def _spreads(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Spread]]:
    """Spread of each metric at each step."""
    return {
        metric: {step: Spread.of([row[metric][step] for row in rows]) for step in rows[0][metric]}
        for metric in METRICS
    }


def _differences(rows: Sequence[Row], others: Sequence[Row]) -> list[dict[str, Any]]:
    """Errors less those of the other row with the same seed; None where one of them is not finite."""
    other = {row["seed"]: row for row in others}
    return [
        {
            metric: {step: _less(value, other[row["seed"]][metric][step]) for step, value in row[metric].items()}
            for metric in METRICS
        }
        for row in rows
    ]


def _less(value: float | None, other: float | None) -> float | None:
    """Difference of two numbers, where both are there."""
    return None if value is None or other is None else value - other


def _steps(lines: Sequence[Line]) -> list[str]:
    """Steps that the table reports."""
    return list(next(iter(lines[0].errors.values())))


def _unit(label: CityLabel) -> str:
    """What the errors of a city are measured in."""
    return label.quantity or "in the units of the readings"


def _words(value: object) -> str:
    """Write a setting in one cell."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_words(one) or 'own sizes'}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _escaped(text: str) -> str:
    """Write what LaTeX would take for a command."""
    named = {"±": r"$\pm$", "Δ": r"$\Delta$", "²": "$^2$", "^": r"\^{}", "~": r"\~{}", "\\": r"\textbackslash{}"}
    named |= {letter: f"\\{letter}" for letter in "%_&#${}"}
    return "".join(named.get(letter, letter) for letter in text)


def _write(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write a text whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
