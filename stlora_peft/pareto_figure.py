"""The figure of what accuracy costs: the error of each method against the parameters that it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from stlora_peft import figures
from stlora_peft.errors import message
from stlora_peft.labels import Array, place_labels, spread_out
from stlora_peft.pareto import OURS, Point, pareto_front, points_of, within_scale
from stlora_peft.reports import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

ACCENT = figures.COLOURS[OURS]
OTHERS = "#4f6d8f"
FRONT, NOTE = "#9a9a9a", "#555555"
MARKER, GAP, FONT = 6.5, 5.5, 8.0  # typographic points
Places = Sequence[Any]  # pairs of numbers
NOTE_WIDTH = 62  # characters
THIN: dict[str, Any] = {"color": "#888888", "linewidth": 0.6}


def draw_pareto(panels: Mapping[str, Sequence[Row]], unit: str | Mapping[str, str]) -> Figure:
    """Draw the MAE of each method against the parameters that it trains, a panel for each setting.

    Methods with ST-LoRA are filled diamonds, all others hollow circles; bars show the standard deviation over seeds. A
    method that trains nothing is a dashed line, named at the right edge. A line in steps joins the methods on the
    Pareto front. What is more than twice as bad as the best trained method, or not finite, is only written down.

    Args:
        panels: Rows by the title of their panel, with the keys ``method``, ``seed``, ``mae`` and
            ``trainable_parameters``, as :func:`stlora_peft.comparison.compare` gives them.
        unit: What is measured, with its unit: of all panels, or by title.

    Returns:
        The figure, for :func:`stlora_peft.figures.save_figure`.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no panel, or one has no rows.
    """
    _check_panels(panels)
    height = -(-len(panels) // 3)
    width = -(-len(panels) // height)
    figure = figures.new_figure(0.4 + 4.6 * width, 0.9 + 3.6 * height)
    grid = figure.subplots(height, width, squeeze=False).flatten().tolist()
    for axes in grid[len(panels) :]:
        axes.remove()
    drawn = [_Panel(axes, *_summarise(rows)) for axes, rows in zip(grid, panels.values(), strict=False)]
    for number, (panel, title) in enumerate(zip(drawn, panels, strict=True)):
        panel.draw(title)
        words = unit if isinstance(unit, str) else unit.get(title, "")
        if number % width == 0 or not isinstance(unit, str):
            panel.axes.set_ylabel(f"test MAE, {words or 'units of the readings'}")
        if number + width >= len(drawn):  # the lowest of each column
            panel.axes.set_xlabel("trained parameters (log scale)")
    _draw_legend(figure, columns=5 if width > 1 else 2)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # names are placed for the sizes that the panels have now
    for panel in drawn:
        panel.label()
    return figure


def _summarise(rows: Sequence[Row]) -> tuple[list[Point], list[str]]:
    """Methods that the scale can show, and lines on the others."""
    points, broken = points_of(rows)
    shown = within_scale(points)
    beyond = [f"{point.method} {point.mae:.3g}" for point in points if point not in shown]
    notes = [f"{words}: {', '.join(who)}" for words, who in (("off the scale", beyond), ("not finite", broken)) if who]
    return shown, [line for note in notes for line in wrap(note, NOTE_WIDTH)]


@dataclass(frozen=True)
class _Panel:
    """One setting: its axes, the methods on it, and notes on those that are not."""

    axes: Axes
    points: Sequence[Point]
    notes: Sequence[str]
    names: list[Annotation] = field(default_factory=list)  # of the lines, in the order of ``untrained``

    @property
    def trained(self) -> list[Point]:
        """Methods that are points; the others are lines across."""
        return [point for point in self.points if point.parameters]

    @property
    def untrained(self) -> list[Point]:
        """Methods that train nothing."""
        return [point for point in self.points if not point.parameters]

    def draw(self, title: str) -> None:
        """Draw all but the names of the points."""
        self.axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=6 + 11 * len(self.notes))
        for number, note in enumerate(reversed(self.notes)):
            place = (0, 5 + 11 * number)
            self.axes.annotate(
                note, (0, 1), place, xycoords="axes fraction", textcoords="offset points", fontsize=FONT, color=NOTE
            )
        self._draw_scale()
        for point in self.untrained:
            self.axes.axhline(point.mae, color=_colour(point), linestyle="--", linewidth=1, zorder=1)
            self.names.append(self._name_line(point))
        for is_ours in (False, True):
            self._draw_points([point for point in self.trained if point.is_ours == is_ours])
        self.axes.plot(*self.front().T, color=FRONT, linewidth=0.9, zorder=0.9)

    def _name_line(self, point: Point) -> Annotation:
        """Name a line in the right margin."""
        return self.axes.annotate(
            point.method,
            (1, point.mae),
            (10, 0),
            xycoords=self.axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=FONT,
            color=_colour(point),
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0, **THIN},
        )

    def _draw_scale(self) -> None:
        """A logarithmic axis with room for names on both sides; 12k stands for 12,000."""
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

        counts = [point.parameters for point in self.trained] or [1]
        orders = np.log10(max(counts) / min(counts))
        room = 10 ** (0.15 + 0.12 * orders)
        self.axes.set_xscale("log")
        self.axes.set_xlim(min(counts) / room, max(counts) * room)
        self.axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if orders > 1.5 else (1.0, 2.0, 5.0)))
        self.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        self.axes.xaxis.set_minor_formatter(NullFormatter())
        self.axes.margins(y=0.12)
        if not self.trained:
            self.axes.set_xticks([])

    def _draw_points(self, points: Sequence[Point]) -> None:
        """Markers and bars of methods of one kind."""
        if not points:
            return
        colour, bars = _colour(points[0]), [point.std or 0.0 for point in points]
        x, y = [point.parameters for point in points], [point.mae for point in points]
        self.axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=colour, elinewidth=1.1, capsize=2.5, zorder=2)
        self.axes.scatter(x, y, s=MARKER**2, zorder=3, **_style(points[0].is_ours))

    def front(self) -> Array:
        """Corners of the line in steps to the right edge; from the left one where a method of no cost is on it."""
        front = pareto_front(self.points)
        left, right = self.axes.get_xlim()
        places = [(float(point.parameters or left), point.mae) for point in front]
        corners = places[:1]
        for (_, before), place in pairwise(places):
            corners += [(place[0], before), place]
        return np.array([*corners, *[(right, mae) for _, mae in places[-1:]]]).reshape(-1, 2)

    def label(self) -> None:
        """Move the names of the lines apart and name the points; the layout must be known."""
        self.axes.autoscale(False)
        dpi = self.axes.figure.get_dpi()
        heights = self._pixels([(1.0, point.mae) for point in self.untrained])[:, 1]
        apart = spread_out(heights.tolist(), 1.25 * FONT * dpi / 72)
        for name, height, place in zip(self.names, heights, apart, strict=True):
            name.xyann = (10, (place - height) * 72 / dpi)
        self._label_points(dpi / 72)

    def _label_points(self, scale: float) -> None:
        """Name the points where nothing is covered; a name that is not beside its point gets a line to it.

        Args:
            scale: Pixels of a typographic point.
        """
        names = [self._name_point(point) for point in self.trained]
        places = self._pixels([(point.parameters, point.mae) for point in self.trained])
        sizes = np.reshape([name.get_window_extent().size for name in names], (-1, 2)) + 2 * scale  # with some air
        frame = np.array(self.axes.get_window_extent().extents)
        centres = place_labels(places, sizes, *self._obstacles(scale), frame, GAP * scale)
        for name, place, centre, size in zip(names, places, centres, sizes, strict=True):
            name.xyann = tuple((centre - place) / scale)
            self._draw_leader(place, centre, size, scale)

    def _name_point(self, point: Point) -> Annotation:
        """Write the name of a point onto it, from where it is moved."""
        return self.axes.annotate(
            point.method,
            (point.parameters, point.mae),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=FONT,
            fontweight="bold" if point.is_ours else "normal",
            color=_colour(point),
        )

    def _draw_leader(self, place: Array, centre: Array, size: Array, scale: float) -> None:
        """A line from a name to its point, where they are apart."""
        nearest = np.clip(place, centre - size / 2, centre + size / 2)
        if np.linalg.norm(nearest - place) > 2 * GAP * scale:
            ends = self.axes.transData.inverted().transform([place, nearest])
            self.axes.plot(*ends.T, zorder=1.5, **THIN)

    def _obstacles(self, scale: float) -> tuple[Array, Array]:
        """Boxes in pixels that names keep clear of, and how bad it is to cover them."""
        edges = self.axes.get_xlim()
        known: list[tuple[Places, float, float]] = []  # ends, margin, weight
        known += [([(edge, point.mae) for edge in edges], 1.0, 1.0) for point in self.untrained]
        known += [(pair, 1.0, 1.0) for pair in pairwise(self.front())]
        for point in self.trained:
            deviation = point.std or 0.0
            known.append(([(point.parameters, point.mae + sign * deviation) for sign in (-1, 1)], 2.5, 6.0))
            known.append(([(point.parameters, point.mae)], MARKER / 2 + 1, 8.0))
        boxes = [self._box(ends, margin * scale) for ends, margin, _ in known]
        return np.reshape(boxes, (-1, 4)), np.array([weight for _, _, weight in known])

    def _box(self, ends: Places, margin: float) -> Array:
        """The box around a level or upright line with a margin, in pixels."""
        pixels = self._pixels(ends)
        return np.concatenate([pixels.min(axis=0) - margin, pixels.max(axis=0) + margin])

    def _pixels(self, places: Places) -> Array:
        """Places in pixels."""
        return np.array(self.axes.transData.transform(np.reshape(places, (-1, 2))))


def _colour(point: Point) -> str:
    return ACCENT if point.is_ours else OTHERS


def _style(is_ours: bool) -> dict[str, Any]:
    """Filled diamonds and hollow circles differ without colour."""
    if is_ours:
        return {"marker": "D", "facecolors": ACCENT, "edgecolors": ACCENT}
    return {"marker": "o", "facecolors": "white", "edgecolors": OTHERS, "linewidths": 1.3}


def _draw_legend(figure: Figure, columns: int) -> None:
    """What markers and lines mean, once for all panels."""
    from matplotlib.lines import Line2D

    alone: dict[str, Any] = {"linestyle": "", "markersize": MARKER, "color": OTHERS}
    handles = [
        Line2D([], [], **{**alone, "color": ACCENT}, marker="D", label="with ST-LoRA"),
        Line2D([], [], **alone, marker="o", markerfacecolor="white", markeredgewidth=1.3, label="other methods"),
        Line2D([], [], **{**alone, "markersize": 12}, marker="|", label="mean ± std over seeds"),
        Line2D([], [], color=OTHERS, linestyle="--", linewidth=1, label="trains nothing"),
        Line2D([], [], color=FRONT, linewidth=0.9, label="Pareto front"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _check_panels(panels: Mapping[str, Sequence[Row]]) -> None:
    """Refuse a figure without anything to draw."""
    empty = [title for title, rows in panels.items() if not rows]
    if not panels or empty:
        raise ValueError(
            message(
                "there is nothing to draw",
                expected="at least one panel, and rows in each",
                got=f"no rows of {', '.join(repr(title) for title in empty)}" if empty else "no panel",
                fix="give the rows of a comparison by the title of their panel, and leave empty ones out",
            )
        )
