from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pareto import rows
from toys import raised

pytest.importorskip("matplotlib")

from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from stlora_peft.figures import save_figure
from stlora_peft.pareto_figure import ACCENT, FRONT, OTHERS, THIN, draw_pareto

METHODS = {
    "zero-shot": (0, 3.55),
    "persistence": (0, 3.9),
    "ha": (0, 9.1),
    "svr": (0, 3.56),
    "scratch": (310_000, 3.35),
    "head": (6_200, 3.2),
    "norm": (2_100, 3.25),
    "full": (312_000, 2.95),
    "ia3": (1_300, 3.35),
    "lora": (21_000, 3.05),
    "st-lora-r4": (26_000, 2.97),
    "st-lora": (38_000, 2.92),
    "full+st-lora": (350_000, 2.88),
}
SMALL = [
    *rows("zero-shot", 3.0, 3.0, trained=0),
    *rows("head", 2.0, 2.5, trained=1_000),
    *rows("lora", 2.5, 2.5, trained=10_000),
    *rows("st-lora", 1.5, 1.7, trained=20_000),
]


def many(seed: int = 0, scale: float = 1.0) -> list[Any]:
    rng = np.random.default_rng(seed)
    found = []
    for method, (trained, mae) in METHODS.items():
        mean = scale * mae * (1 + rng.normal(0, 0.015))
        found += rows(method, *mean * (1 + rng.normal(0, 0.006 if trained else 0, 3)), trained=trained)
    return found


def offsets(axes: Any, colour: str) -> list[list[float]]:
    """Places of the points with an edge of this colour."""
    chosen = [dots for dots in markers(axes) if to_hex(dots.get_edgecolor()[0]) == colour]
    return [place for dots in chosen for place in dots.get_offsets().tolist()]


def markers(axes: Any) -> list[Any]:
    return [dots for dots in axes.collections if isinstance(dots, PathCollection)]


def extent(text: Any) -> Any:
    """Box of the letters alone, without the line to what they name."""
    return Text.get_window_extent(text)


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def front(axes: Any) -> list[list[float]]:
    """Corners of the line in steps: the only solid line of that colour."""
    (line,) = [line for line in axes.get_lines() if line.get_color() == FRONT]
    return np.transpose(line.get_data()).tolist()


def test_points_are_sizes_and_means_and_ours_are_filled() -> None:
    (axes,) = draw_pareto({"A to B": SMALL}, "km/h").axes
    assert axes.get_xscale() == "log"
    assert offsets(axes, OTHERS) == [[1_000, 2.25], [10_000, 2.5]]
    assert offsets(axes, ACCENT) == [[20_000, pytest.approx(1.6)]]
    hollow, filled = markers(axes)
    assert hollow.get_facecolor()[0].tolist() == [1, 1, 1, 1]
    assert filled.get_facecolor().tolist() == filled.get_edgecolor().tolist()
    assert len(hollow.get_paths()[0]) != len(filled.get_paths()[0])  # shapes differ too


def test_bars_are_one_deviation_long_to_both_sides() -> None:
    (axes,) = draw_pareto({"A to B": SMALL}, "km/h").axes
    bars = [bar for container in axes.containers for lines in container[2] for bar in lines.get_segments()]
    ends = {round(bar[0, 0]): bar[:, 1].tolist() for bar in bars}
    deviation = 0.5 / 2**0.5
    assert ends[1_000] == pytest.approx([2.25 - deviation, 2.25 + deviation])
    assert ends[10_000] == [2.5, 2.5]
    assert set(ends) == {1_000, 10_000, 20_000}


def test_what_trains_nothing_is_a_dashed_line_with_its_name() -> None:
    (axes,) = draw_pareto({"A to B": SMALL}, "km/h").axes
    (line,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert list(line.get_ydata()) == [3.0, 3.0]
    (name,) = [text for text in axes.texts if text.get_text() == "zero-shot"]
    assert extent(name).x0 > axes.get_window_extent().x1


def test_front_steps_down_from_the_untrained_line_over_the_best_to_the_right_edge() -> None:
    (axes,) = draw_pareto({"A to B": SMALL}, "km/h").axes
    left, right = axes.get_xlim()
    expected = [(left, 3.0), (1_000, 3.0), (1_000, 2.25), (20_000, 2.25), (20_000, 1.6), (right, 1.6)]
    np.testing.assert_allclose(front(axes), expected)


def test_front_without_an_untrained_method_begins_at_the_smallest() -> None:
    (axes,) = draw_pareto({"A to B": [row for row in SMALL if row["method"] != "zero-shot"]}, "km/h").axes
    assert front(axes)[0] == [1_000, 2.25]


def test_what_is_off_the_scale_or_not_finite_is_only_written_down() -> None:
    more = [*rows("ha", 9.123, trained=0), *rows("ia3", 3.3, trained=5), *rows("norm", None, 1.0), *SMALL]
    (axes,) = draw_pareto({"A to B": more}, "km/h").axes
    notes = [text for text in texts(axes) if ":" in text]
    assert sorted(notes) == ["not finite: norm", "off the scale: ha 9.12, ia3 3.3"]
    assert axes.get_ylim()[1] < 4
    assert sorted(set(texts(axes)) - set(notes)) == ["head", "lora", "st-lora", "zero-shot"]
    assert [place[0] for place in offsets(axes, OTHERS)] == [1_000, 10_000]


def test_long_notes_are_broken_into_lines() -> None:
    more = [row for number in range(9) for row in rows(f"a-long-name-{number}", 50.0, trained=0)]
    (axes,) = draw_pareto({"A to B": SMALL + more}, "km/h").axes
    notes = [text for text in axes.texts if "a-long-name" in text.get_text()]
    assert sum(note.get_text().count("50") for note in notes) == 9
    assert len({note.get_window_extent().y0 for note in notes}) == len(notes) > 2
    assert all(note.get_window_extent().y1 < axes.title.get_window_extent().y0 + 60 for note in notes)


@pytest.mark.parametrize(
    ("count", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (7, (3, 3))]
)
def test_panels_fill_a_grid_of_at_most_three_columns(count: int, grid: tuple[int, int]) -> None:
    figure = draw_pareto({f"city {number}": SMALL for number in range(count)}, "km/h")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"city {number}" for number in range(count)]
    assert figure.axes[0].get_gridspec().get_geometry() == grid
    named = [number for number, axes in enumerate(figure.axes) if axes.get_xlabel()]
    assert named == list(range(max(0, count - grid[1]), count))


def test_one_unit_is_written_once_in_a_row_and_several_at_each_panel() -> None:
    panels = {"a": SMALL, "b": SMALL}
    one = draw_pareto(panels, "km/h")
    two = draw_pareto(panels, {"a": "km/h"})
    assert [axes.get_ylabel() for axes in one.axes] == ["test MAE, km/h", ""]
    assert [axes.get_ylabel() for axes in two.axes] == ["test MAE, km/h", "test MAE, units of the readings"]


def covered(box: Any, other: Any) -> bool:
    return bool(min(box.x1, other.x1) > max(box.x0, other.x0) and min(box.y1, other.y1) > max(box.y0, other.y0))


@pytest.mark.parametrize("seed", range(3))
def test_names_in_the_saved_figure_cover_neither_each_other_nor_points(seed: int, tmp_path: Path) -> None:
    figure = draw_pareto({f"city {number}": many(4 * seed + number, 1 + number) for number in range(4)}, "km/h")
    save_figure(figure, tmp_path / "pareto.png")
    for axes in figure.axes:
        names = {text.get_text(): extent(text) for text in axes.texts if ":" not in text.get_text()}
        assert len(names) == len(METHODS) - 1  # without ha, which is a note
        assert [pair for pair in combinations(names, 2) if covered(names[pair[0]], names[pair[1]])] == []
        places = axes.transData.transform(offsets(axes, OTHERS) + offsets(axes, ACCENT))
        points = [Bbox([place - 4, place + 4]) for place in places]
        assert len(points) == 9
        assert [name for name, box in names.items() for point in points if covered(box, point)] == []


def test_lines_between_a_crowd_of_points_and_its_names_end_at_the_names(tmp_path: Path) -> None:
    crowd = [row for number in range(12) for row in rows(f"adapter-{number}", 2.0, trained=1000 + number)]
    figure = draw_pareto({"A to B": crowd}, "km/h")
    save_figure(figure, tmp_path / "pareto.png")
    (axes,) = figure.axes
    leaders = [line for line in axes.get_lines() if line.get_color() == THIN["color"]]
    assert len(leaders) > 2
    for line in leaders:
        end = axes.transData.transform(np.transpose(line.get_data())[-1])
        boxes = [extent(text).extents for text in axes.texts]
        assert min(np.linalg.norm(np.clip(end, box[:2], box[2:]) - end) for box in boxes) < 3


def test_saving_leaves_the_panels_where_the_names_were_placed(tmp_path: Path) -> None:
    lines = [row for number in range(12) for row in rows(f"line-{number}", 3 + number / 1e3, trained=0)]
    figure = draw_pareto({"A to B": SMALL + lines}, "km/h")
    before = figure.axes[0].get_position().bounds
    save_figure(figure, tmp_path / "pareto.png")
    assert figure.axes[0].get_position().bounds == before


def test_a_panel_without_any_trained_or_finite_method_is_drawn(tmp_path: Path) -> None:
    panels = {"none trained": rows("zero-shot", 3.0, trained=0), "none finite": rows("full", None)}
    figure = draw_pareto(panels, "km/h")
    save_figure(figure, tmp_path / "pareto.png")
    assert [texts(axes) for axes in figure.axes] == [["zero-shot"], ["not finite: full"]]


@pytest.mark.parametrize(
    ("panels", "got"), [({}, "no panel"), ({"a": SMALL, "b": [], "c": []}, "no rows of 'b', 'c'")]
)
def test_nothing_to_draw_is_refused(panels: Any, got: str) -> None:
    assert raised(lambda: draw_pareto(panels, "km/h")) == {
        "where": "there is nothing to draw",
        "expected": "at least one panel, and rows in each",
        "got": got,
        "fix": "give the rows of a comparison by the title of their panel, and leave empty ones out",
    }
