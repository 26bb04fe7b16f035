"""Whether one method beats another, or only had luck with its days and its seeds: a paired bootstrap over both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from stlora_peft.data import Windows
from stlora_peft.errors import message

Daily = Sequence[Sequence[float | None]]
"""``[day, sum of absolute errors, number of truths]`` for each day, as :meth:`DailyErrors.to_list` gives it."""
Array = npt.NDArray[Any]
DRAWN_AT_ONCE = 2_000_000  # numbers; 16 MB for each of the few arrays of that size


class DailyErrors:
    r"""Sums of absolute errors of the forecasts that begin on each day.

    Window :math:`i` of start :math:`s_i` and length :math:`W` belongs to the day of its first forecast step. With
    :math:`P` steps in a day, counted from the first step of the record, and :math:`m_k = 1` where truth
    :math:`y_k` is finite,

    .. math::
        d_i = \left\lfloor \frac{s_i + W}{\max(1, P)} \right\rfloor, \qquad
        E_d = \sum_{i:\, d_i = d} \sum_{k \in i} m_k |\hat y_k - y_k|, \qquad
        M_d = \sum_{i:\, d_i = d} \sum_{k \in i} m_k .

    In a record of less than one step in a day every window has a day of its own. The sums are taken while the batches
    pass by, so that the pass that measures a model serves both.

    Args:
        windows: The windows that are forecast.
        steps_per_day: Steps in a day :math:`P`, as ``city.steps_per_day`` says it.

    Attributes:
        days: Numbers of the days, ascending.
        sums: :math:`E_d`, NaN where a forecast was not finite.
        counts: :math:`M_d`.

    Shapes:
        - **days**, **sums**, **counts:** number of days that have a window

    Units:
        ``sums`` in the units of the batches.

    Example:
        >>> record = torch.zeros(8, 1, 1)
        >>> windows = Windows(record, record, torch.arange(4), window=2, horizon=1)
        >>> daily = DailyErrors(windows, steps_per_day=4)
        >>> ones = torch.ones(2, 1, 1, 1)
        >>> len(list(daily.watch([(ones, 0 * ones), (ones, ones)]))), daily.to_list()
        (2, [[0, 2.0, 2], [1, 0.0, 2]])
    """

    def __init__(self, windows: Windows, steps_per_day: float) -> None:
        first = windows.starts.numpy() + windows.window
        days = np.floor_divide(first, max(1.0, steps_per_day)).astype(np.int64)
        self.days, self._places = np.unique(days, return_inverse=True)
        self.sums = np.zeros(len(self.days))
        self.counts = np.zeros(len(self.days))
        self._added = 0

    def add(self, forecast: torch.Tensor, truth: torch.Tensor) -> None:
        """Add the next batch, in the order of the windows.

        Args:
            forecast: Forecast in the city's units.
            truth: Truth in the same units; NaN is missing.

        Shapes:
            - **forecast**, **truth:** ``[b t n c]`` with the horizon on ``t``

        Raises:
            ValueError: If there were more forecasts than windows.
        """
        places = self._places[self._added : self._added + len(truth)]
        self._added += len(truth)
        self._check(self._added <= len(self._places))
        forecast, truth = forecast.detach().cpu().double(), truth.cpu().double()
        seen = torch.isfinite(truth)
        error = torch.where(seen, (forecast - truth).abs(), 0.0)
        np.add.at(self.sums, places, error.sum(dim=(1, 2, 3)).numpy())
        np.add.at(self.counts, places, seen.sum(dim=(1, 2, 3)).numpy())

    def watch(
        self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Hand batches on unchanged and add each.

        Args:
            batches: Forecast and truth, batch by batch, as :func:`stlora_peft.evaluation.measure` takes them.

        Yields:
            The same batches.

        Raises:
            ValueError: If there were more forecasts than windows.
        """
        for forecast, truth in batches:
            self.add(forecast, truth)
            yield forecast, truth

    def to_list(self) -> list[list[float | None]]:
        """Return day, sum and count of each day, for JSON: a sum that is not finite is None.

        Raises:
            ValueError: If a window was not forecast yet.
        """
        self._check(self._added == len(self._places))
        sums = [total if math.isfinite(total) else None for total in self.sums.tolist()]
        return [list(row) for row in zip(self.days.tolist(), sums, map(int, self.counts), strict=True)]

    def _check(self, fits: bool) -> None:
        """Refuse too many or too few forecasts."""
        if not fits:
            _refuse(
                "daily errors need one forecast for each window",
                f"forecasts of {len(self._places)} windows",
                f"forecasts of {self._added}",
                "let all batches of these windows pass, once and in their order, before the sums are read",
            )


@dataclass(frozen=True)
class Difference:
    """How much lower or higher the error of one method is than that of another.

    Args:
        relative: Relative difference of the MAE; -0.05 is 5 % lower. None where an error is not finite, no truth was
            measured, or the other method makes no error at all.
        low: Lower end of the confidence interval. None where nothing can be tested: one day of one seed cannot be
            resampled, and no difference is relative to a resample in which the other method makes no error.
        high: Its upper end, or None.
        p_value: Two-sided p-value of no difference, or None.
    """

    relative: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


def paired_difference(
    ours: Sequence[Daily],
    theirs: Sequence[Daily],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    r"""Compare the errors of two methods on the same days and with the same seeds.

    The statistic is the relative difference of the two mean absolute errors,

    .. math::
        \delta = \frac{\mathrm{MAE} - \mathrm{MAE}'}{\mathrm{MAE}'}, \qquad
        \mathrm{MAE} = \frac{\sum_{s,d} u_s v_d E_{sd}}{\sum_{s,d} u_s v_d M_d},

    with the sums :math:`E_{sd}` and counts :math:`M_d` of :class:`DailyErrors` for seed :math:`s` and day :math:`d`
    and all weights 1. A resample draws as many seeds and as many days as there are, with replacement and each by
    themselves; :math:`u_s` and :math:`v_d` count how often each was drawn. Both methods get the same draws, so what
    makes a day hard for both cancels, and so do the counts. The interval runs between the quantiles of the resampled
    :math:`\delta`; with :math:`R` resamples, :math:`R_-` of them at most and :math:`R_+` at least 0,

    .. math::
        p = \min\left(1, 2\, \frac{\min(R_-, R_+) + 1}{R + 1}\right).

    Whole days stay together because forecasts of one day share its traffic; neighbouring days count as independent. An
    axis of length 1 is not resampled: with one seed the result holds for that seed, with one day for that day. Few
    seeds or days make the interval too narrow, because a resample of :math:`n` varies by only :math:`(n - 1) / n` of
    their variance: where three seeds are all that varies, a 95 % interval holds the true difference in about three
    of four cases.

    Args:
        ours: Daily errors of a method, one list for each seed.
        theirs: Those of the other, the same seeds in the same order.
        resamples: Number of resamples :math:`R`.
        confidence: Share of the resamples inside the interval.
        seed: Seed of the draws.

    Returns:
        The difference, negative where ``ours`` is better.

    Shapes:
        - **ours**, **theirs:** seeds, days, 3

    Cost:
        :math:`R \cdot S \cdot D` multiplications for :math:`S` seeds and :math:`D` days, in parts of bounded memory.

    Raises:
        ValueError: If there is no seed or no day, if seeds, days or their numbers of truths differ, or if
            ``resamples`` or ``confidence`` is out of range.

    Example:
        >>> ours = [[[0, 8.0, 10], [1, 9.5, 10], [2, 17.0, 10]]]
        >>> theirs = [[[0, 10.0, 10], [1, 10.0, 10], [2, 20.0, 10]]]
        >>> found = paired_difference(ours, theirs)
        >>> round(found.relative, 4), -0.2 <= found.low < found.high <= -0.05, found.p_value < 0.001
        (-0.1375, True, True)

    References:
        Resampling blocks of a series instead of its steps: Künsch, Annals of Statistics 17(3), 1989. Seeds and days
        drawn apart: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007. Percentile interval:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Differs from Künsch: his blocks
        overlap and start anywhere, ours are the days.
    """
    _check_settings(resamples, confidence)
    _check_pairs(ours, theirs)
    mine, base = _sums(ours), _sums(theirs)
    change = mine - base  # its sums are exactly 0 for equal methods
    if not math.isfinite(change.sum()) or base.sum() <= 0:
        return Difference(None)
    relative = float(change.sum() / base.sum())
    draws = _draw(change, base, resamples, seed) if change.size > 1 else np.array([math.nan])
    if not np.isfinite(draws).all():
        return Difference(relative)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return Difference(relative, low, high, min(1.0, 2 * float(tail + 1) / (resamples + 1)))


def _sums(daily: Sequence[Daily]) -> Array:
    """Sums of the days that have a truth, one row for each seed; NaN where a forecast was not finite."""
    return np.array([[row[1] for row in rows if row[2]] for rows in daily], dtype=np.float64)


def _draw(change: Array, base: Array, resamples: int, seed: int) -> Array:
    """Relative difference of each resample.

    Seeds and days have a stream of random numbers each, so that the draws do not depend on the size of the parts.
    """
    of_seeds, of_days = np.random.default_rng(seed).spawn(2)
    size = max(1, DRAWN_AT_ONCE // sum(change.shape))
    parts = []
    for first in range(0, resamples, size):
        count = min(size, resamples - first)
        seeds, days = (
            stream.multinomial(length, np.full(length, 1 / length), count).astype(np.float64)
            for stream, length in zip((of_seeds, of_days), change.shape, strict=True)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(((seeds @ change) * days).sum(axis=1) / ((seeds @ base) * days).sum(axis=1))
    return np.concatenate(parts)


def _check_pairs(ours: Sequence[Daily], theirs: Sequence[Daily]) -> None:
    """Refuse daily errors that are not pairs."""
    if not ours or not theirs or not ours[0]:
        fix = "give DailyErrors.to_list() of each seed, for both methods"
        _refuse("there is nothing to compare", "at least one day of one seed, of both methods", "none", fix)
    if len(ours) != len(theirs):
        got = f"{len(ours)} and {len(theirs)} seeds"
        _refuse("the seeds of two methods are not pairs", "as many of both", got, "give the seeds that both have")
    for rows in (*ours, *theirs):
        for one, other in zip_longest(map(_truths, ours[0]), map(_truths, rows), fillvalue="no further day"):
            if one != other:
                fix = "measure all seeds of both methods on the same windows of the same city"
                _refuse("the days of two methods are not pairs", one, other, fix)


def _truths(row: Sequence[float | None]) -> str:
    """Say what every seed of every method must have in common on a day."""
    return f"day {row[0]} with {row[2]} truths"


def _check_settings(resamples: int, confidence: float) -> None:
    """Refuse a bootstrap that has no meaning."""
    if resamples < 1 or not 0 < confidence < 1:
        got = f"resamples={resamples}, confidence={confidence}"
        _refuse("no such bootstrap", "resamples >= 1 and 0 < confidence < 1", got, "give for instance 10000 and 0.95")


def _refuse(where: str, expected: str, got: str, fix: str) -> NoReturn:
    """Raise an error in the form of the package."""
    raise ValueError(message(where, expected=expected, got=got, fix=fix))
