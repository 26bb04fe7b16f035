"""Windows of a record, gathered by indexing when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, get_args

import torch
from torch.utils.data import Dataset

from stlora_peft.data.validation import check_option
from stlora_peft.errors import message

TimeFeatures = Literal["none", "day", "week"]


class Windows(Dataset[dict[str, torch.Tensor]]):
    r"""Pairs of an input window and the steps that follow it.

    Window :math:`i` starts at step :math:`s_i`:

    .. math::
        x_i = \mathrm{series}[s_i : s_i + W], \qquad y_i = \mathrm{targets}[s_i + W : s_i + W + H]

    No window is stored: a single one is a view of the series, a batch is gathered when it is asked for.

    Args:
        series: What a model reads: scaled values without gaps, then time encodings.
        targets: What it is to forecast, in the city's unit, NaN where missing.
        starts: First step of each window.
        window: Input steps :math:`W`.
        horizon: Forecast steps :math:`H`.

    Shapes:
        - **series:** :math:`(T, N, C_{in})`; **targets:** :math:`(T, N, C)`; **starts:** number of windows
        - **x:** ``[b t n c]`` with ``window`` on ``t``; **y:** ``[b t n c]`` with ``horizon`` on ``t``

    Raises:
        ValueError: If window or horizon is below 1, the lengths differ, or a window leaves the record.

    Example:
        >>> series = torch.arange(10.0).reshape(10, 1, 1)
        >>> windows = Windows(series, series, torch.tensor([0, 3]), window=4, horizon=2)
        >>> windows[1]["x"].flatten(), windows[1]["y"].flatten()
        (tensor([3., 4., 5., 6.]), tensor([7., 8.]))
        >>> windows.__getitems__([0, 1])["x"].shape
        torch.Size([2, 4, 1, 1])
    """

    def __init__(
        self, series: torch.Tensor, targets: torch.Tensor, starts: torch.Tensor, *, window: int, horizon: int
    ) -> None:
        check_lengths(window, horizon)
        last = len(series) - window - horizon
        fits = len(starts) == 0 or (int(starts.min()) >= 0 and int(starts.max()) <= last)
        if len(series) != len(targets) or not fits:
            raise ValueError(
                message(
                    "windows leave the record",
                    expected=f"starts from 0 to {last} for {len(series)} steps, window={window} and horizon={horizon}",
                    got=f"starts {starts.tolist()[:8]}, targets of {len(targets)} steps",
                    fix="give starts whose window and horizon lie inside the record",
                )
            )
        self.series = series
        self.targets = targets
        self.starts = starts
        self.window = window
        self.horizon = horizon

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one window as views of the series, without a copy.

        Args:
            index: Number of the window.

        Returns:
            ``x`` of shape ``[t n c]`` and ``y`` of shape ``[t n c]``.
        """
        start = int(self.starts[index])
        middle = start + self.window
        return {"x": self.series[start:middle], "y": self.targets[middle : middle + self.horizon]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Gather a batch; a data loader calls this and needs no collation.

        Args:
            indices: Numbers of the windows.

        Returns:
            ``x`` of shape ``[b t n c]``, ``y`` of shape ``[b t n c]`` and ``start``, their first steps.
        """
        starts = self.starts[torch.as_tensor(indices, dtype=torch.long)]
        steps = starts[:, None] + self.window + torch.arange(self.horizon)
        return {"x": self.inputs(starts), "y": self.targets[steps], "start": starts}

    def of_nodes(self, indices: torch.Tensor, nodes: torch.Tensor, num_core: int) -> dict[str, torch.Tensor]:
        """Gather a batch of some nodes alone; the others are not touched.

        Args:
            indices: Numbers of the windows.
            nodes: Numbers of the nodes.
            num_core: The first so many of them are to be forecast.

        Returns:
            ``x`` of shape ``[b t n c]`` for these nodes, ``y`` of shape ``[b t n c]`` for the core, and ``start``.

        Example:
            >>> series = torch.arange(20.0).reshape(10, 2, 1)
            >>> windows = Windows(series, series, torch.tensor([0, 3]), window=2, horizon=1)
            >>> windows.of_nodes(torch.tensor([1]), torch.tensor([1]), 1)["x"].flatten()
            tensor([7., 9.])
        """
        starts = self.starts[indices]
        past = starts[:, None] + torch.arange(self.window)
        future = starts[:, None] + self.window + torch.arange(self.horizon)
        y = self.targets[future[:, :, None], nodes[:num_core]]
        return {"x": self.series[past[:, :, None], nodes], "y": y, "start": starts}

    def at(self, starts: torch.Tensor) -> Windows:
        """Return windows of the same record that begin elsewhere.

        Args:
            starts: First steps, in any order.

        Raises:
            ValueError: If a window leaves the record.
        """
        return Windows(self.series, self.targets, starts, window=self.window, horizon=self.horizon)

    def has_truth(self) -> bool:
        """Whether any step to forecast of any window was measured."""
        return any(bool(torch.isfinite(self[index]["y"]).any()) for index in range(len(self)))

    def inputs(self, starts: torch.Tensor) -> torch.Tensor:
        """Gather input windows that start at any step, also where the steps to forecast are not known yet.

        Args:
            starts: First steps, for instance ``[T - window]`` to forecast what follows the record.

        Returns:
            The windows.

        Shapes:
            - **starts:** :math:`(B,)`
            - **output:** ``[b t n c]``
        """
        return self.series[starts[:, None] + torch.arange(self.window)]


def last_reading(values: torch.Tensor) -> torch.Tensor:
    """Step of the last reading up to each step, -1 where there is none yet.

    Args:
        values: Readings, NaN where missing.

    Shapes:
        - **values**, **output:** :math:`(T, N, C)`

    Example:
        >>> last_reading(torch.tensor([float("nan"), 5.0, float("nan")])[:, None, None]).flatten()
        tensor([-1,  1,  1])
    """
    clock = torch.arange(len(values), device=values.device)[:, None, None]
    return torch.where(torch.isfinite(values), clock, -1).cummax(dim=0).values


def carry_forward(values: torch.Tensor, steps: int) -> torch.Tensor:
    """Put the last reading of at most ``steps`` steps before where one is missing; longer gaps stay NaN.

    Args:
        values: Readings, NaN where missing.
        steps: How old a reading may be.

    Shapes:
        - **values**, **output:** :math:`(T, N, C)`

    Example:
        >>> carry_forward(torch.tensor([5.0, float("nan"), float("nan")])[:, None, None], 1).flatten()
        tensor([5., 5., nan])
    """
    latest = last_reading(values)
    age = torch.arange(len(values), device=values.device)[:, None, None] - latest
    carried = values.gather(0, latest.clamp(min=0))
    return torch.where((latest >= 0) & (age <= steps), carried, torch.nan)


def check_lengths(window: int, horizon: int) -> None:
    """Raise where a window or a horizon has no step."""
    if window < 1 or horizon < 1:
        raise ValueError(
            message(
                "window or horizon is too short",
                expected="window >= 1 and horizon >= 1",
                got=f"window={window}, horizon={horizon}",
                fix="give whole numbers of steps, for instance 12 and 12",
            )
        )


def time_encoding(
    num_steps: int, interval_minutes: int, start: datetime | None, time_features: TimeFeatures
) -> torch.Tensor:
    r"""Encode the time of each step by sine and cosine.

    .. math::
        \left(\sin 2\pi\tfrac{m}{1440}, \cos 2\pi\tfrac{m}{1440}, \sin 2\pi\tfrac{d}{7}, \cos 2\pi\tfrac{d}{7}\right)

    with :math:`m` the minute of the day and :math:`d` the day of the week (0 for Monday), in local time without
    daylight saving. ``"day"`` takes the first two, ``"week"`` all four.

    Where the clock is not known, :math:`m` counts from the first step of the record: the days still turn, though no
    one can say which phase is noon. An adapted model can learn a daily course from it; a model that was only trained
    elsewhere must not rely on it. The day of the week is zeros then.

    Args:
        num_steps: Length of the record.
        interval_minutes: Minutes between two steps.
        start: Time of the first step; None where it is unknown.
        time_features: ``"none"``, ``"day"`` or ``"week"``.

    Returns:
        The encodings, float32.

    Shapes:
        - **output:** :math:`(T, 0)`, :math:`(T, 2)` or :math:`(T, 4)`

    Raises:
        ValueError: If ``time_features`` is none of the three.

    Example:
        >>> time_encoding(3, 360, datetime(2024, 1, 1), "day").round().tolist()
        [[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]]
    """
    check_option("time_features", time_features, get_args(TimeFeatures))
    width = {"none": 0, "day": 2, "week": 4}[time_features]
    first = 0.0 if start is None else start.weekday() * 1440 + start.hour * 60 + start.minute + start.second / 60
    minutes = first + interval_minutes * torch.arange(num_steps, dtype=torch.float64)
    day = 2 * math.pi * (minutes % 1440) / 1440
    week = 2 * math.pi * (minutes // 1440 % 7) / 7
    encodings = torch.stack([day.sin(), day.cos(), week.sin(), week.cos()], dim=1)
    if start is None:
        encodings[:, 2:] = 0.0
    return encodings[:, :width].float()
