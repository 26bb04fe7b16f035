"""The figure of a comparison: the error of each method, and the error against what was trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stlora_peft import figures
from stlora_peft.reports import Row, Summary, days_name, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 7  # methods whose names have room side by side


def draw_comparison(path: str | os.PathLike[str], rows: Sequence[Row], *, title: str, quantity: str) -> None:
    """Draw the MAE of each method with its seeds, and the MAE against the number of trained parameters.

    Args:
        path: PNG file to write.
        rows: Rows of :func:`stlora_peft.comparison.compare`. Each number of days gets two panels of its own.
        title: What was compared.
        quantity: What is measured, with its unit.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    summaries = summarise(rows)
    groups = list(dict.fromkeys(summary.days for summary in summaries))
    crowded = len({summary.method for summary in summaries}) > FEW
    figure = figures.new_figure(15 if crowded else 11, 0.6 + (4.9 if crowded else 3.9) * len(groups))
    axes = figure.subplots(len(groups), 2, squeeze=False, sharey="row", width_ratios=[1.15, 1])
    figure.suptitle(title, fontsize=13, fontweight="bold")
    for (left, right), days in zip(axes, groups, strict=True):
        chosen = [summary for summary in summaries if summary.days == days]
        shown = _within_scale(chosen)
        _draw_methods(left, chosen, [row for row in rows if row["days"] == days], shown)
        _draw_sizes(right, shown)
        left.set_ylabel(f"test MAE, {quantity or 'units of the readings'}")
        several = any(len(summary.seeds) > 1 for summary in chosen)
        seeds = "a dot for each seed, bars: mean ± std" if several else "one seed"
        left.set_title(f"{days_name(days)}; {seeds}", fontsize=10.5)
        right.margins(y=0.18)  # the axis is shared
        right.set_title("the same, by the size of what was trained (dashed: nothing)", fontsize=10.5)
    figures.save_figure(figure, path)


def _within_scale(summaries: Sequence[Summary]) -> list[Summary]:
    """Methods whose errors one scale can show: an untrained one may be several times worse than the trained."""
    trained = [summary.mae.mean for summary in summaries if summary.trainable_parameters and summary.mae.mean]
    limit = 2 * max(trained, default=float("inf"))
    return [summary for summary in summaries if summary.mae.mean is None or summary.mae.mean <= limit]


def _draw_methods(axes: Axes, summaries: Sequence[Summary], rows: Sequence[Row], shown: Sequence[Summary]) -> None:
    """One column for each method: its seeds and their mean, or only the number where it is off the scale."""
    crowded = len(summaries) > FEW
    size = 8 if crowded else 9
    for place, summary in enumerate(summaries):
        colour, mean = figures.COLOURS.get(summary.method, figures.OTHER_COLOUR), summary.mae.mean
        if summary not in shown:
            text, edge = f"{mean:.3f} ↑", axes.get_xaxis_transform()
            axes.annotate(text, (place, 0.98), xycoords=edge, ha="center", va="top", fontsize=9, color=colour)
            continue
        mine = [row["mae"] for row in rows if row["method"] == summary.method and row["seed"] in summary.seeds]
        seeds = [mae for mae in mine if mae is not None]
        spread = np.linspace(-0.12, 0.12, len(seeds)) if len(seeds) > 1 else np.zeros(len(seeds))
        axes.scatter(place + spread, seeds, s=26, color=colour, alpha=0.55, zorder=3, linewidths=0)
        if mean is not None:
            axes.errorbar(place, mean, yerr=summary.mae.std, color=colour, capsize=5, marker="_", ms=24, mew=2.2)
            top = (place, max(mean + (summary.mae.std or 0), *seeds))
            axes.annotate(f"{mean:.3f}", top, (0, 7), textcoords="offset points", ha="center", fontsize=size)
    axes.set_xticks(range(len(summaries)), [summary.method for summary in summaries])
    if crowded:
        axes.tick_params(axis="x", labelsize=9, rotation=40)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.set_xlim(-0.6, len(summaries) - 0.4)
    axes.margins(y=0.18)


def _draw_sizes(axes: Axes, summaries: Sequence[Summary]) -> None:
    """One point for each trained method; what trains nothing is a line across."""
    axes.set_xscale("log")
    known = [(summary, summary.mae.mean) for summary in summaries if summary.mae.mean is not None]
    trained = sorted((pair for pair in known if pair[0].trainable_parameters), key=lambda pair: -pair[1])
    most = max((summary.trainable_parameters for summary, _ in trained), default=0)
    for number, (summary, mae) in enumerate(trained):
        colour, place = figures.COLOURS.get(summary.method, figures.OTHER_COLOUR), (summary.trainable_parameters, mae)
        axes.errorbar(*place, yerr=summary.mae.std, color=colour, marker="o", capsize=4)
        lowest = number == len(trained) - 1
        at_edge = len(trained) > FEW and summary.trainable_parameters == most
        # the lowest stays clear of its neighbour's name, the largest inside the frame and above the others
        offset, side = ((-8, 20), "right") if at_edge else ((8, -14 if lowest else 5), "left")
        words: dict[str, Any] = {"color": colour, "fontweight": "bold", "ha": side}
        axes.annotate(summary.method, place, offset, textcoords="offset points", **words)
    _draw_untrained(axes, [(summary.method, mae) for summary, mae in known if not summary.trainable_parameters])
    axes.set_xlabel("trained parameters (log scale)")
    counts = [summary.trainable_parameters for summary, _ in known if summary.trainable_parameters]
    if counts:
        axes.set_xlim(min(counts) / 2, max(counts) * 2.5)  # room for the names
        _write_counts(axes)
    else:
        axes.set_xticks([])


def _draw_untrained(axes: Axes, methods: Sequence[tuple[str, float]]) -> None:
    """Lines across, named at the left and the right end in turn, so that close ones stay readable."""
    for number, (name, mae) in enumerate(methods):
        colour, left = figures.COLOURS.get(name, figures.OTHER_COLOUR), number % 2 == 0
        axes.axhline(mae, color=colour, linestyle="--", linewidth=1)
        axes.annotate(
            name,
            (0.01 if left else 0.99, mae),
            (0, 3),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="left" if left else "right",
            color=colour,
            fontsize=9,
        )


def _write_counts(axes: Axes) -> None:
    """Write the numbers on a logarithmic axis out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 200 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
