"""The regression check of the speed benchmarks: ratios, never seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "bench.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(name: str, ratio: float, better: str = "higher", goal: float | None = None) -> dict[str, Any]:
    return {"name": name, "ratio": ratio, "goal": goal, "better": better}


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (row("a", 4.0), [row("a", 3.1)], []),
        (row("a", 4.0), [row("a", 2.9)], ["x, a: ratio 2.9 where it was 4 (higher is better)"]),
        (row("a", 1.0, "lower"), [row("a", 1.3, "lower")], []),
        (row("a", 1.0, "lower"), [row("a", 1.4, "lower")], ["x, a: ratio 1.4 where it was 1 (lower is better)"]),
        (row("a", 1.0), [row("b", 9.0)], ["x, a: not measured any more"]),
    ],
)
def test_only_what_is_clearly_worse_is_named(
    bench: Any, before: dict[str, Any], after: list[dict[str, Any]], lines: list[str]
) -> None:
    assert bench.regressions("x", [before], after) == lines


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (row("a", 4.0), "-"),
        (row("a", 4.0, goal=4.0), "yes"),
        (row("a", 3.9, goal=4.0), "**no**"),
        (row("a", 1.2, "lower", 1.1), "**no**"),
        (row("a", 1.0, "lower", 1.1), "yes"),
    ],
)
def test_a_goal_that_is_not_reached_is_said(bench: Any, found: dict[str, Any], word: str) -> None:
    assert bench.reached(found) == word


def test_rows_of_a_benchmark_are_its_ratios_where_it_has_some(bench: Any) -> None:
    one, other = row("a", 2.0), row("b", 3.0)
    assert bench.ratios({"rows": [one | {"seconds": 1}]}) == [one]
    assert bench.ratios({"rows": [{"size": 3}], "ratios": [other]}) == [other]


def test_every_benchmark_that_is_named_has_a_script_and_what_is_kept_has_the_four_fields(bench: Any) -> None:
    for name in bench.NAMES:
        assert (FILE.parent / name / "run.py").exists()
        for kept in bench.known(name):
            assert set(kept) == {"name", "ratio", "goal", "better"}
            assert kept["better"] in ("higher", "lower")
