"""The field's baselines without a backbone: historical average, vector autoregression, support vector regression."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stlora_peft.data import CityData, Windows
from stlora_peft.errors import message

DAY, WEEK = 24 * 60, 7 * 24 * 60  # minutes
STEPS_PER_COEFFICIENT = 5
"""Fewest given steps for each coefficient of a VAR's equation; with half as many, the AIC prefers the worst order."""
RIDGE_PENALTIES = tuple(10.0**power for power in range(-2, 7))
SVR_SETTINGS = {"C": 0.1, "epsilon": 0.0, "max_iter": 10_000, "random_state": 0}
Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]  # told, after each part of the work, how many are done and how many there are


@dataclass(frozen=True, eq=False)
class Baseline(ABC):
    """A forecaster that is fitted on the given part of a record, and sees nothing of the rest but the input window.

    Args:
        description: How it was fitted, in a few words for a table.
        sizes: Window, horizon, nodes and channels that it was fitted for.

    Example:
        >>> from stlora_peft.data import adaptation_split, prepare, simulate_city
        >>> city = simulate_city(num_nodes=2, days=4, seed=0)
        >>> data = prepare(city, adaptation_split(city.num_steps, city.steps_per_day, days=1))
        >>> for baseline in (kind.fit(data) for kind in BASELINES.values()):
        ...     print(baseline.description, tuple(baseline.forecast(data.test, torch.arange(8)).shape))
        mean by slot of the day (8, 12, 2, 1)
        statsmodels VAR(...), order by AIC (8, 12, 2, 1)
        LinearSVR(C=0.1) on 12 lags (8, 12, 2, 1)
    """

    description: str
    sizes: str
    packages: ClassVar[dict[str, str]] = {}  # modules that it imports, and the names that pip knows them by

    @classmethod
    def fit(cls, data: CityData, progress: Progress | None = None) -> Self:
        """Fit on the steps ``data.split.given``; the same data give the same baseline.

        Args:
            data: The city.
            progress: Told how far the work is, where it takes long.

        Raises:
            ImportError: If a package that it needs is not installed.
            ValueError: If fewer steps are given than two windows need.
        """
        cls.require_packages()
        given, needed = data.split.given, data.train.window + data.train.horizon + 1
        if len(given) < needed:
            where, got = f"city '{data.city.name}': too few given steps for a baseline", f"{len(given)} steps"
            raise ValueError(message(where, expected=f"at least {needed} steps", got=got, fix="give more days"))
        return cls._fit(data, torch.arange(given.start, given.stop), progress or (lambda done, total: None))

    def forecast(self, windows: Windows, rows: Tensor) -> Tensor:
        """Forecast windows of the record that it was fitted on: ``[b t n c]`` on the CPU, in the city's units.

        Args:
            windows: ``data.train``, ``data.val`` or ``data.test``.
            rows: Numbers of the windows.

        Raises:
            ValueError: If the windows have other sizes than those that it was fitted on.
        """
        if _sizes(windows) != self.sizes:
            where = f"the windows do not fit the baseline '{self.description}'"
            raise ValueError(message(where, expected=self.sizes, got=_sizes(windows), fix="fit it on their own city"))
        return self._forecast(windows, windows.starts[rows]).to(windows.targets.dtype)

    @classmethod
    def require_packages(cls) -> None:
        """Raise an ImportError if a package is not installed: for use before long work that ends in a baseline."""
        for module, package in cls.packages.items():
            try:
                import_module(module)
            except ImportError as error:
                where, expected = f"{cls.__name__} needs a package that is not installed", f"the package '{package}'"
                fix = 'pip install "stlora-peft[baselines]"'
                raise ImportError(message(where, expected=expected, got=str(error), fix=fix)) from error

    @classmethod
    @abstractmethod
    def _fit(cls, data: CityData, given: Tensor, progress: Progress) -> Self: ...

    @abstractmethod
    def _forecast(self, windows: Windows, starts: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class HistoricalAverage(Baseline):
    r"""Mean of a node's readings at the same time of the day, or of the week.

    .. math::
        \hat y_{t,n,c} = \frac{1}{|S_t|} \sum_{s \in S_t} y_{s,n,c}

    with :math:`S_t` the given steps in the slot of :math:`t` where the node was measured: the slot of the week where
    two weeks are given, else of the day, counted from the record's first step. Where the sampling step does not divide
    the day, times in one slot differ by less than a step. Where a slot of the week has no reading, the slot of the day
    stands in for it, then the node's mean, then the scaler's.
    """

    table: Tensor = field(repr=False)  # [slot n c]
    interval: int
    period: int

    @classmethod
    def _fit(cls, data: CityData, given: Tensor, progress: Progress) -> Self:
        values, interval = data.train.targets[given].double(), data.city.interval_minutes
        coarser, table = interval, values.new_tensor(data.scaler.mean).expand(1, *values.shape[1:])
        for period in (interval, DAY, WEEK)[: 3 if len(given) * interval >= 2 * WEEK else 2]:  # the first: one slot
            opening = torch.arange(-(-period // interval))  # steps from the record's first that open the slots
            table = _means(values, _slots(given, interval, period), table[_slots(opening, interval, coarser)])
            coarser = period
        unit = {DAY: "day", WEEK: "week"}[coarser]
        return cls(f"mean by slot of the {unit}", _sizes(data.train), table, interval, coarser)

    def _forecast(self, windows: Windows, starts: Tensor) -> Tensor:
        steps = starts[:, None] + windows.window + torch.arange(windows.horizon)
        return self.table[_slots(steps, self.interval, self.period)]

    def filled(self, targets: Tensor, steps: Tensor) -> Tensor:
        """Gather readings of some steps as float64, with the average where one is missing."""
        readings = targets[steps].double()
        return torch.where(torch.isfinite(readings), readings, self.table[_slots(steps, self.interval, self.period)])


@dataclass(frozen=True, eq=False)
class VectorAutoregression(Baseline):
    r"""Linear map from the last steps of all nodes to the next step, repeated up to the horizon.

    .. math::
        y_t = c + \sum_{l=1}^{p} A_l\, y_{t-l}

    with :math:`y_t` the readings of all nodes and channels, missing ones filled with the historical average. Least
    squares by statsmodels, the order :math:`p \le W` by AIC among those that leave :data:`STEPS_PER_COEFFICIENT` steps
    to a coefficient. Where none does, fewer than two series change or they are linearly dependent: ridge regression by
    scikit-learn on :math:`p = W` standardised lags, its :data:`RIDGE_PENALTIES` compared by leave-one-out errors.

    References:
        Luetkepohl, New Introduction to Multiple Time Series Analysis, 2005, sections 3.2 and 4.3.
        VAR of Li et al. (DCRNN), ICLR 2018, arXiv:1707.01926. Differs: theirs has order 3 always, and no ridge.
    """

    average: HistoricalAverage = field(repr=False)
    coefs: Tensor = field(repr=False)  # A_1 to A_p: [lag (n c) (n c)]
    intercept: Tensor = field(repr=False)  # [(n c)], in the city's units
    packages: ClassVar[dict[str, str]] = {"statsmodels": "statsmodels", "sklearn": "scikit-learn"}

    @classmethod
    def _fit(cls, data: CityData, given: Tensor, progress: Progress) -> Self:
        average = HistoricalAverage.fit(data)
        series = average.filled(data.train.targets, given).flatten(1).numpy()  # [t (n c)]
        found = _least_squares(series, data.train.window) or _ridge(series, data.train.window)
        return cls(found[0], _sizes(data.train), average, *map(torch.from_numpy, found[1:]))

    def _forecast(self, windows: Windows, starts: Tensor) -> Tensor:
        history = self.average.filled(windows.targets, starts[:, None] + torch.arange(windows.window)).flatten(2)
        weights = self.coefs.mT.flatten(0, 1)  # [(lag n c) (n c)]
        for _ in range(windows.horizon):
            lags = history[:, history.shape[1] - len(self.coefs) :].flip(1).flatten(1)
            history = torch.cat([history, (self.intercept + lags @ weights)[:, None]], dim=1)
        return history[:, windows.window :].reshape(len(starts), windows.horizon, *windows.targets.shape[1:])


@dataclass(frozen=True, eq=False)
class SupportVectorRegression(Baseline):
    r"""Linear support vector regression on a node's own window, one for each node, channel and forecast step.

    .. math::
        \hat z_{s+W+h} = b_h + \sum_{l=0}^{W-1} w_{h,l}\, z_{s+l}, \qquad
        \min_{w_h, b_h}\; \tfrac12 (\lVert w_h \rVert^2 + b_h^2) + C \sum_s |z_{s+W+h} - \hat z_{s+W+h}|

    with :math:`z` a series standardised over the given part and :math:`s` the first steps of the windows inside it.
    The loss is the absolute error that is reported, without a tolerance. A missing reading of a window is filled with
    the historical average; a missing truth is left out. Without a truth, or a change of the series, :math:`w` and
    :math:`b` are 0.

    References:
        SVR of Li et al. (DCRNN), ICLR 2018, arXiv:1707.01926, with the same penalty. Differs: theirs has 5 lags.
    """

    average: HistoricalAverage = field(repr=False)
    weights: Tensor = field(repr=False)  # [horizon window n c]
    bias: Tensor = field(repr=False)  # [horizon n c], in the city's units
    packages: ClassVar[dict[str, str]] = {"sklearn": "scikit-learn"}

    @classmethod
    def _fit(cls, data: CityData, given: Tensor, progress: Progress) -> Self:
        from sklearn.svm import LinearSVR

        average, targets, window = HistoricalAverage.fit(data), data.train.targets, data.train.window
        series, horizon = average.filled(targets, given), data.train.horizon
        mean, std = series.mean(dim=0), series.std(dim=0, correction=0)  # 0 / 0 where a series never changes: no truth
        lags = ((series - mean) / std).flatten(1).unfold(0, window, 1).numpy()  # [t (n c) window]
        truths = ((targets[given].double() - mean) / std).flatten(1).unfold(0, horizon, 1)[window:].numpy()
        fitted = torch.zeros(horizon, window + 1, mean.numel(), dtype=torch.float64)  # weights, then bias
        for number in range(mean.numel()):
            for step in range(horizon):
                truth = truths[:, number, step]
                seen = np.flatnonzero(np.isfinite(truth))
                if len(seen):
                    model = LinearSVR(**SVR_SETTINGS).fit(lags[seen, number], truth[seen])
                    fitted[step, :, number] = torch.from_numpy(np.append(model.coef_, model.intercept_))
            progress(number + 1, mean.numel())
        weights, bias = fitted.unflatten(2, mean.shape).split([window, 1], dim=1)
        bias = mean + std * bias[:, 0] - mean * weights.sum(dim=1)
        return cls(f"LinearSVR(C={SVR_SETTINGS['C']}) on {window} lags", _sizes(data.train), average, weights, bias)

    def _forecast(self, windows: Windows, starts: Tensor) -> Tensor:
        history = self.average.filled(windows.targets, starts[:, None] + torch.arange(windows.window))
        return self.bias + torch.einsum("btnc,htnc->bhnc", history, self.weights)


BASELINES: dict[str, type[Baseline]] = {
    "ha": HistoricalAverage,
    "var": VectorAutoregression,
    "svr": SupportVectorRegression,
}


def baseline_batches(baseline: Baseline, windows: Windows, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Forecast windows batch by batch, in their order.

    Args:
        baseline: A fitted baseline.
        windows: Which windows of its record to forecast.
        batch_size: Windows in one step.

    Yields:
        Forecast and truth in the city's units, ``[b t n c]`` with the horizon on ``t``.
    """
    for rows in torch.arange(len(windows)).split(batch_size):
        yield baseline.forecast(windows, rows), windows.__getitems__(rows.tolist())["y"]


def _sizes(windows: Windows) -> str:
    """Say what a baseline is made for."""
    nodes, channels = windows.targets.shape[1:]
    return f"window={windows.window}, horizon={windows.horizon}, num_nodes={nodes}, num_channels={channels}"


def _slots(steps: Tensor, interval: int, period: int) -> Tensor:
    """Slot of each step in a day or a week that begins with the record."""
    return steps * interval % period // interval


def _means(values: Tensor, slots: Tensor, fallback: Tensor) -> Tensor:
    """Mean of the readings in each slot, ``[slot n c]``."""
    measured = torch.isfinite(values)
    total = torch.zeros_like(fallback).index_add_(0, slots, torch.where(measured, values, 0.0))
    count = torch.zeros_like(fallback).index_add_(0, slots, measured.double())
    return torch.where(count > 0, total / count, fallback)


def _least_squares(series: Array, window: int) -> tuple[str, Array, Array] | None:
    """Fit a VAR by least squares, its order by AIC; None where the series cannot bear it."""
    from statsmodels.tsa.api import VAR

    length, count = series.shape
    moving = np.flatnonzero(np.diff(series[window : length - window], axis=0).any(axis=0))  # the others get their mean
    width = len(moving)
    most = max((p for p in range(1, window + 1) if length - p >= STEPS_PER_COEFFICIENT * (width * p + 1)), default=0)
    if most == 0 or width < 2 or np.linalg.matrix_rank(np.corrcoef(series[:, moving].T), tol=1e-9) < width:
        return None
    try:
        fitted = VAR(series[:, moving]).fit(most, ic="aic")
    except np.linalg.LinAlgError:  # residuals of determinant 0, as those of series without noise
        return None
    coefs, intercept = np.zeros((fitted.k_ar, count, count)), series.mean(axis=0)
    coefs[np.ix_(np.arange(fitted.k_ar), moving, moving)], intercept[moving] = fitted.coefs, fitted.intercept
    return f"statsmodels VAR({fitted.k_ar}), order by AIC", coefs, intercept


def _ridge(series: Array, order: int) -> tuple[str, Array, Array]:
    """Fit a VAR by ridge regression, its penalty by leave-one-out cross-validation."""
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    lags = np.concatenate([series[order - lag : len(series) - lag] for lag in range(1, order + 1)], axis=1)
    scaler, ridge = StandardScaler(), RidgeCV(alphas=RIDGE_PENALTIES)
    ridge.fit(scaler.fit_transform(lags), series[order:])
    coefs = (ridge.coef_ / scaler.scale_).reshape(series.shape[1], order, -1)  # [(n c) lag (n c)]
    intercept = ridge.intercept_ - np.tensordot(coefs, scaler.mean_.reshape(order, -1))
    return f"ridge VAR({order}), penalty {ridge.alpha_:g}", coefs.swapaxes(0, 1), intercept
