from pathlib import Path
from typing import Any

import pytest

from stlora_peft.reports import Spread, in_order, markdown_table, summarise, write_markdown
from stlora_peft.significance import Difference


def row(method: str, mae: float | None, seed: int = 0, days: float | None = 3, trained: int = 100) -> dict[str, Any]:
    errors = {"mae": mae, "rmse": 2.0, "mape": 10.0}
    return {
        "method": method,
        "implementation": f"how {method} works",
        "days": days,
        "seed": seed,
        "horizons": {"3": errors, "average": errors},
        "mae": mae,
        "trainable_parameters": trained,
        "total_parameters": 1000,
        "adapter_bytes": 2048,
        "seconds": 4.0 + seed,
    }


ROWS = [
    row("zero-shot", 3.0, 0, trained=0),
    row("zero-shot", 3.0, 1, trained=0),
    row("head", 1.0),
    row("head", 2.0, 1),
]


def test_spread_of_three_values_is_mean_and_sample_deviation() -> None:
    spread = Spread.of([1.0, 2.0, 6.0])
    assert spread.mean == 3.0
    assert spread.std == pytest.approx(7.0**0.5)


def test_spread_with_a_value_that_is_not_finite_has_no_mean() -> None:
    assert Spread.of([1.0, None]) == Spread(None)
    assert Spread.of([]) == Spread(None)


def test_summarise_puts_seeds_together_and_keeps_the_order() -> None:
    zero, head = summarise(ROWS)
    assert (zero.method, head.method) == ("zero-shot", "head")
    assert head.seeds == (0, 1)
    assert head.errors["3"]["mae"] == head.mae == Spread.of([1.0, 2.0])
    assert head.seconds == 4.5


def test_summarise_untrained_method_counts_once_and_has_no_spread() -> None:
    zero = summarise(ROWS)[0]
    assert zero.seeds == (0,)
    assert zero.mae == Spread(3.0, None)


def test_summarise_keeps_days_apart() -> None:
    summaries = summarise([row("full", 1.0, days=3), row("full", 2.0, days=7)])
    assert [(summary.days, summary.mae.mean) for summary in summaries] == [(3, 1.0), (7, 2.0)]


def test_markdown_table_has_units_spread_and_the_lowest_mae_in_bold() -> None:
    ahead = {(3, "zero-shot"): Difference(-0.5, -0.6, -0.4, 0.01), (3, "head"): Difference(0.1)}
    assert markdown_table(summarise(ROWS), 5, ahead) == [
        "| method | MAE | MAE 15 min | RMSE | MAPE % | st-lora to it | trained parameters | file KiB | s to best "
        "| training s | peak MiB | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| `zero-shot` | 3.000 | 3.000 | 2.000 | 10.0 | -50.0 % (-60.0 to -40.0) | 0 | 2 | - | 4 | - | - |",
        "| `head` | **1.500 ± 0.707** | 1.500 ± 0.707 | 2.000 ± 0.000 | 10.0 ± 0.0 | +10.0 % | 100 | 2 | - | 4 | - "
        "| 0, 1 |",
    ]


def test_markdown_table_shows_the_time_of_the_search_and_the_largest_memory() -> None:
    rows = [row("head", 1.0) | {"seconds_to_best": 12.4, "peak_memory": 3 << 20}]
    rows += [row("head", 1.0, 1) | {"seconds_to_best": None, "peak_memory": 5 << 20}]
    cells = markdown_table(summarise(rows), 5)[2].split(" | ")
    assert cells[-4:] == ["12", "4", "5", "0, 1 |"]


def test_markdown_table_without_any_finite_mae_has_nothing_in_bold() -> None:
    lines = markdown_table(summarise([row("full", None)]), interval_minutes=5)
    assert lines[2].startswith("| `full` | - | - | 2.000 |")
    assert "**" not in lines[2]


def test_write_markdown_says_unit_days_methods_settings_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    write_markdown(
        path,
        [*ROWS, row("full", 4.0, days=None)],
        title="A to B",
        quantity="speed (km/h)",
        interval_minutes=5,
        settings={"city": "B: 5 sensors"},
        figure="results.png",
    )
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# A to B"
    assert "Errors on the test part, the last 20 % of the record; MAE and RMSE: speed (km/h)." in lines
    assert [line for line in lines if line.startswith("## ")] == [
        "## 3 days given",
        "## All days before the test part given",
        "## Methods",
        "## Settings",
    ]
    assert "- `head`: how head works" in lines
    assert "| city | B: 5 sensors |" in lines
    assert "![MAE of the methods, and MAE against trained parameters](results.png)" in lines
    assert any(line.startswith("| torch | 2.") for line in lines)
    assert not (tmp_path / "results.png").exists()


def test_rows_stand_in_the_order_asked_for_after_the_others_and_seeds_as_they_were() -> None:
    rows = [{"method": method, "seed": seed} for method, seed in (("c", 1), ("a", 0), ("b", 0), ("a", 1), ("c", 0))]
    found = in_order(rows, ["b", "a"])
    assert [(one["method"], one["seed"]) for one in found] == [("c", 1), ("c", 0), ("b", 0), ("a", 0), ("a", 1)]
