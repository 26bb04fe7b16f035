"""Methods by what they cost and what they achieve, and which of them none other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stlora_peft.reports import Row, Spread

OURS = "st-lora"


@dataclass(frozen=True)
class Point:
    """A method: what it costs and what it achieves.

    Args:
        method: Name of the method.
        parameters: Parameters that it trains.
        mae: Mean of its MAE over seeds.
        std: Sample standard deviation over seeds, or None for fewer than two.
    """

    method: str
    parameters: int
    mae: float
    std: float | None = None

    @property
    def is_ours(self) -> bool:
        """Whether ST-LoRA is part of the method."""
        return OURS in self.method

    def dominates(self, other: Point) -> bool:
        """Whether this method is at least as good as another in both ways, and better in one."""
        mine, theirs = (self.parameters, self.mae), (other.parameters, other.mae)
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Methods of which none other is at least as good in both ways and better in one.

    Args:
        points: The methods.

    Returns:
        Those on the front, by ascending numbers of parameters.

    Example:
        >>> points = [Point("full", 900, 2.0), Point("st-lora", 90, 2.1), Point("lora", 90, 2.5)]
        >>> [point.method for point in pareto_front(points)]
        ['st-lora', 'full']
    """
    front = [point for point in points if not any(other.dominates(point) for other in points)]
    return sorted(front, key=lambda point: point.parameters)


def points_of(rows: Sequence[Row]) -> tuple[list[Point], list[str]]:
    """Put the rows of all seeds of a method together.

    Args:
        rows: Rows with the keys ``method``, ``mae`` and ``trainable_parameters``, as
            :func:`stlora_peft.comparison.compare` gives them.

    Returns:
        The methods in the order in which they first appear, and the names of those that have no mean: a seed of them
        is not finite.

    Example:
        >>> rows = [{"method": "full", "mae": mae, "trainable_parameters": 900} for mae in (1.0, 3.0)]
        >>> points_of(rows)
        ([Point(method='full', parameters=900, mae=2.0, std=1.4142135623730951)], [])
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    points, broken = [], []
    for method, mine in groups.items():
        count = mine[0]["trainable_parameters"]
        spread = Spread.of([row["mae"] for row in mine])
        if spread.mean is None:
            broken.append(method)
        else:  # without training all seeds are the same run
            points.append(Point(method, count, spread.mean, spread.std if count else None))
    return points, broken


def within_scale(points: Sequence[Point]) -> list[Point]:
    """Methods that a common scale can show: at most twice as bad as the best one that is trained.

    Args:
        points: The methods.

    Returns:
        Those that fit; all where none is trained.

    Example:
        >>> shown = within_scale([Point("zero-shot", 0, 9.0), Point("head", 5, 3.0), Point("full", 900, 2.0)])
        >>> [point.method for point in shown]
        ['head', 'full']
    """
    limit = 2 * min((point.mae for point in points if point.parameters), default=float("inf"))
    return [point for point in points if point.mae <= limit]
