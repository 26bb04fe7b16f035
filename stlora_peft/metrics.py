"""Masked errors of forecasts, for each forecast step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

REPORTED_STEPS = (3, 6, 12)


def masked_mae(forecast: torch.Tensor, truth: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    r"""Mean absolute error over the truths that were measured.

    .. math::
        \frac{\sum_k m_k |\hat y_k - y_k|}{\max(1, \sum_k m_k)}, \qquad m_k = 1 \text{ where } y_k \text{ is finite.}

    Args:
        forecast: Forecast of any shape.
        truth: Truth of the same shape; NaN is missing.
        count: What the sum is divided by, where that is not the number of these truths.

    Returns:
        Scalar; 0, with a gradient of 0, where nothing was measured.

    Example:
        >>> masked_mae(torch.tensor([1.0, 5.0]), torch.tensor([2.0, float("nan")]))
        tensor(1.)
    """
    seen = torch.isfinite(truth)
    error = (forecast - torch.where(seen, truth, 0.0)).abs() * seen
    return error.sum() / (seen.sum().clamp(min=1) if count is None else count.to(error.dtype))


@dataclass(frozen=True)
class Scores:
    """Three errors of one set of forecasts.

    Args:
        mae: Mean absolute error.
        rmse: Root of the mean squared error.
        mape: Mean absolute percentage error over the truths that are not zero.

    Units:
        ``mae`` and ``rmse`` in the city's units, ``mape`` in percent. NaN where nothing could be compared.
    """

    mae: float
    rmse: float
    mape: float

    def to_dict(self) -> dict[str, float | None]:
        """Return the errors by name, with None for what is not finite (JSON has no NaN)."""
        values = {"mae": self.mae, "rmse": self.rmse, "mape": self.mape}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class Metrics:
    """Errors of a forecaster for each forecast step, and over all of them.

    ``average`` weighs every measured truth alike: its RMSE is the root of the mean over all squares, not the mean of
    the steps' roots.

    Args:
        steps: Errors at forecast step 1, 2, ... up to the horizon.
        average: Errors over all steps together.

    Units:
        As in :class:`Scores`.

    Example:
        >>> errors = Scores(1.0, 2.0, 10.0)
        >>> Metrics(steps=(errors,) * 12, average=errors).mae
        1.0
    """

    steps: tuple[Scores, ...]
    average: Scores

    @property
    def mae(self) -> float:
        """Mean absolute error over all steps."""
        return self.average.mae

    @property
    def rmse(self) -> float:
        """Root mean squared error over all steps."""
        return self.average.rmse

    @property
    def mape(self) -> float:
        """Mean absolute percentage error over all steps, in percent."""
        return self.average.mape

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """Return the errors at steps 3, 6 and 12, as far as the horizon reaches, and their average, for JSON."""
        reported = [step for step in REPORTED_STEPS if step <= len(self.steps)] or [len(self.steps)]
        rows = {str(step): self.steps[step - 1].to_dict() for step in reported}
        return {**rows, "average": self.average.to_dict()}


class ErrorSums:
    """Running sums, in float64, from which the errors of many batches follow.

    Args:
        horizon: Number of forecast steps.

    Attributes:
        sums: Truths, absolute and squared errors, truths that are not zero, and their relative errors, for each step;
            those of several parts may be added.

    Example:
        >>> sums = ErrorSums(horizon=1)
        >>> sums.add(torch.tensor([[[[3.0]]]]), torch.tensor([[[[2.0]]]]))
        >>> sums.metrics().average
        Scores(mae=1.0, rmse=1.0, mape=50.0)
    """

    def __init__(self, horizon: int) -> None:
        self.sums = torch.zeros(5, horizon, dtype=torch.float64)

    def add(self, forecast: torch.Tensor, truth: torch.Tensor) -> None:
        """Add a batch.

        Args:
            forecast: Forecast in the city's units.
            truth: Truth in the same units; NaN is missing.

        Shapes:
            - **forecast**, **truth:** ``[b t n c]`` with the horizon on ``t``
        """
        forecast, truth = forecast.double(), truth.double()
        seen = torch.isfinite(truth)
        truth = torch.where(seen, truth, 0.0)
        error = torch.where(seen, forecast - truth, 0.0)
        rated = truth != 0  # a missing truth is zero here and drops out too
        ratio = torch.where(rated, error.abs() / torch.where(rated, truth.abs(), 1.0), 0.0)
        terms = torch.stack([seen.double(), error.abs(), error.square(), rated.double(), ratio])
        self.sums += terms.sum(dim=(1, 3, 4))

    def metrics(self) -> Metrics:
        """Return the errors of everything added so far."""
        steps = tuple(_scores(column) for column in self.sums.T)
        return Metrics(steps=steps, average=_scores(self.sums.sum(dim=1)))


def _scores(sums: torch.Tensor) -> Scores:
    """Turn one column of sums into errors; 0 / 0 is NaN."""
    count, absolute, square, rated, ratio = sums
    return Scores(mae=float(absolute / count), rmse=float((square / count).sqrt()), mape=float(100.0 * ratio / rated))
