"""The times of a window and of the steps after it, read off the time encodings of the input."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stlora_peft.backbones.base import Forecaster

TimeFeatures = Literal["none", "day", "week"]

ENCODING_WIDTH: dict[str, int] = {"none": 0, "day": 2, "week": 4}
"""Channels that each kind of time encoding takes, see :func:`stlora_peft.data.windows.time_encoding`."""


def value_channels(forecaster: Forecaster, time_features: str) -> int:
    """Number of input channels that are no time encodings.

    Args:
        forecaster: The forecaster; its sizes are known already.
        time_features: ``"none"``, ``"day"`` or ``"week"``: the encodings that its input ends with.

    Raises:
        ValueError: If ``time_features`` is none of the three, or leaves no channel for the values.
    """
    if time_features not in ENCODING_WIDTH:
        known = ", ".join(f"'{kind}'" for kind in ENCODING_WIDTH)
        forecaster.refuse(
            "time_features is unknown", f"one of {known}", f"'{time_features}'", "name the input's encodings"
        )
    values = forecaster.in_channels - ENCODING_WIDTH[time_features]
    least = forecaster.out_channels if forecaster.residual else 1
    if values < least:
        forecaster.refuse(
            f"too few input channels for time_features='{time_features}'",
            f"in_channels >= {least + ENCODING_WIDTH[time_features]}: values, then time encodings",
            f"in_channels = {forecaster.in_channels}",
            "give the encodings as the last channels, or set time_features='none'",
        )
    return values


def table_width(time_features: str, num_steps: int, steps_per_day: int) -> int:
    """Number of rows of the table that :func:`time_rows` points into.

    Args:
        time_features: ``"none"``, ``"day"`` or ``"week"``.
        num_steps: Steps of window and horizon together.
        steps_per_day: Slots that a day is divided into.
    """
    return {"none": num_steps, "day": steps_per_day, "week": 7 + steps_per_day}[time_features]


def time_rows(encodings: Tensor, horizon: int, steps_per_day: int) -> Tensor:
    r"""Mark the slot of the day, and the day of the week, of every step of the window and of the horizon.

    The encodings are :math:`\sin, \cos` of the time of day and, where there are four, of the day of the week. The
    steps after the window go on at the interval of its last two steps, so the interval need not be that of a slot.
    Days of the week that are not known, encoded as zeros, are marked nowhere. Without encodings each step of window
    and horizon has a slot of its own.

    Args:
        encodings: Time encodings of the window.
        horizon: Number of steps after the window.
        steps_per_day: Slots that a day is divided into.

    Shapes:
        - **encodings:** :math:`(B, T, C)` with 0, 2 or 4 channels
        - **output:** :math:`(B, T + H, W)`, ones and zeros

    Example:
        >>> noon = torch.tensor([[[-1.0, 0.0], [0.0, 1.0]]])  # six in the evening, then midnight
        >>> time_rows(noon, horizon=1, steps_per_day=4).argmax(-1)
        tensor([[3, 0, 1]])
    """
    batch, window, channels = encodings.shape
    if channels == 0:
        steps = torch.eye(window + horizon, dtype=encodings.dtype, device=encodings.device)
        return steps.expand(batch, -1, -1)
    now = _turns(encodings[..., :2])
    step = (now[:, -1:] - now[:, -2:-1]).remainder(1) if window > 1 else torch.full_like(now, 1 / steps_per_day)
    ahead = now[:, -1:] + step * torch.arange(1, horizon + 1, device=now.device)
    slots = (torch.cat([now, ahead], 1) * steps_per_day).round().long()
    rows = F.one_hot(slots % steps_per_day, steps_per_day)
    if channels == 4:
        rows = torch.cat([_weekdays(encodings[..., 2:], slots[:, window:] // steps_per_day), rows], 2)
    return rows.to(encodings.dtype)


def _weekdays(encodings: Tensor, days_ahead: Tensor) -> Tensor:
    """Mark the day of the week of the window's steps and of those that are ``days_ahead`` of its last one."""
    days = (_turns(encodings) * 7).round().long()
    days = torch.cat([days, days[:, -1:] + days_ahead], 1)
    known = encodings.square().sum(-1) > 0.5
    known = torch.cat([known, known[:, -1:].expand(days_ahead.shape)], 1)
    return F.one_hot(days % 7, 7) * known[..., None]


def _turns(encoding: Tensor) -> Tensor:
    """Angle of a sine and a cosine, in turns from 0 to below 1."""
    sine, cosine = encoding.unbind(-1)
    return (torch.atan2(sine, cosine) / (2 * math.pi)).remainder(1)
