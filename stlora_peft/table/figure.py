"""The figure of a table: how much an adapter changes the error of each backbone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stlora_peft import figures
from stlora_peft.reports import Spread
from stlora_peft.table.runs import LONGER, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPARISONS = (
    ("joint", "", "joint: from scratch together", "#0072b2"),
    ("adapt", "", "adapt: against the frozen backbone", "#cc3311"),
    ("adapt", LONGER, "adapt: against the backbone trained on as long", "#e69f00"),
)
"""Regime, end of the name of the model without an adapter, words for the legend, colour."""


def draw_table(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Draw the change of the average MAE by an adapter, in percent, one panel for each city.

    Args:
        path: PNG file to write.
        rows: Rows of :func:`stlora_peft.table.make_table`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    cities = list(dict.fromkeys(row["city"] for row in rows))
    backbones = list(dict.fromkeys(row["model"] for row in rows if row["stlora"]))
    figure = figures.new_figure(1.5 + 4.8 * len(cities), 1.6 + 0.75 * len(backbones))
    panels = figure.subplots(1, len(cities), squeeze=False, sharey=True)[0]
    for axes, city in zip(panels, cities, strict=True):
        _draw_city(axes, [row for row in rows if row["city"] == city], backbones)
        axes.set_title(city, fontsize=11)
        axes.set_xlabel("change of the average MAE, % (left of 0: better)")
    panels[0].set_yticks(range(len(backbones)), backbones)
    panels[0].set_ylim(len(backbones) - 0.5, -0.5)
    figure.suptitle("What ST-LoRA changes; a dot for each seed, a bar for their mean", fontweight="bold")
    known = [axes.get_legend_handles_labels() for axes in panels]
    legend = {label: handle for handles, labels in known for handle, label in zip(handles, labels, strict=True)}
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend) or 1, frameon=False, fontsize=9
    )
    figures.save_figure(figure, path)


def _draw_city(axes: Axes, rows: Sequence[Row], backbones: Sequence[str]) -> None:
    """Draw the comparisons of each backbone below each other."""
    axes.axvline(0, color="#444444", linewidth=1)
    known = [comparison for comparison in COMPARISONS if any(row["regime"] == comparison[0] for row in rows)]
    offsets = np.linspace(-0.25, 0.25, len(known)) if len(known) > 1 else [0.0]
    for offset, (regime, end, words, colour) in zip(offsets, known, strict=True):
        for place, name in enumerate(backbones):
            changes = _changes([row for row in rows if row["regime"] == regime], name, name + end)
            heights = np.full(len(changes), place + offset)
            axes.scatter(changes, heights, s=24, color=colour, alpha=0.55, linewidths=0, zorder=3)
            mean = Spread.of(changes).mean
            if mean is not None:
                axes.plot(mean, place + offset, "|", ms=13, mew=2.4, color=colour, label=words, zorder=4)
                axes.annotate(f"{mean:+.1f}", (mean, place + offset), (0, 5), textcoords="offset points", fontsize=8)


def _changes(rows: Sequence[Row], name: str, other: str) -> list[float]:
    """Change from one model to the backbone with its adapter, seed by seed, in percent."""
    before = {row["seed"]: row["mae"]["average"] for row in rows if row["model"] == other and not row["stlora"]}
    after = {row["seed"]: row["mae"]["average"] for row in rows if row["model"] == name and row["stlora"]}
    pairs = [(before[seed], mae) for seed, mae in after.items() if seed in before]
    return [100 * (mae / base - 1) for base, mae in pairs if mae is not None and base]
