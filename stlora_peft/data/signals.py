"""Cities from the signals of torch-geometric-temporal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from stlora_peft.data.city import City
from stlora_peft.data.validation import check_option, fail

FeatureAxis = Literal["channels", "lags"]


def from_signal(
    signal: Any,
    *,
    interval_minutes: int,
    feature_axis: FeatureAxis = "channels",
    node_ids: Sequence[str] | None = None,
    start: str | datetime | None = None,
    name: str = "signal",
    quantity: str = "",
) -> City:
    """Turn a ``StaticGraphTemporalSignal`` of torch-geometric-temporal into a city.

    A signal is a list of snapshots, each one step later than the one before.

    - Features (N, F): with ``feature_axis="channels"`` the snapshot is one step of F channels. With ``"lags"`` it is
      a window of F steps of one channel, as the chickenpox loader makes them.
    - Features (N, F, W): a window of W steps of F channels, as the METR-LA and PEMS-BAY loaders make them.

    Windows overlap. The city takes the first step of each and all steps of the last one, after a check that they
    agree. Targets are not read: they are later steps of the same record, so the steps that only the last targets hold
    are lost. Self loops are left out. The loaders scale their readings, so the city's unit is theirs.

    Args:
        signal: The signal.
        interval_minutes: Minutes between two snapshots; a signal does not know it.
        feature_axis: What the second axis of (N, F) features is: ``"channels"`` or ``"lags"``.
        node_ids: Names of the sensors; None numbers them.
        start: Local time of the first step.
        name: Name of the city.
        quantity: What is measured.

    Returns:
        The city.

    Raises:
        ValueError: If the graph changes over time, a snapshot is empty, or windows do not overlap.
    """
    where = f"signal '{name}'"
    check_option("feature_axis", feature_axis, get_args(FeatureAxis))
    if getattr(signal, "edge_index", None) is None or any(part is None for part in signal.features):
        fail(
            where,
            "edge_index",
            "no static graph, or a snapshot without features",
            expected="a StaticGraphTemporalSignal with features in every snapshot",
            got=type(signal).__name__,
            fix="choose one graph for the whole record, and fill the empty snapshots with NaN",
        )
    values = _joined(where, [np.asarray(part, dtype=np.float32) for part in signal.features], feature_axis)
    edges = np.asarray(signal.edge_index)
    weight = np.ones(edges.shape[1]) if signal.edge_weight is None else np.asarray(signal.edge_weight)
    apart = edges[0] != edges[1]
    return City(
        values=values,
        edge_index=edges[:, apart],
        edge_weight=weight[apart].astype(np.float32),
        interval_minutes=interval_minutes,
        node_ids=tuple(map(str, range(values.shape[1]))) if node_ids is None else tuple(node_ids),
        start=start,  # type: ignore[arg-type]  # text is parsed by the city
        name=name,
        quantity=quantity,
        where=where,
    )


def _joined(where: str, parts: list[npt.NDArray[np.float32]], feature_axis: FeatureAxis) -> npt.NDArray[np.float32]:
    """Snapshots as one record (T, N, C)."""
    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or len(next(iter(shapes))) not in (2, 3):
        fail(
            where,
            "features",
            "snapshots are of different or unknown shape",
            expected="snapshots of one shape (N, F) or (N, F, W)",
            got=", ".join(map(str, sorted(shapes))) or "no snapshot",
            fix="give every snapshot the same sensors and features",
        )
    stacked = np.stack(parts)
    if stacked.ndim == 3 and feature_axis == "channels":
        return stacked
    windows = stacked[:, :, None] if stacked.ndim == 3 else stacked
    if not np.array_equal(windows[1:, ..., :-1], windows[:-1, ..., 1:], equal_nan=True):
        fail(
            where,
            "features",
            "windows do not overlap",
            expected="each window one step later than the one before",
            got="a window that differs from the shifted one before it",
            fix="keep the snapshots in order and unshuffled, or set feature_axis='channels' for features of one step",
        )
    return np.concatenate([windows[..., 0], np.moveaxis(windows[-1, ..., 1:], -1, 0)])
