"""A city: readings of its sensors, the graph between them, and the file that holds both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stlora_peft.data.npz import file_label, read_npz
from stlora_peft.data.validation import (
    DeadSensors,
    check_alive,
    check_dead_sensors,
    checked_coordinates,
    checked_edge_index,
    checked_edge_weight,
    checked_interval,
    checked_node_ids,
    checked_start,
    checked_values,
    dead_nodes,
    fail,
)
from stlora_peft.errors import message
from stlora_peft.files import atomic_write

REQUIRED_KEYS = ("values", "edge_index", "edge_weight", "interval_minutes", "node_ids", "start")


@dataclass(frozen=True, eq=False)
class City:
    """Readings of a city's sensors and the road graph between them.

    Everything is checked when a city is made; an error names the city (or the file that it comes from), the key and
    the problem.

    Args:
        values: Readings, NaN where one is missing. An array (T, N) becomes (T, N, 1).
        edge_index: Directed edges, sources in row 0, targets in row 1, no self loops.
        edge_weight: Weight of each edge, at least 0, larger for closer sensors.
        interval_minutes: Minutes between two readings.
        node_ids: Stable names of the sensors, in the order of ``values``.
        start: Local time of the first reading (a datetime or ISO text), None where it is unknown.
        coordinates: Latitude and longitude of each sensor, where known.
        name: Name of the city, used in messages and tables.
        quantity: What is measured, with its unit, for axes and tables.
        dead_sensors: What to do with a sensor that has no reading at all: ``"error"`` or ``"keep"``.
        where: How error messages call this city, if not by its name.

    Shapes:
        - **values:** :math:`(T, N, C)`, float32
        - **edge_index:** :math:`(2, E)`, int64; **edge_weight:** :math:`(E,)`, float32
        - **coordinates:** :math:`(N, 2)`, float32

    Units:
        ``values`` in whatever was measured; ``interval_minutes`` in minutes; ``coordinates`` in degrees.

    Raises:
        ValueError: If an array has a wrong shape, kind or content.

    Example:
        >>> city = City(
        ...     values=np.array([[60.0, 55.0], [61.0, np.nan]]),
        ...     edge_index=np.array([[0], [1]]),
        ...     edge_weight=np.array([1.0]),
        ...     interval_minutes=5,
        ...     node_ids=("north", "south"),
        ... )
        >>> city.values.shape, city.steps_per_day
        ((2, 2, 1), 288.0)
    """

    values: npt.NDArray[np.float32]
    edge_index: npt.NDArray[np.int64]
    edge_weight: npt.NDArray[np.float32]
    interval_minutes: int
    node_ids: tuple[str, ...]
    start: datetime | None = None
    coordinates: npt.NDArray[np.float32] | None = None
    name: str = "city"
    quantity: str = ""
    dead_sensors: InitVar[DeadSensors] = field(default="error", kw_only=True)
    where: InitVar[str] = field(default="", kw_only=True)

    def __post_init__(self, dead_sensors: DeadSensors, where: str) -> None:
        """Bring every array into its form and check it."""
        where = where or f"city '{self.name}'"
        values = checked_values(where, self.values)
        num_nodes = values.shape[1]
        edges = checked_edge_index(where, self.edge_index, num_nodes)
        checked: dict[str, Any] = {
            "values": values,
            "edge_index": edges,
            "edge_weight": checked_edge_weight(where, self.edge_weight, edges.shape[1]),
            "interval_minutes": checked_interval(where, self.interval_minutes),
            "node_ids": checked_node_ids(where, self.node_ids, num_nodes),
            "start": checked_start(where, self.start),
        }
        if self.coordinates is not None:
            checked["coordinates"] = checked_coordinates(where, self.coordinates, num_nodes)
        for key, value in checked.items():
            object.__setattr__(self, key, value)
        check_dead_sensors(dead_sensors)
        if dead_sensors != "keep":
            check_alive(where, self.values, self.node_ids)

    @property
    def num_steps(self) -> int:
        """Length :math:`T` of the record."""
        return int(self.values.shape[0])

    @property
    def num_nodes(self) -> int:
        """Number :math:`N` of sensors."""
        return int(self.values.shape[1])

    @property
    def num_channels(self) -> int:
        """Number :math:`C` of quantities that each sensor reads."""
        return int(self.values.shape[2])

    @property
    def steps_per_day(self) -> float:
        """Readings in a day; below 1 for a record in steps of, for instance, a week."""
        return 24 * 60 / self.interval_minutes

    def select_nodes(self, nodes: Iterable[int]) -> City:
        """Keep some sensors and the edges between them.

        Args:
            nodes: Numbers of the sensors to keep, in their new order.

        Returns:
            A city of these sensors only, its edges renumbered.

        Raises:
            ValueError: If there is no such sensor, or one is named twice.

        Example:
            >>> city = City(np.ones((4, 3)), np.array([[0, 1], [1, 2]]), np.ones(2), 5, ("a", "b", "c"))
            >>> small = city.select_nodes([2, 1])
            >>> small.node_ids, small.edge_index.tolist()
            (('c', 'b'), [[1], [0]])
        """
        kept = np.asarray(list(nodes), dtype=np.int64)
        if len(kept) == 0 or len(np.unique(kept)) != len(kept) or kept.min() < 0 or kept.max() >= self.num_nodes:
            raise ValueError(
                message(
                    f"city '{self.name}': these sensors cannot be selected",
                    expected=f"at least one of the numbers 0 to {self.num_nodes - 1}, each at most once",
                    got=f"{kept.tolist()}",
                    fix="give places of sensors in node_ids",
                )
            )
        number = np.full(self.num_nodes, -1)
        number[kept] = np.arange(len(kept))
        edges = number[self.edge_index]
        inside = (edges >= 0).all(axis=0)
        return City(
            values=self.values[:, kept],
            edge_index=edges[:, inside],
            edge_weight=self.edge_weight[inside],
            interval_minutes=self.interval_minutes,
            node_ids=tuple(self.node_ids[i] for i in kept),
            start=self.start,
            coordinates=None if self.coordinates is None else self.coordinates[kept],
            name=self.name,
            quantity=self.quantity,
            dead_sensors="keep",
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the city to one ``.npz`` file, which appears whole or not at all.

        Args:
            path: Name of the file.
        """
        arrays: dict[str, Any] = {
            "values": self.values[..., 0] if self.num_channels == 1 else self.values,
            "edge_index": self.edge_index,
            "edge_weight": self.edge_weight,
            "interval_minutes": np.int64(self.interval_minutes),
            "node_ids": np.asarray(self.node_ids, dtype=np.str_),
            "start": np.str_("" if self.start is None else self.start.isoformat()),
            "name": np.str_(self.name),
            "quantity": np.str_(self.quantity),
        }
        if self.coordinates is not None:
            arrays["coordinates"] = self.coordinates
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        zeros_are_missing: bool = False,
        dead_sensors: DeadSensors = "error",
    ) -> City:
        """Read a city from a file that :meth:`save` wrote, or from one of the same keys.

        Args:
            path: The ``.npz`` file.
            zeros_are_missing: Take readings of exactly 0 as missing, as many detectors write them.
            dead_sensors: What to do with a sensor that has no reading at all: ``"error"``, ``"keep"``, or ``"drop"``
                it with its edges.

        Returns:
            The city.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, a key is missing, or an array is wrong.
        """
        arrays = read_npz(path)
        missing = [key for key in REQUIRED_KEYS if key not in arrays]
        if missing:
            fail(
                file_label(path),
                missing[0],
                "missing",
                expected=f"the keys {', '.join(REQUIRED_KEYS)}",
                got=f"the keys {', '.join(sorted(arrays)) or '(none)'}",
                fix="write the file with City.save, or add the missing keys",
            )
        return make_city(
            values=arrays["values"],
            edge_index=arrays["edge_index"],
            edge_weight=arrays["edge_weight"],
            interval_minutes=_scalar(path, arrays, "interval_minutes"),
            node_ids=arrays["node_ids"],
            start=_scalar(path, arrays, "start"),
            coordinates=arrays.get("coordinates"),
            name=str(_scalar(path, arrays, "name")) if "name" in arrays else Path(path).stem,
            quantity=str(_scalar(path, arrays, "quantity")) if "quantity" in arrays else "",
            where=file_label(path),
            zeros_are_missing=zeros_are_missing,
            dead_sensors=dead_sensors,
        )


def hash_with_city(content: object, city: City) -> str:
    """Hash settings together with a city: its readings, its graph and its clock.

    Args:
        content: The settings; what JSON does not know is written as its text.
        city: The city.

    Returns:
        16 hexadecimal digits.
    """
    known = [content, city.interval_minutes, city.start]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for array in (city.values, city.edge_index, city.edge_weight):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def make_city(*, values: Any, zeros_are_missing: bool, dead_sensors: DeadSensors, where: str, **rest: Any) -> City:
    """Make a city from what a file holds, with the choices that a user has when loading."""
    check_dead_sensors(dead_sensors)
    if zeros_are_missing:
        values = checked_values(where, values)
        values = np.where(values == 0, np.float32(np.nan), values)
    keep: DeadSensors = "keep" if dead_sensors == "drop" else dead_sensors
    city = City(values=values, dead_sensors=keep, where=where, **rest)
    dead = dead_nodes(city.values) if dead_sensors == "drop" else np.zeros(0, dtype=np.int64)
    if len(dead) == city.num_nodes:
        check_alive(where, city.values, city.node_ids)
    return city.select_nodes(np.setdiff1d(np.arange(city.num_nodes), dead)) if len(dead) else city


def _scalar(path: str | os.PathLike[str], arrays: dict[str, npt.NDArray[Any]], key: str) -> Any:
    """Take the single entry of a key."""
    if arrays[key].size != 1:
        fail(
            file_label(path),
            key,
            "not a single entry",
            expected="one entry",
            got=f"shape {arrays[key].shape}",
            fix=f"write one entry under '{key}'",
        )
    return arrays[key].item()
