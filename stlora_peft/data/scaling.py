"""City-wide standardisation of the readings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from stlora_peft.errors import message

Readings = TypeVar("Readings", torch.Tensor, npt.NDArray[np.floating[Any]])


@dataclass(frozen=True)
class Scaler:
    r"""Mean and standard deviation of each channel, over all sensors of a city.

    .. math::
        z = \frac{x - \mu_c}{\sigma_c}

    with :math:`\mu_c, \sigma_c` of channel :math:`c`. One pair for the whole city keeps the differences between its
    sensors, which is what an adapter learns.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel (divided by the count, not the count minus one).

    Units:
        ``mean`` and ``std`` in the unit of the readings; scaled values have none.

    Raises:
        ValueError: If the lengths differ, a number is not finite, or a standard deviation is not above 0.

    Example:
        >>> scaler = Scaler.fit(np.array([[[40.0]], [[60.0]], [[np.nan]]]))
        >>> scaler
        Scaler(mean=(50.0,), std=(10.0,))
        >>> scaler.transform(torch.tensor([[55.0]]))
        tensor([[0.5000]])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that both have one usable number for each channel."""
        finite = all(math.isfinite(number) for number in (*self.mean, *self.std))
        if not (len(self.mean) == len(self.std) > 0 and finite and all(std > 0 for std in self.std)):
            raise ValueError(
                message(
                    "scaler is not usable",
                    expected="one finite mean and one std above 0 for each channel",
                    got=f"mean={self.mean}, std={self.std}",
                    fix="fit the scaler on readings, or read it from an undamaged file",
                )
            )

    @classmethod
    def fit(cls, values: npt.NDArray[np.floating[Any]] | torch.Tensor) -> Scaler:
        """Take mean and standard deviation of each channel, leaving missing readings out.

        Args:
            values: Readings, NaN where missing.

        Returns:
            The scaler of these readings.

        Shapes:
            - **values:** :math:`(*, C)`

        Raises:
            ValueError: If a channel has no reading, or the same reading everywhere.
        """
        array = np.asarray(values, dtype=np.float64)
        channels = array.reshape(-1, array.shape[-1]).T
        pairs = [_moments(channel[np.isfinite(channel)], number) for number, channel in enumerate(channels)]
        return cls(mean=tuple(mean for mean, _ in pairs), std=tuple(std for _, std in pairs))

    def transform(self, values: Readings) -> Readings:
        """Scale readings; missing ones stay NaN.

        Args:
            values: Readings in the city's unit.

        Returns:
            Scaled readings of the same type, dtype and device.

        Shapes:
            - **values**, **output:** :math:`(*, C)`

        Raises:
            ValueError: If the last axis has another number of channels.
        """
        mean, std = self._parameters(values)
        scaled: Readings = (values - mean) / std
        return scaled

    def inverse(self, values: Readings) -> Readings:
        """Undo :meth:`transform`.

        Args:
            values: Scaled readings.

        Returns:
            Readings in the city's unit, of the same type, dtype and device.

        Shapes:
            - **values**, **output:** :math:`(*, C)`

        Raises:
            ValueError: If the last axis has another number of channels.
        """
        mean, std = self._parameters(values)
        restored: Readings = values * std + mean
        return restored

    def to_dict(self) -> dict[str, list[float]]:
        """Return the numbers in a form that JSON can hold."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Sequence[float]]) -> Scaler:
        """Read what :meth:`to_dict` returned.

        Args:
            content: Lists under ``mean`` and ``std``.

        Returns:
            The scaler.

        Raises:
            ValueError: If a list is missing or not usable.
        """
        try:
            return cls(mean=_numbers(content["mean"]), std=_numbers(content["std"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                message(
                    "scaler cannot be read",
                    expected="lists of numbers under 'mean' and 'std'",
                    got=repr(content),
                    fix="read it from an undamaged file",
                )
            ) from error

    def _parameters(self, values: Readings) -> tuple[Readings, Readings]:
        """Mean and std in the type, dtype and device of the readings."""
        if values.shape[-1] != len(self.mean):
            raise ValueError(
                message(
                    "scaler does not fit the readings",
                    expected=f"{len(self.mean)} channel(s) on the last axis",
                    got=f"shape {tuple(values.shape)}",
                    fix="use the scaler that was fitted on readings of the same quantities",
                )
            )
        if isinstance(values, torch.Tensor):
            return values.new_tensor(self.mean), values.new_tensor(self.std)
        return np.asarray(self.mean, dtype=values.dtype), np.asarray(self.std, dtype=values.dtype)


def _moments(readings: npt.NDArray[np.float64], channel: int) -> tuple[float, float]:
    """Mean and standard deviation of a channel's readings, which must differ."""
    if len(readings) == 0 or readings.min() == readings.max():
        raise ValueError(
            message(
                f"channel {channel} cannot be scaled",
                expected="at least two different readings in the given days",
                got=f"{readings[0]:g} everywhere" if len(readings) else "no reading",
                fix="give more days, or leave this channel out",
            )
        )
    return float(readings.mean()), float(readings.std())


def _numbers(entries: Sequence[float]) -> tuple[float, ...]:
    """Entries as floats, refusing anything else."""
    if isinstance(entries, str) or any(isinstance(entry, (str, bool)) for entry in entries):
        raise TypeError("not numbers")
    return tuple(float(entry) for entry in entries)
