import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_city import small_city
from test_reports import ROWS, row

from stlora_peft import figures
from stlora_peft.comparison_figure import draw_comparison
from stlora_peft.data import City
from stlora_peft.figures import draw_against_truth, draw_forecast, pick_nodes, require_matplotlib

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were written."""
    kept: list[Any] = []
    save = figures.save_figure

    def spy(figure: Any, path: Any) -> None:
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save_figure", spy)
    return kept


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_draw_comparison_shows_seeds_means_and_sizes(tmp_path: Path, drawn: list[Any]) -> None:
    path = tmp_path / "results.png"
    draw_comparison(path, ROWS, title="A to B", quantity="speed (km/h)")
    assert path.read_bytes().startswith(PNG)
    left, right = drawn[0].axes
    assert left.get_ylabel() == "test MAE, speed (km/h)"
    assert [label.get_text() for label in left.get_xticklabels()] == ["zero-shot", "head"]
    assert [dots.get_offsets()[:, 1].tolist() for dots in left.collections if len(dots.get_offsets())][:1] == [[3.0]]
    assert texts(left) == ["3.000", "1.500"]
    assert right.get_xscale() == "log"
    assert right.get_xlabel() == "trained parameters (log scale)"
    assert texts(right) == ["head", "zero-shot"]


def test_draw_comparison_writes_an_error_that_is_off_the_scale(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [row("zero-shot", 9.0, trained=0), row("full", 1.0), row("st-lora", 0.9)]
    draw_comparison(tmp_path / "results.png", rows, title="A to B", quantity="")
    left, right = drawn[0].axes
    assert texts(left) == ["9.000 ↑", "1.000", "0.900"]
    assert left.get_ylim()[1] < 2
    assert texts(right) == ["full", "st-lora"]


def test_draw_comparison_gives_each_number_of_days_its_panels(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [row("full", 1.0, days=3), row("full", 2.0, days=None), row("head", None, days=None)]
    draw_comparison(tmp_path / "results.png", rows, title="A to B", quantity="")
    titles = [axes.get_title().partition(";")[0] for axes in drawn[0].axes]
    assert titles[0::2] == ["3 days given", "all days before the test part given"]
    assert drawn[0].axes[0].get_ylabel() == "test MAE, units of the readings"


@pytest.mark.parametrize("known_start", [True, False])
def test_draw_forecast_joins_readings_and_forecast_in_units_and_times(
    tmp_path: Path, drawn: list[Any], known_start: bool
) -> None:
    city = small_city()
    city = city if known_start else replace(city, start=None)
    forecast = np.full((12, 4, 1), 40.0)
    draw_forecast(tmp_path / "f.png", city, 100, forecast, history=24, nodes=[2, 0, 1])
    panels = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["sensor small-2", "sensor small-0", "sensor small-1"]
    assert [axes.get_ylabel() for axes in panels] == ["speed"] * 3
    assert [axes.get_xlabel() for axes in panels] == ["", *["local time" if known_start else "day of the record"] * 2]
    reading, line = panels[0].get_lines()[:2]
    np.testing.assert_array_equal(reading.get_ydata(), city.values[77:113, 2, 0])
    np.testing.assert_array_equal(line.get_ydata(), [city.values[100, 2, 0], *[40.0] * 12])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["reading", "forecast"]


def test_draw_against_truth_shows_each_method(tmp_path: Path, drawn: list[Any]) -> None:
    city, steps = small_city(), range(50, 60)
    lines = {"zero-shot": np.zeros((10, 4)), "st-lora": np.ones((10, 4))}
    draw_against_truth(tmp_path / "f.png", city, steps, lines, nodes=[3], ahead_minutes=60)
    (axes,) = drawn[0].axes
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), city.values[50:60, 3, 0])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["reading", "zero-shot", "st-lora"]
    assert drawn[0].get_suptitle() == "small: forecasts made 60 minutes before, and readings"


def days(*levels: float) -> City:
    """A city whose sensors each keep to a level, one of them only by day."""
    values = np.repeat(np.array([levels], dtype=np.float32), 48, axis=0)
    values[12:24, -1] += 50
    values[36:48, -1] += 50
    nodes = np.arange(len(levels))
    edges = np.stack([nodes[:-1], nodes[1:]])
    return City(values, edges, np.ones(edges.shape[1]), 60, tuple(map(str, nodes)))


def test_pick_nodes_takes_sensors_whose_days_differ() -> None:
    chosen = pick_nodes(days(10, 11, 10.5, 90, 12), count=3)
    assert len(set(chosen)) == 3
    assert {3, 4} <= set(chosen)


def test_pick_nodes_leaves_out_sensors_with_few_readings_and_gives_no_more_than_there_are() -> None:
    city = days(10, 50, 90)
    city.values[:20, 2] = np.nan
    assert sorted(pick_nodes(city, count=2)) == [0, 1]
    assert sorted(pick_nodes(city, count=9)) == [0, 1, 2]


def test_require_matplotlib_without_it_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError) as error:
        require_matplotlib()
    lines = str(error.value).splitlines()
    assert lines[0] == "figures need a package that is not installed."
    assert lines[1] == "  expected: the package 'matplotlib'"
    assert lines[2].startswith("  got:      ")
    assert lines[3] == "  to fix:   pip install 'stlora-peft[figures]'"


def test_figures_leave_matplotlibs_global_state_alone(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_reports import ROWS\n"
        "from stlora_peft.comparison_figure import draw_comparison\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"draw_comparison({str(tmp_path / 'a.png')!r}, ROWS, title='', quantity='')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_a_figure_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="no space"):
        draw_comparison(tmp_path / "a.png", ROWS, title="", quantity="")
    assert list(tmp_path.iterdir()) == []
