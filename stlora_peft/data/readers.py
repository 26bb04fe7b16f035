"""Cities from the file formats of the field."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stlora_peft.data.city import City, make_city
from stlora_peft.data.graphs import Graph, read_graph, refuse_pickle
from stlora_peft.data.hdf import read_table, regular_steps
from stlora_peft.data.npz import file_label, read_npz, require_file
from stlora_peft.data.validation import DeadSensors, checked_values, fail
from stlora_peft.errors import message

HDF_SUFFIXES = (".h5", ".hdf5", ".hdf")
UNSAVED = ("dead_sensors", "where")


def load_city(
    path: str | os.PathLike[str],
    *,
    graph: str | os.PathLike[str] | None = None,
    ids: str | os.PathLike[str] | None = None,
    channels: Sequence[int] | None = None,
    interval_minutes: int | None = None,
    start: str | datetime | None = None,
    zeros_are_missing: bool = False,
    dead_sensors: DeadSensors = "error",
) -> City:
    """Read a city from any file format that the package knows.

    - ``.npz`` with ``values``: the format of :meth:`City.save`.
    - ``.npz`` with ``data`` (T, N, C): PeMS, with its list of distances (``from,to,cost``) as ``graph`` and, where
      that list names sensors that are not simply numbered (PEMS03), the file of names as ``ids``.
    - ``.h5``: METR-LA and PEMS-BAY, a pandas table with one column for each sensor and times as its index, with an
      adjacency matrix (``.npy`` or ``.csv``) or a list of distances as ``graph``. Steps that the index leaves out are
      missing readings. Only tables of pandas' default ("fixed") layout are read, with h5py, and nothing that is
      pickled in them.

    For the weights of the edges see :func:`stlora_peft.data.graphs.read_graph`.

    Args:
        path: File with the readings.
        graph: File with the graph, where the readings' file has none.
        ids: Text file with one sensor name in each line (PeMS only).
        channels: Which channels to keep, for instance ``[0]`` for the flow of PeMS; None keeps all.
        interval_minutes: Minutes between two readings, where the file does not say it; None means 5 for PeMS.
        start: Local time of the first reading, where the file does not say it.
        zeros_are_missing: Take readings of exactly 0 as missing, as METR-LA writes them.
        dead_sensors: What to do with a sensor without any reading: ``"error"``, ``"keep"``, or ``"drop"`` it.

    Returns:
        The city, named after the file.

    Raises:
        FileNotFoundError: If a file is absent.
        ImportError: If an HDF5 file is given and the package that reads it is not installed.
        ValueError: If a file is of no known format, damaged, or does not fit the others.

    Example:
        >>> import tempfile
        >>> from stlora_peft.data import simulate_city
        >>> path = Path(tempfile.mkdtemp()) / "village.npz"
        >>> simulate_city(num_nodes=4, days=1, seed=0).save(path)
        >>> load_city(path).num_nodes
        4
    """
    suffix = Path(path).suffix.lower()
    refuse_pickle(path)
    require_file(path)
    choices: dict[str, Any] = {"zeros_are_missing": zeros_are_missing, "dead_sensors": dead_sensors}
    if suffix == ".npz":
        arrays = read_npz(path)
        if "data" in arrays and "values" not in arrays:
            fields = _pems_fields(path, arrays["data"], graph, ids, interval_minutes or 5, start)
        else:
            _refuse_known(path, graph=graph, ids=ids, interval_minutes=interval_minutes)
            city = City.load(path, **choices)
            fields = {key: getattr(city, key) for key in City.__dataclass_fields__ if key not in UNSAVED}
            fields["start"] = _only_one(path, "start", city.start, start)
    elif suffix in HDF_SUFFIXES:
        _refuse_known(path, ids=ids, interval_minutes=interval_minutes, start=start)
        fields = _hdf_fields(path, graph)
    else:
        raise ValueError(
            message(
                f"{file_label(path)} is of no known format",
                expected=f"a suffix of .npz, {', '.join(HDF_SUFFIXES)}",
                got=repr(Path(path).suffix),
                fix="write the readings with City.save",
            )
        )
    fields["values"] = _selected(path, fields["values"], channels)
    return make_city(where=file_label(path), **fields, **choices)


def _pems_fields(
    path: str | os.PathLike[str],
    data: npt.NDArray[Any],
    graph: str | os.PathLike[str] | None,
    ids: str | os.PathLike[str] | None,
    interval_minutes: int,
    start: str | datetime | None,
) -> dict[str, Any]:
    """Fields of a city from a PeMS file and its companions."""
    values = checked_values(file_label(path), data)
    names = [str(i) for i in range(values.shape[1])]
    if ids is not None:
        require_file(ids)
        names = Path(ids).read_text(encoding="utf-8-sig").split()
    if len(names) != values.shape[1]:
        fail(
            file_label(ids or path),
            "ids",
            "another number of sensors than in 'data'",
            expected=f"{values.shape[1]} names, one in each line",
            got=f"{len(names)} names",
            fix="give the file of names of this data set",
        )
    return _fields(path, values, names, _required_graph(path, graph, names), interval_minutes, start)


def _hdf_fields(path: str | os.PathLike[str], graph: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Fields of a city from a pandas table in an HDF5 file."""
    values, names, times = read_table(path)
    values, start, minutes = regular_steps(path, values, times)
    return _fields(path, values, names, _required_graph(path, graph, names), minutes, start)


def _fields(
    path: str | os.PathLike[str],
    values: npt.NDArray[np.float32],
    names: Sequence[str],
    graph: Graph,
    interval_minutes: int,
    start: str | datetime | None,
) -> dict[str, Any]:
    """Name what a city is made of."""
    return {
        "values": values,
        "edge_index": graph[0],
        "edge_weight": graph[1],
        "interval_minutes": interval_minutes,
        "node_ids": tuple(names),
        "start": start,
        "name": Path(path).stem,
    }


def _required_graph(path: str | os.PathLike[str], graph: str | os.PathLike[str] | None, names: Sequence[str]) -> Graph:
    """Read the graph, which this format keeps in a file of its own."""
    if graph is None:
        fail(
            file_label(path),
            "graph",
            "no graph in a file of this format",
            expected="a second file: a list of distances (.csv) or an adjacency matrix (.npy, .csv)",
            got="graph=None",
            fix="give it as graph=..., then City.save writes both into one file",
        )
    return read_graph(graph, names)


def _selected(path: str | os.PathLike[str], values: npt.NDArray[Any], channels: Sequence[int] | None) -> Any:
    """Keep the chosen channels."""
    if channels is None:
        return values
    known = range(values.shape[-1])
    if not channels or any(channel not in known for channel in channels):
        fail(
            file_label(path),
            "channels",
            "no such channel",
            expected=f"some of the channels {list(known)}",
            got=f"channels={list(channels)}",
            fix="count the channels from 0",
        )
    return values[..., list(channels)]


def _refuse_known(path: str | os.PathLike[str], **options: object) -> None:
    """Raise where an option is given that the file itself answers."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        fail(
            file_label(path),
            given[0],
            "the file says this itself",
            expected=f"{given[0]}=None",
            got=f"{given[0]}={options[given[0]]!r}",
            fix=f"leave {given[0]} out",
        )


def _only_one(
    path: str | os.PathLike[str], name: str, in_file: datetime | None, given: str | datetime | None
) -> str | datetime | None:
    """The file's entry, or the user's where the file has none."""
    if in_file is not None:
        _refuse_known(path, **{name: given})
    return given if in_file is None else in_file
