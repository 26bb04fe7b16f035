from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stlora_peft.labels import place_labels, spread_out

FRAME = np.array([0.0, 0.0, 600.0, 400.0])
SIZE = np.array([60.0, 14.0])
NOTHING = (np.empty((0, 4)), np.empty(0))


def shared(box: np.ndarray, other: np.ndarray) -> float:
    """Area that two boxes share, written out."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def boxes(points: Any, obstacles: Any = NOTHING[0], weights: Any = NOTHING[1], gap: float = 8.0) -> np.ndarray:
    points = np.reshape(points, (-1, 2)).astype(float)
    sizes = np.tile(SIZE, (len(points), 1))
    centres = place_labels(points, sizes, np.reshape(obstacles, (-1, 4)), np.asarray(weights, float), FRAME, gap)
    return np.hstack([centres - sizes / 2, centres + sizes / 2])


def distance(point: Any, box: np.ndarray) -> float:
    return float(np.linalg.norm(np.clip(point, box[:2], box[2:]) - point))


def test_a_point_alone_has_its_label_to_the_right() -> None:
    assert boxes([300, 200]).tolist() == [[308, 193, 368, 207]]


@pytest.mark.parametrize("point", [(600, 200), (0, 200), (300, 0), (300, 400), (0, 0), (600, 400)])
def test_labels_stay_in_the_frame(point: tuple[float, float]) -> None:
    (box,) = boxes(point)
    assert shared(box, FRAME) == pytest.approx(SIZE.prod())
    assert distance(point, box) == pytest.approx(8)


def test_labels_keep_clear_of_obstacles() -> None:
    wall = np.array([305.0, 0.0, 400.0, 400.0])
    (box,) = boxes([300, 200], [wall], [4.0])
    assert shared(box, wall) == 0
    assert box[2] <= 305


@pytest.mark.parametrize(("light", "heavy"), [(0, 1), (1, 0)])
def test_where_something_must_be_covered_it_is_what_weighs_less(light: int, heavy: int) -> None:
    halves = np.array([[0.0, 0.0, 600.0, 200.0], [0.0, 200.0, 600.0, 400.0]])
    weights = np.ones(2)
    weights[heavy] = 5.0
    (box,) = boxes([300, 200], halves, weights)
    assert shared(box, halves[heavy]) == 0
    assert shared(box, halves[light]) > 0


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_a_crowd_cover_neither_each_other_nor_points(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform([50, 50], [550, 350], (14, 2))
    markers = np.hstack([points - 5, points + 5])
    placed = boxes(points, markers, np.full(14, 5.0))
    assert max(shared(a, b) for i, a in enumerate(placed) for b in placed[:i]) == 0
    assert max(shared(label, marker) for label in placed for marker in markers) == 0
    assert all(shared(label, FRAME) == pytest.approx(SIZE.prod()) for label in placed)


def test_labels_of_neighbours_are_nearer_to_their_own_point() -> None:
    points = [(300, 200), (330, 200)]
    left, right = boxes(points)
    assert distance(points[0], left) < distance(points[1], left)
    assert distance(points[1], right) < distance(points[0], right)


def test_no_points_have_no_labels() -> None:
    assert boxes([]).shape == (0, 4)


def test_spread_out_moves_by_the_least_squares() -> None:
    assert spread_out([5.0, 5.0, 5.0, 40.0], gap=2.0) == [3.0, 5.0, 7.0, 40.0]
    assert spread_out([], gap=2.0) == []


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12), st.floats(0.1, 20))
def test_spread_out_keeps_distance_order_and_mean(places: list[float], gap: float) -> None:
    found = spread_out(places, gap)
    order = sorted(range(len(places)), key=lambda index: places[index])
    steps = np.diff([found[index] for index in order])
    assert (steps >= gap - 1e-9).all()
    assert np.mean(found) == pytest.approx(np.mean(places), abs=1e-9)


@given(st.lists(st.integers(-50, 50), unique=True, min_size=1))
def test_spread_out_leaves_alone_what_is_apart(places: list[int]) -> None:
    assert spread_out([float(place) for place in places], gap=1.0) == pytest.approx(places)
