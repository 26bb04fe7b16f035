from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stlora_peft.pareto import Point, pareto_front, points_of, within_scale


def rows(method: str, *maes: float | None, trained: int = 100) -> list[dict[str, Any]]:
    return [
        {"method": method, "seed": seed, "mae": mae, "trainable_parameters": trained} for seed, mae in enumerate(maes)
    ]


def names(points: list[Point]) -> list[str]:
    return [point.method for point in points]


def test_front_holds_what_no_other_method_beats_in_both_ways() -> None:
    points = [
        Point("full", 900, 2.0),
        Point("worse and larger", 950, 2.1),
        Point("st-lora", 90, 2.1),
        Point("same size, worse", 90, 2.5),
        Point("same error, larger", 100, 2.1),
        Point("zero-shot", 0, 3.0),
        Point("persistence", 0, 4.0),
        Point("worse than zero-shot", 5, 3.1),
    ]
    assert names(pareto_front(points)) == ["zero-shot", "st-lora", "full"]


def test_front_holds_both_of_two_equals() -> None:
    assert names(pareto_front([Point("a", 10, 1.0), Point("b", 10, 1.0), Point("c", 10, 1.5)])) == ["a", "b"]


def test_front_of_nothing_is_empty() -> None:
    assert pareto_front([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1))
def test_front_descends_and_leaves_out_only_what_it_beats(numbers: list[tuple[int, int]]) -> None:
    points = [Point(str(index), size, float(mae)) for index, (size, mae) in enumerate(numbers)]
    front = pareto_front(points)
    places = sorted({(point.parameters, point.mae) for point in front})
    assert all(a[1] > b[1] for a, b in pairwise(places))
    for point in points:
        beaten = any(f.parameters <= point.parameters and f.mae <= point.mae and f != point for f in front)
        assert point in front or beaten


def test_points_are_means_and_sample_deviations_over_seeds() -> None:
    points, broken = points_of([*rows("head", 1.0, 2.0, 6.0), *rows("full", 4.0, trained=900)])
    assert points == [Point("head", 100, 3.0, pytest.approx(7.0**0.5)), Point("full", 900, 4.0, None)]
    assert broken == []


def test_points_without_training_have_no_deviation() -> None:
    assert points_of(rows("zero-shot", 3.0, 3.0, trained=0)) == ([Point("zero-shot", 0, 3.0, None)], [])


def test_a_method_with_a_seed_that_is_not_finite_is_no_point() -> None:
    assert points_of([*rows("full", 1.0, None), *rows("head", 2.0)]) == ([Point("head", 100, 2.0, None)], ["full"])


def test_scale_reaches_to_twice_the_best_trained_error() -> None:
    points = [Point("a", 0, 1.0), Point("b", 10, 2.0), Point("c", 5, 4.0), Point("d", 0, 4.1), Point("e", 7, 9.0)]
    assert names(within_scale(points)) == ["a", "b", "c"]


def test_scale_shows_everything_where_nothing_is_trained() -> None:
    points = [Point("a", 0, 1.0), Point("b", 0, 90.0)]
    assert within_scale(points) == points


@pytest.mark.parametrize(
    ("method", "ours"), [("st-lora", True), ("full+st-lora", True), ("lora", False), ("full", False)]
)
def test_ours_is_what_st_lora_is_part_of(method: str, ours: bool) -> None:
    assert Point(method, 1, 1.0).is_ours is ours
