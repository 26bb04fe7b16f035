"""What a city's arrays must fulfil; every violation names the place, the key and the problem."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from stlora_peft.errors import message

DeadSensors = Literal["error", "keep", "drop"]
Array = npt.NDArray[Any]


def fail(where: str, key: str, problem: str, *, expected: str, got: str, fix: str) -> NoReturn:
    """Raise a ValueError that names file or city, key and problem."""
    raise ValueError(message(f"{where}, key '{key}': {problem}", expected=expected, got=got, fix=fix))


def some(items: Iterable[object], limit: int = 8) -> str:
    """Join the first few items and count the rest."""
    known = [str(item) for item in items]
    rest = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(known[:limit]) + rest


def checked_values(where: str, values: object) -> npt.NDArray[np.float32]:
    """Readings as (T, N, C) float32, NaN where missing."""
    array = np.asarray(values)
    if array.ndim not in (2, 3):
        fail(
            where,
            "values",
            "wrong number of axes",
            expected="2 axes (T, N) or 3 axes (T, N, C)",
            got=f"shape {array.shape}",
            fix="put time on the first axis, sensors on the second and channels on the third",
        )
    _require_kind(where, "values", array, "fiu", "real numbers")
    array = array[..., None] if array.ndim == 2 else array
    if 0 in array.shape:
        fail(
            where,
            "values",
            "nothing in it",
            expected="at least one step, one sensor and one channel",
            got=f"shape {array.shape}",
            fix="give readings of at least one sensor",
        )
    with np.errstate(over="ignore"):  # too large for float32: reported as infinite below
        array = np.ascontiguousarray(array, dtype=np.float32)
    infinite = np.argwhere(np.isinf(array))
    if len(infinite):
        step, node, channel = infinite[0]
        fail(
            where,
            "values",
            "infinite reading",
            expected="finite numbers, and NaN where a reading is missing",
            got=f"{array[step, node, channel]} at step {step}, sensor number {node}, channel {channel}",
            fix="replace infinite readings by NaN",
        )
    return array


def checked_node_ids(where: str, node_ids: Iterable[object], num_nodes: int) -> tuple[str, ...]:
    """Names of the sensors as text, each one once."""
    if isinstance(node_ids, str) or np.ndim(np.asarray(node_ids)) != 1:
        fail(
            where,
            "node_ids",
            "not a list of names",
            expected=f"{num_nodes} names on one axis",
            got=f"shape {np.shape(np.asarray(node_ids))}",
            fix="give one name for each sensor, in the order of 'values'",
        )
    names = tuple(str(name) for name in node_ids)
    if len(names) != num_nodes:
        fail(
            where,
            "node_ids",
            "another number of sensors than in 'values'",
            expected=f"{num_nodes} names, as many as axis n of 'values'",
            got=f"{len(names)} names",
            fix="give one name for each sensor, in the order of 'values'",
        )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        fail(
            where,
            "node_ids",
            "a name stands for two sensors",
            expected="every name once",
            got=f"repeated: {some(repeated)}",
            fix="rename or remove the repeated sensors",
        )
    return names


def checked_edge_index(where: str, edge_index: object, num_nodes: int) -> npt.NDArray[np.int64]:
    """Directed edges as (2, E) int64 without self loops."""
    array = np.asarray(edge_index)
    if array.ndim != 2 or array.shape[0] != 2:
        fail(
            where,
            "edge_index",
            "wrong shape",
            expected="(2, E): sources in row 0, targets in row 1",
            got=f"shape {array.shape}",
            fix="give one column for each directed edge",
        )
    _require_kind(where, "edge_index", array, "iu", "whole numbers")
    array = np.ascontiguousarray(array, dtype=np.int64)
    outside = np.flatnonzero(((array < 0) | (array >= num_nodes)).any(axis=0))
    if len(outside):
        fail(
            where,
            "edge_index",
            "edge out of range",
            expected=f"sensor numbers from 0 to {num_nodes - 1}",
            got=f"{_edges(array, outside)}",
            fix="number the sensors by their place in 'values', starting at 0",
        )
    loops = np.flatnonzero(array[0] == array[1])
    if len(loops):
        fail(
            where,
            "edge_index",
            "self loop",
            expected="edges between two different sensors (layers that need self loops add their own)",
            got=f"{_edges(array, loops)}",
            fix="remove edges that end where they start, and their weights",
        )
    return array


def checked_edge_weight(where: str, edge_weight: object, num_edges: int) -> npt.NDArray[np.float32]:
    """One finite weight of at least 0 for each edge."""
    array = np.asarray(edge_weight)
    if array.shape != (num_edges,):
        fail(
            where,
            "edge_weight",
            "another number of edges than in 'edge_index'",
            expected=f"shape ({num_edges},)",
            got=f"shape {array.shape}",
            fix="give one weight for each column of 'edge_index'",
        )
    _require_kind(where, "edge_weight", array, "fiu", "real numbers")
    array = np.ascontiguousarray(array, dtype=np.float32)
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if len(wrong):
        problem = "negative weight" if array[wrong[0]] < 0 else "weight is not finite"
        fail(
            where,
            "edge_weight",
            problem,
            expected="finite weights of at least 0",
            got=some(f"{array[i]} at edge {i}" for i in wrong),
            fix="give similarities that are larger for closer sensors, for instance exp(-(distance / scale)**2)",
        )
    return array


def checked_coordinates(where: str, coordinates: object, num_nodes: int) -> npt.NDArray[np.float32]:
    """Latitude and longitude of each sensor."""
    array = np.asarray(coordinates)
    if array.shape != (num_nodes, 2):
        fail(
            where,
            "coordinates",
            "wrong shape",
            expected=f"({num_nodes}, 2): latitude and longitude of each sensor",
            got=f"shape {array.shape}",
            fix="give a place for each sensor, or leave the coordinates out",
        )
    _require_kind(where, "coordinates", array, "fiu", "real numbers")
    array = np.ascontiguousarray(array, dtype=np.float32)
    wrong = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(wrong):
        fail(
            where,
            "coordinates",
            "place is not finite",
            expected="finite latitudes and longitudes",
            got=f"sensor numbers {some(wrong)}",
            fix="give a place for each sensor, or leave the coordinates out",
        )
    return array


def checked_interval(where: str, interval_minutes: object) -> int:
    """Sampling step in whole minutes, at least 1."""
    try:
        minutes = operator.index(interval_minutes)  # type: ignore[arg-type]
    except TypeError:
        minutes = 0
    if minutes < 1:
        fail(
            where,
            "interval_minutes",
            "not a step of time",
            expected="a whole number of minutes, at least 1",
            got=repr(interval_minutes),
            fix="give the minutes between two readings, for instance 5",
        )
    return minutes


def checked_start(where: str, start: object) -> datetime | None:
    """Time of the first reading; None or an empty text where it is unknown."""
    if start is None or start == "":
        return None
    if isinstance(start, datetime):
        return start
    try:
        return datetime.fromisoformat(str(start))
    except ValueError:
        fail(
            where,
            "start",
            "not a time",
            expected="an ISO time such as '2012-03-01T00:00', or an empty text where it is unknown",
            got=repr(start),
            fix="write the time of the first reading as YYYY-MM-DDTHH:MM",
        )


def dead_nodes(values: Array) -> npt.NDArray[np.int64]:
    """Numbers of the sensors that have no finite reading in some channel."""
    alive = np.isfinite(values).any(axis=0).all(axis=-1)
    return np.flatnonzero(~alive)


def check_alive(where: str, values: Array, node_ids: tuple[str, ...]) -> None:
    """Raise where a sensor has no reading at all."""
    dead = dead_nodes(values)
    if len(dead):
        fail(
            where,
            "values",
            "no finite value in a sensor",
            expected="at least one reading of each sensor in each channel",
            got=f"none of {some(node_ids[i] for i in dead)}",
            fix="load with dead_sensors='drop' to leave these sensors and their edges out, or 'keep' to keep them",
        )


def check_dead_sensors(choice: str) -> None:
    """Raise where the option is none of the known ones."""
    check_option("dead_sensors", choice, get_args(DeadSensors))


def check_option(name: str, value: object, known: Iterable[object]) -> None:
    """Raise where an option has none of its known values."""
    known = tuple(known)
    if value not in known:
        choices = ", ".join(map(repr, known))
        raise ValueError(
            message(f"option '{name}' is unknown", expected=f"one of {choices}", got=repr(value), fix="choose one")
        )


def _require_kind(where: str, key: str, array: Array, kinds: str, expected: str) -> None:
    """Raise where the array holds something else than such numbers."""
    if array.dtype.kind not in kinds:
        fail(
            where,
            key,
            "wrong kind of entries",
            expected=expected,
            got=f"dtype {array.dtype}",
            fix=f"convert '{key}' to {expected} first",
        )


def _edges(edge_index: npt.NDArray[np.int64], which: npt.NDArray[np.int64]) -> str:
    """Describe some edges by number and ends."""
    return some(f"edge {i} from {edge_index[0, i]} to {edge_index[1, i]}" for i in which[:9])
