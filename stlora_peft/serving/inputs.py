"""From a city's own readings to what a backbone reads, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stlora_peft.data.splits import model_input
from stlora_peft.data.validation import checked_start
from stlora_peft.data.windows import TimeFeatures, time_encoding
from stlora_peft.errors import message
from stlora_peft.serving.members import Member
from stlora_peft.serving.tiles import Tiles

Readings = Tensor | npt.NDArray[np.floating[Any]]
Moment = datetime | str | None


@dataclass(frozen=True, eq=False)
class Request:
    """What one city asks for.

    Args:
        member: The city.
        readings: Its readings, no more steps of them than the input depends on.
        clock: Time encodings of the input window.
        single: Whether the readings came without a batch axis.

    Shapes:
        - **readings:** ``[t b n c]``; **clock:** ``[t b c]``
    """

    member: Member
    readings: Tensor
    clock: Tensor
    single: bool

    @property
    def batch(self) -> int:
        """Number of windows."""
        return int(self.readings.shape[1])


class Clock:
    """Time encodings of windows, each computed once for all cities that share it.

    Args:
        window: Input steps.
        time_features: Which encodings the backbone reads.
    """

    def __init__(self, window: int, time_features: TimeFeatures) -> None:
        self.window = window
        self.time_features = time_features
        self._known: dict[tuple[int, int, datetime | None], Tensor] = {}

    def read(self, starts: Sequence[datetime | None], num_steps: int, interval_minutes: int) -> Tensor:
        """Encode the last ``window`` steps of records that start at these times, ``[t b c]``."""
        keys = [(num_steps, interval_minutes, start) for start in starts]
        for key in keys:
            if key not in self._known:
                self._known[key] = time_encoding(*key, self.time_features)[-self.window :]
        return torch.stack([self._known[key] for key in keys], 1)


def read_request(
    member: Member, readings: Readings, start: Moment | Sequence[Moment], clock: Clock, channels: int
) -> Request:
    """Check a city's readings and encode their time.

    Args:
        member: The city.
        readings: Its readings in its own unit, NaN where missing.
        start: Time of the first step, or of that of each window.
        clock: Encodes time.
        channels: Number of channels that a reading has.

    Raises:
        ValueError: If readings or times do not fit the city.
    """
    values = torch.as_tensor(readings)
    single = values.ndim == 3
    values = values[None] if single else values
    expected = (member.place.num_nodes, channels)
    if values.ndim != 4 or values.shape[1] < clock.window or values.shape[2:] != expected or not len(values):
        nodes = f"n={member.place.num_nodes}, c={channels} and at least {clock.window} steps"
        _refuse(
            member.name, f"windows 'b t n c', or one record 't n c', with {nodes}", f"shape {tuple(readings.shape)}"
        )
    moments = [start] * len(values) if start is None or isinstance(start, (datetime, str)) else list(start)
    if len(moments) != len(values):
        _refuse(member.name, f"{len(values)} times, one for each window", f"{len(moments)}")
    starts = [checked_start(f"readings of city '{member.name}'", moment) for moment in moments]
    encoded = clock.read(starts, values.shape[1], member.place.interval_minutes)
    tail = values[:, -(2 * clock.window - 1) :].float()  # a gap is filled from window - 1 steps before at most
    return Request(member, tail.transpose(0, 1), encoded, single)


class Units:
    """Between the units of several cities and the scaled values of their common node axis.

    Args:
        members: The cities.
        tiles: Where they lie.
    """

    def __init__(self, members: Sequence[Member], tiles: Tiles) -> None:
        self.tiles = tiles
        scalers = [member.place.scaler for member in members]
        self.mean = tiles.entries(torch.tensor([scaler.mean for scaler in scalers], device=tiles.owner.device))
        self.std = tiles.entries(torch.tensor([scaler.std for scaler in scalers], device=tiles.owner.device))

    def scaled(self, requests: Sequence[Request], window: int) -> Tensor:
        """Put the inputs of all cities side by side, ``[b t n c]``.

        Args:
            requests: One for each city, in their order, all with the same number of windows.
            window: Input steps.
        """
        batch, slots = requests[0].batch, self.tiles.num_slots
        steps = max(len(request.readings) for request in requests)
        shape = (steps, batch, slots, requests[0].readings.shape[3])
        readings = self.mean.new_full(shape, torch.nan)
        for request, start in zip(requests, self.tiles.starts, strict=True):
            own = request.readings
            readings[steps - len(own) :, :, start : start + own.shape[2]] = own
        clock = self._clock(requests)  # [t b n c]
        clock = torch.cat([clock.new_zeros(steps - window, *clock.shape[1:]), clock])
        series = model_input(readings.flatten(1, 2), lambda x: self._scale(x, batch), window, clock.flatten(1, 2))
        x: Tensor = series[steps - window :].unflatten(1, (batch, slots)).transpose(0, 1)
        return x

    def _scale(self, readings: Tensor, batch: int) -> Tensor:
        return (readings - self.mean.repeat(batch, 1)) / self.std.repeat(batch, 1)

    def _clock(self, requests: Sequence[Request]) -> Tensor:
        """Time encodings of every slot, ``[t b n c]``."""
        first = requests[0].clock
        if all(request.clock is first or torch.equal(request.clock, first) for request in requests):
            return first.to(self.mean)[:, :, None].expand(-1, -1, self.tiles.num_slots, -1)
        clocks = torch.stack([request.clock for request in requests]).to(self.mean)  # [city t b c]
        return self.tiles.entries(clocks).movedim(0, 2)

    def restored(self, scaled: Tensor) -> list[Tensor]:
        """Each city's forecast ``[b t n c]`` in its own unit."""
        return self.tiles.split(scaled.float() * self.std + self.mean, 2)


def _refuse(city: str, expected: str, got: str) -> None:
    raise ValueError(
        message(
            f"the readings of city '{city}' do not fit it",
            expected=expected,
            got=got,
            fix="give the readings of this city's sensors, in the adapter's node order",
        )
    )
