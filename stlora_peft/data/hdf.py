"""Tables of pandas in HDF5 files, read without pandas and PyTables: both unpickle what a file holds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from stlora_peft.data.npz import file_label
from stlora_peft.data.validation import checked_values, fail
from stlora_peft.errors import message

PARTS = ("axis0", "axis1", "block0_items", "block0_values")


def read_table(
    path: str | os.PathLike[str],
) -> tuple[npt.NDArray[np.float32], list[str], npt.NDArray[np.datetime64]]:
    """Read the one table in a file.

    Args:
        path: HDF5 file that pandas wrote in its default layout.

    Returns:
        Readings (T, N, 1), names of the sensors, and the time of each step.

    Raises:
        ImportError: If the package that reads HDF5 is not installed.
        ValueError: If the file holds no such table.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            message(
                f"{file_label(path)} needs a package that is not installed",
                expected="the package 'h5py'",
                got=str(error),
                fix="pip install stlora-peft[readers]",
            )
        ) from error
    try:
        with h5py.File(path, "r") as file:
            groups: list[Any] = []
            file.visititems(lambda _, item: groups.append(item) if "block0_values" in _names(item) else None)
            if len(groups) != 1 or "block1_values" in groups[0]:
                raise ValueError(f"{len(groups)} tables, or columns of several kinds")
            arrays = {name: groups[0][name][()] for name in PARTS}
            kind = _text(groups[0]["axis1"].attrs["kind"])
        if any(array.dtype.kind == "O" for array in arrays.values()):
            raise ValueError("pickled entries")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            message(
                f"{file_label(path)} cannot be read",
                expected="one pandas table of numbers, written by DataFrame.to_hdf(path, key='df')",
                got=str(error).strip("'\"") or type(error).__name__,
                fix="write the table again: columns are sensors, the index are times",
            )
        ) from error
    if not kind.startswith("datetime64") or not np.array_equal(arrays["axis0"], arrays["block0_items"]):
        fail(file_label(path), "index", "no times", expected="a DatetimeIndex", got=kind, fix="set the index to times")
    unit = kind.removeprefix("datetime64").strip("[]") or "ns"
    names = [_text(item) for item in arrays["axis0"].tolist()]
    times = arrays["axis1"].astype(f"datetime64[{unit}]").astype("datetime64[us]")
    return checked_values(file_label(path), arrays["block0_values"]), names, times


def regular_steps(
    path: str | os.PathLike[str], values: npt.NDArray[np.float32], times: npt.NDArray[np.datetime64]
) -> tuple[npt.NDArray[np.float32], datetime, int]:
    """Put readings on a regular clock, NaN at the steps that the index leaves out.

    Args:
        path: File that they come from, for messages.
        values: Readings (T, N, C).
        times: Time of each step.

    Returns:
        Readings, time of the first one, and minutes between two: the smallest gap in the index.

    Raises:
        ValueError: If the times do not grow, or are not on one clock of whole minutes.
    """
    gaps = np.diff(times).astype(np.int64)
    backward = np.flatnonzero(gaps <= 0)
    if len(backward):
        fail(
            file_label(path),
            "index",
            "time does not grow",
            expected="each time later than the one before",
            got=f"{times[backward[0]]} and then {times[backward[0] + 1]}",
            fix="sort the table by time and remove repeated rows",
        )
    gap = int(gaps.min()) if len(gaps) else 0
    minutes = gap // 60_000_000
    if minutes * 60_000_000 != gap or minutes < 1 or (gaps % gap).any():
        fail(
            file_label(path),
            "index",
            "times are not on one clock",
            expected="at least two times that lie whole steps of whole minutes apart",
            got=f"{len(times)} times, {gap / 60e6:g} minutes apart at least",
            fix="resample the table, for instance table.resample('5min').mean()",
        )
    steps = np.concatenate([[0], np.cumsum(gaps) // gap])
    whole = np.full((steps[-1] + 1, *values.shape[1:]), np.nan, dtype=np.float32)
    whole[steps] = values
    start: Any = times[0].astype("datetime64[us]").item()
    return whole, start, minutes


def _names(item: Any) -> Iterable[str]:
    """Names of what a group holds; a data set holds nothing by name."""
    return item.keys() if hasattr(item, "keys") else ()


def _text(item: object) -> str:
    """Text of a name or an attribute, which may be stored as bytes."""
    return item.decode(errors="replace") if isinstance(item, bytes) else str(item)
