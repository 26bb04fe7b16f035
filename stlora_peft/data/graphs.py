"""Road graphs from the files that the field uses: lists of distances and adjacency matrices."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stlora_peft.data.validation import fail, some
from stlora_peft.errors import message

Graph = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def read_graph(path: str | os.PathLike[str], node_ids: Sequence[str]) -> Graph:
    r"""Read the graph between known sensors.

    A CSV with a header (source, target, distance) is a list of directed edges; they get the weights

    .. math::
        w_{ij} = \exp\big(-(d_{ij} / \sigma)^2\big)

    with the standard deviation :math:`\sigma` of the distances. A ``.npy`` file, or a CSV of numbers only, is an
    adjacency matrix whose entries are the weights. Self loops are left out, and of repeated edges the first is taken.

    Args:
        path: The file.
        node_ids: Names of the sensors, in their order; a list names sensors like this.

    Returns:
        ``edge_index`` (2, E) and ``edge_weight`` (E,).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read or does not fit the sensors.
    """
    refuse_pickle(path)
    where = f"graph file '{os.fspath(path)}'"
    if not Path(path).is_file():
        raise FileNotFoundError(message(f"{where} is missing", expected="a file", got="nothing", fix="check the path"))
    if Path(path).suffix == ".npy":
        return _from_matrix(where, _load_npy(where, path), len(node_ids))
    rows = _read_csv(where, path)
    if _is_number(rows[0][0]) and len(rows[0]) == len(node_ids):
        return _from_matrix(where, _numbers(where, rows), len(node_ids))
    return _from_distances(where, rows, node_ids)


def refuse_pickle(path: str | os.PathLike[str]) -> None:
    """Raise where a file is a pickle, which could run any code when it is opened."""
    if Path(path).suffix.lower() in (".pkl", ".pickle"):
        raise ValueError(
            message(
                f"file '{os.fspath(path)}' is a pickle, which can run any code when it is opened",
                expected="an adjacency matrix as .npy or .csv, or a list of distances as .csv",
                got=f"a {Path(path).suffix} file",
                fix="convert it once where you trust it, for instance np.save('adj.npy', matrix)",
            )
        )


def _from_matrix(where: str, matrix: npt.NDArray[Any], num_nodes: int) -> Graph:
    """Edges where the matrix is not 0, without its diagonal."""
    if matrix.shape != (num_nodes, num_nodes) or matrix.dtype.kind not in "fiub":
        fail(
            where,
            "adjacency",
            "not a matrix between the sensors",
            expected=f"numbers of shape ({num_nodes}, {num_nodes})",
            got=f"{matrix.dtype} of shape {matrix.shape}",
            fix="give the matrix of the same sensors, in the order of the readings",
        )
    apart = matrix.astype(np.float32) * (1 - np.eye(num_nodes, dtype=np.float32))
    edge_index = np.stack(np.nonzero(apart)).astype(np.int64)
    return edge_index, apart[edge_index[0], edge_index[1]]


def _from_distances(where: str, rows: list[list[str]], node_ids: Sequence[str]) -> Graph:
    """Edges of a list of distances, weighted by a Gaussian kernel."""
    header, body = rows[0], [row for row in rows[1:] if row]
    number = {name: i for i, name in enumerate(node_ids)}
    distances: dict[tuple[int, int], float] = {}
    for line, row in enumerate(body, start=2):
        if len(row) < 3 or not _is_number(row[2]) or not 0 <= float(row[2]) < np.inf:
            fail(
                where,
                ",".join(header),
                f"line {line} is not an edge",
                expected="source, target and a finite distance of at least 0",
                got=",".join(row),
                fix="mend or remove the line",
            )
        unknown = [name for name in row[:2] if name.strip() not in number]
        if unknown:
            fail(
                where,
                ",".join(header[:2]),
                f"line {line} names no sensor of the readings",
                expected=f"names such as {some(node_ids, 3)}",
                got=f"{some(unknown)}",
                fix="give the file with the sensors' names as ids=..., or remove the line",
            )
        distances.setdefault((number[row[0].strip()], number[row[1].strip()]), float(row[2]))
    pairs = {pair: distance for pair, distance in distances.items() if pair[0] != pair[1]}
    edge_index = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
    length = np.array(list(pairs.values()), dtype=np.float64)
    scale = length.std() if len(length) else 0.0
    weight = np.exp(-((length / scale) ** 2)) if scale > 0 else np.ones_like(length)
    return edge_index, weight.astype(np.float32)


def _load_npy(where: str, path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Read an array of numbers."""
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            message(
                f"{where} cannot be read",
                expected="a whole .npy file of numbers",
                got=str(error).splitlines()[0],
                fix="write the file again; arrays of Python objects must be converted before",
            )
        ) from error


def _read_csv(where: str, path: str | os.PathLike[str]) -> list[list[str]]:
    """Read the rows of a CSV file, at least one."""
    try:
        rows = list(csv.reader(Path(path).read_text(encoding="utf-8-sig").splitlines()))
    except UnicodeDecodeError:
        rows = []
    if not rows or not rows[0]:
        raise ValueError(
            message(f"{where} cannot be read", expected="lines of CSV", got="no text", fix="write the file again")
        )
    return rows


def _numbers(where: str, rows: list[list[str]]) -> npt.NDArray[np.float64]:
    """Rows of a CSV file as a matrix."""
    try:
        return np.array([[float(entry) for entry in row] for row in rows if row])
    except ValueError as error:
        fail(
            where,
            "adjacency",
            "not a matrix",
            expected="rows of numbers of one length",
            got=str(error),
            fix="mend the row, or write the matrix as .npy",
        )


def _is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
