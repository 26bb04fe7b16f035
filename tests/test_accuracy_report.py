"""The rows that the comparison of all methods keeps between runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ERRORS = {"mae": 1.0, "rmse": 1.0, "mape": 1.0}
MEASURED = {
    "horizons": dict.fromkeys(["3", "6", "12", "average"], ERRORS),
    "trainable_parameters": 1,
    "total_parameters": 1,
    "adapter_bytes": 1,
    "seconds": 1.0,
    "implementation": "",
}
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "accuracy"


@pytest.fixture(scope="module")
def report() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        import report

        return report
    finally:
        sys.path.remove(str(FOLDER))


def row(method: str, seed: int, mae: float, settings: str = "s", recipe: str = "r", **more: Any) -> dict[str, Any]:
    return {"method": method, "days": 3.0, "seed": seed, "mae": mae, "settings": settings, "recipe": recipe, **more}


def part(report: Any, *rows: dict[str, Any], days: float | None = 3.0) -> Any:
    return report.Part("unlike", "lstm", days, list(rows))


def maes(parts: list[Any]) -> list[list[float]]:
    return [[each["mae"] for each in one.rows] for one in parts]


def test_rows_are_kept_by_setting_and_found_again_part_by_part(report: Any, tmp_path: Path) -> None:
    rows = [row("full", 0, 1.0, daily=[[7, 1.5, 3]]), row("full", 1, 2.0), row("st-lora", 0, 0.5) | {"days": None}]
    kept = [{"backbone": "lstm", **each} for each in rows] + [{"backbone": "stgcn", **rows[0]}]
    report._keep_rows(tmp_path / "rows" / "unlike.json", kept)
    found = list(report.kept_parts(tmp_path))
    assert [one.key for one in found] == [("unlike", "lstm", 3.0), ("unlike", "lstm", None), ("unlike", "stgcn", 3.0)]
    assert found[0].rows == rows[:2]
    assert report.committed_rows(tmp_path, "unlike", "lstm", None) == rows[2:]
    assert report.committed_rows(tmp_path, "alike", "lstm", None) == []


def test_a_run_of_one_part_leaves_the_others_as_they_were(report: Any) -> None:
    other = part(report, row("full", 0, 9.0), days=None)
    found = report.joined([part(report, row("full", 0, 1.0)), other], [part(report, row("st-lora", 0, 0.5))])
    assert [one.days for one in found] == [3.0, None]
    assert maes(found) == [[0.5, 1.0], [9.0]]


@pytest.mark.parametrize(
    ("measured", "left"),
    [
        (row("full", 0, 5.0), [5.0, 2.0, 3.0]),  # the same row again
        (row("full", 2, 5.0), [5.0, 1.0, 2.0, 3.0]),  # another seed
        (row("full", 2, 5.0, recipe="new"), [5.0, 3.0]),  # the method is another one now
        (row("full", 2, 5.0, settings="new"), [5.0]),  # another backbone, city or budget
    ],
)
def test_measured_rows_take_the_place_of_kept_ones_that_cannot_stand_beside_them(
    report: Any, measured: dict[str, Any], left: list[float]
) -> None:
    kept = part(report, row("full", 0, 1.0), row("full", 1, 2.0), row("lora", 0, 3.0))
    assert maes(report.joined([kept], [part(report, measured)])) == [left]


def test_a_method_is_compared_with_the_best_rival_over_the_seeds_of_both(report: Any) -> None:
    ours = [row("st-lora", seed, mae) for seed, mae in enumerate([1.0, 3.0, 50.0])]
    full, lora = [row("full", 0, 4.0), row("full", 1, 4.0)], [row("lora", 1, 12.0)]
    one = part(report, *ours, *full, *lora)
    assert one.against(["full", "lora"]) == pytest.approx(2 / 4 - 1)
    assert one.against(["lora"]) == pytest.approx(3 / 12 - 1)
    assert one.against(["full", "head"]) is None
    assert part(report, *ours, row("full", 0, 4.0) | {"mae": None}).against(["full"]) is None


def test_goals_are_means_over_the_settings_that_have_both_sides(report: Any) -> None:
    def rows(ours: float, days: float) -> list[dict[str, Any]]:
        return [row("st-lora", 0, ours) | {"days": days}, row("full", 0, 2.0) | {"days": days}]

    parts = [
        part(report, *rows(1.5, 1.0), days=1.0),
        part(report, *rows(2.1, 3.0), row("lora", 0, 4.0)),
        part(report, *rows(1.0, 7.0), days=7.0),  # the goal is one of 1 and 3 days
        part(report, row("st-lora", 0, 1.0) | {"days": None}, days=None),
    ]
    lines = report.goal_lines(parts)
    assert "| 2 | `st-lora` | `full` | 1, 3 | -3 % | -10.0 % | -25.0 % | +5.0 % | 1 of 2 |" in lines
    assert "| 3 | `st-lora` | `full` | all | +0 % | - | - | - | 0 of 0 |" in lines
    settings = [line for line in lines if line.startswith("| unlike, lstm")]
    assert settings == [
        "| unlike, lstm, 1 day given | - | -25.0 % | - | - | - | - | - |",
        "| unlike, lstm, 3 days given | - | **+5.0 %** | - | - | - | - | - |",
    ]


def test_shares_of_trained_parameters_are_those_of_each_backbone_in_its_cities(report: Any) -> None:
    def rows(size: int, ours: int) -> list[dict[str, Any]]:
        return [
            row("zero-shot", 0, 1.0, total_parameters=size, trainable_parameters=0),
            row("st-lora", 0, 1.0, total_parameters=size + ours, trainable_parameters=ours),
        ]

    parts = [part(report, *rows(1000, 100)), part(report, *rows(2000, 600), days=1.0)]
    assert "| `lstm` | 1,000 to 2,000 | 10.0 % to 30.0 % | - | - |" in report.goal_lines(parts)
    assert "| `lstm` | 1,000 | 10.0 % | - | - |" in report.goal_lines(parts[:1])


def test_a_table_has_its_methods_in_one_order_whatever_was_measured_first(report: Any) -> None:
    found = [row(method, 0, 1.0, **MEASURED) for method in ("st-lora-gate", "full", "st-lora", "zero-shot")]
    lines = report._settings([part(report, *found)], {})
    named = [line.split("|")[1].strip() for line in lines if line.startswith("| `")]
    assert named == ["`zero-shot`", "`full`", "`st-lora`", "`st-lora-gate`"]
