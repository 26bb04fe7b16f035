"""Figures, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stlora_peft.errors import message
from stlora_peft.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stlora_peft.data import City

Values = npt.NDArray[np.floating[Any]]
COLOURS = {
    "zero-shot": "#7f7f7f",
    "persistence": "#b0a080",
    "ha": "#bdbdbd",
    "var": "#9ebcda",
    "svr": "#8c96c6",
    "scratch": "#999933",
    "head": "#56b4e9",
    "norm": "#44aa99",
    "full": "#e69f00",
    "ia3": "#117733",
    "lora": "#009e73",
    "st-lora": "#cc3311",
    "full+st-lora": "#882255",
}
OTHER_COLOUR = "#0072b2"


def require_matplotlib() -> None:
    """Check that figures can be drawn, before long work whose result they would show.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            message(
                "figures need a package that is not installed",
                expected="the package 'matplotlib'",
                got=str(error),
                fix="pip install 'stlora-peft[figures]'",
            )
        ) from error


def draw_forecast(
    path: str | os.PathLike[str], city: City, step: int, forecast: Values, *, history: int, nodes: Sequence[int]
) -> None:
    """Draw what sensors read before a step, what is forecast after it, and what came where that is known.

    Args:
        path: PNG file to write.
        city: The city.
        step: Last step that the forecast saw.
        forecast: Forecast in the city's units, ``[t n c]``; the first channel is drawn.
        history: Steps to draw before.
        nodes: Sensors to draw.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, panels = _panels(city, nodes)
    first = max(0, step + 1 - history)
    known = range(first, min(city.num_steps, step + 1 + len(forecast)))
    ahead = range(step, step + 1 + len(forecast))
    for axes, node in zip(panels, nodes, strict=True):
        axes.plot(_times(city, known), city.values[known, node, 0], color="black", linewidth=1.4, label="reading")
        line = np.concatenate([city.values[step, node, :1], forecast[:, node, 0]])
        axes.plot(_times(city, ahead), line, color=COLOURS["st-lora"], linewidth=1.8, marker=".", label="forecast")
        axes.axvline(float(_times(city, ahead)[0]), color="#999999", linestyle=":", linewidth=1)
    _finish_panels(figure, panels, city, f"{city.name}: {len(forecast) * city.interval_minutes} minutes ahead")
    save_figure(figure, path)


def draw_against_truth(
    path: str | os.PathLike[str],
    city: City,
    steps: range,
    forecasts: Mapping[str, Values],
    *,
    nodes: Sequence[int],
    ahead_minutes: int,
) -> None:
    """Draw forecasts over time against what was read.

    Args:
        path: PNG file to write.
        city: The city.
        steps: Steps to draw.
        forecasts: Forecasts of these steps in the city's units, ``[t n]``, by the name of the method.
        nodes: Sensors to draw.
        ahead_minutes: How long before each step its forecast was made.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, panels = _panels(city, nodes)
    for axes, node in zip(panels, nodes, strict=True):
        axes.plot(_times(city, steps), city.values[steps, node, 0], color="black", linewidth=1, label="reading")
        for name, values in forecasts.items():
            colour = COLOURS.get(name, OTHER_COLOUR)
            axes.plot(_times(city, steps), values[:, node], color=colour, linewidth=1.5, alpha=0.9, label=name)
    _finish_panels(figure, panels, city, f"{city.name}: forecasts made {ahead_minutes} minutes before, and readings")
    save_figure(figure, path)


def pick_nodes(city: City, count: int = 4) -> list[int]:
    """Choose sensors whose days look as different as possible.

    Starts from the sensor nearest to the city's mean day and adds, one by one, the sensor whose mean day is farthest
    from all chosen ones. Sensors that lost more than a fifth of their readings are left out if enough others remain.

    Args:
        city: The city; its first channel counts.
        count: How many sensors.

    Returns:
        Numbers of the sensors, in the order of their choice.
    """
    days = _mean_days(city)
    missing = np.isnan(city.values[..., 0]).mean(axis=0)
    usable = np.flatnonzero(missing <= 0.2)
    candidates = usable if len(usable) >= count else np.arange(city.num_nodes)
    chosen = [int(candidates[np.linalg.norm(days[candidates] - days.mean(axis=0), axis=1).argmin()])]
    while len(chosen) < min(count, len(candidates)):
        apart = np.linalg.norm(days[candidates, None] - days[None, chosen], axis=2).min(axis=1)
        chosen.append(int(candidates[apart.argmax()]))
    return chosen


def _mean_days(city: City) -> Values:
    """Mean reading of each sensor in each hour of the day (of the record), missing ones filled by the city's mean."""
    minutes = np.arange(city.num_steps) * city.interval_minutes
    hours = (minutes // 60 % 24).astype(int)
    values = city.values[..., 0].astype(float)
    filled = np.where(np.isnan(values), np.nanmean(values), values)
    return np.stack([filled[hours == hour].mean(axis=0) for hour in np.unique(hours)], axis=1)


def _times(city: City, steps: range) -> Values:
    """Places of steps on the axis in days: matplotlib's, or those of the record where its start is unknown."""
    from matplotlib.dates import date2num

    first = 0.0 if city.start is None else float(date2num(city.start))  # type: ignore[no-untyped-call]
    return first + np.arange(steps.start, steps.stop) * city.interval_minutes / 1440


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in the one style of the package."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _panels(city: City, nodes: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """One panel for each sensor, two in a row."""
    columns = min(2, len(nodes))
    rows = -(-len(nodes) // columns)
    figure = new_figure(11 if columns == 2 else 7, 0.9 + 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten().tolist()
    panels, unused = grid[: len(nodes)], grid[len(nodes) :]
    for axes in unused:
        axes.remove()
    for axes, node in zip(panels, nodes, strict=True):
        axes.set_title(f"sensor {city.node_ids[node]}", fontsize=10.5, loc="left")
    for axes in panels[-columns:]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("day of the record" if city.start is None else "local time")
    return figure, panels


def _finish_panels(figure: Figure, panels: Sequence[Axes], city: City, title: str) -> None:
    """Units, times, one legend for all."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    for axes in panels:
        axes.set_ylabel(city.quantity.split(",")[0] or "reading", fontsize=9.5)
        if city.start is not None:
            locator = AutoDateLocator(minticks=4, maxticks=8)  # type: ignore[no-untyped-call]
            axes.xaxis.set_major_locator(locator)
            axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    figure.suptitle(title, fontsize=13, fontweight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _tidy(axes: Axes) -> None:
    """A light grid and no box."""
    axes.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure whole or not at all."""
    for axes in figure.axes:
        _tidy(axes)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
