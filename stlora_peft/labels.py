"""Places for the names of points in a figure, so that no name covers another, a point or a line. Geometry only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
DIAGONAL = 0.5**0.5
SIDES = (
    *((x, 0.0, x, slide) for x in (1.0, -1.0) for slide in (0.0, 0.5, -0.5)),
    *((x * DIAGONAL, y * DIAGONAL, x, y) for x in (1.0, -1.0) for y in (1.0, -1.0)),
    *((0.0, y, slide / 3, y) for y in (1.0, -1.0) for slide in (0, 1, -1, 2, -2, 3, -3)),
)
"""Where a label can be: the way to it, and how much of half its size it is shifted, so that the distance is exact."""
DISTANCES = (1.0, 1.6, 2.4, 3.5, 5.0, 7.0, 9.5)
FAR, CONFUSING = 8.0, 16.0  # cost of a unit of distance, in units of covered area
SWEEPS = 20


def place_labels(points: Array, sizes: Array, obstacles: Array, weights: Array, frame: Array, gap: float) -> Array:
    r"""Choose a place beside each point for its label.

    Candidates lie around the point on 24 sides and in 7 distances. A candidate box :math:`c` costs

    .. math::
        \sum_o w_o |c \cap o| + w_\infty \Bigl(\sum_l |c \cap l| + |c \setminus F|\Bigr)
        + 8 d + 16 \max(0, d + g - d')

    with obstacles :math:`o`, the other labels :math:`l`, the frame :math:`F`, :math:`w_\infty` twice the largest
    weight, the distance :math:`d` to its point, at least :math:`g`, and the distance :math:`d'` to the nearest other
    point, which should not look like the one that is meant. Labels take turns in choosing the cheapest place, until
    none moves or 20 turns are over.

    Args:
        points: Points to label.
        sizes: Width and height of each label.
        obstacles: Boxes to keep clear of: left, bottom, right, top.
        weights: How bad it is to cover a unit of area of each obstacle.
        frame: Box that labels must stay in.
        gap: Smallest distance between a point and its label.

    Returns:
        Centres of the labels.

    Shapes:
        - **points**, **sizes**, **output:** :math:`(K, 2)`
        - **obstacles:** :math:`(M, 4)`; **weights:** :math:`(M,)`; **frame:** :math:`(4,)`

    Example:
        >>> none, frame = np.empty((0, 4)), np.array([-100, -100, 100, 100])
        >>> place_labels(np.zeros((1, 2)), np.array([[20.0, 10.0]]), none, np.empty(0), frame, gap=5.0)
        array([[15., 0.]])
    """
    centres, distance = _candidates(points, sizes, gap)
    half = sizes[:, None] / 2
    boxes = np.concatenate([centres - half, centres + half], axis=2)  # (labels, candidates, 4)
    forbidden = 2 * max([1.0, *weights.tolist()])
    outside = np.prod(sizes, axis=1)[:, None] - _overlap(boxes, frame[None])[..., 0]
    fixed = _overlap(boxes, obstacles) @ weights + forbidden * outside + FAR * distance
    fixed += CONFUSING * (distance + gap - _nearest_other(boxes, points)).clip(min=0)
    fixed = fixed.round(6)  # of equal places the first is taken, not the one that rounding favours
    chosen = fixed.argmin(axis=1)
    for _ in range(SWEEPS):
        before = chosen.copy()
        for label in range(len(points)):
            others = boxes[np.arange(len(points)), chosen][np.arange(len(points)) != label]
            chosen[label] = (fixed[label] + forbidden * _overlap(boxes[label], others).sum(axis=-1)).argmin()
        if np.array_equal(before, chosen):
            break
    return np.array(centres[np.arange(len(points)), chosen])


def _candidates(points: Array, sizes: Array, gap: float) -> tuple[Array, Array]:
    """Centres of the boxes around each point, and how far they are from it; to the right comes first."""
    steps = gap * np.repeat(DISTANCES, len(SIDES))
    ways, shifts = np.hsplit(np.tile(SIDES, (len(DISTANCES), 1)), 2)
    return points[:, None] + ways * steps[:, None] + shifts * sizes[:, None] / 2, steps


def _nearest_other(boxes: Array, points: Array) -> Array:
    """Distance from each candidate box of each label to the nearest point that it does not belong to."""
    low, high = boxes[..., None, :2], boxes[..., None, 2:]
    apart = np.linalg.norm(points - np.clip(points, low, high), axis=-1)  # (labels, candidates, points)
    own = np.eye(len(points), dtype=bool)[:, None]
    return np.array(np.where(own, np.inf, apart).min(axis=-1, initial=np.inf))


def _overlap(boxes: Array, others: Array) -> Array:
    """Area that each box shares with each of the others, on a new last axis."""
    low = np.maximum(boxes[..., None, :2], others[:, :2])
    high = np.minimum(boxes[..., None, 2:], others[:, 2:])
    return np.array(np.prod((high - low).clip(min=0), axis=-1))


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Move places on a line apart, as little as possible in the sum of squares, keeping their order.

    Without their share of the gaps the places must not descend: neighbours that do share their mean.

    Args:
        places: Where the things are.
        gap: Smallest distance between two of them.

    Returns:
        Where they go, in the order given.

    Example:
        >>> spread_out([0.0, 10.0, 1.0], gap=3.0)
        [-1.0, 10.0, 2.0]

    References:
        Pooling of adjacent violators: Ayer et al., Annals of Mathematical Statistics 26(4), 1955.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([places[index] - rank * gap])
        while len(pools) > 1 and float(np.mean(pools[-2])) > float(np.mean(pools[-1])):
            last = pools.pop()
            pools[-1] = [*pools[-1], *last]
    level = [float(np.mean(pool)) for pool in pools for _ in pool]
    found = dict(zip(order, (value + rank * gap for rank, value in enumerate(level)), strict=True))
    return [found[index] for index in range(len(places))]
