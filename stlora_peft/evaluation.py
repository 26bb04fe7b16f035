"""Forecasts of a model, or of persistence, and their errors in the city's own units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from torch import nn

from stlora_peft.data import CityData, Windows
from stlora_peft.data.windows import last_reading
from stlora_peft.errors import message
from stlora_peft.metrics import ErrorSums, Metrics
from stlora_peft.significance import DailyErrors

Replaying = Callable[[torch.Tensor], AbstractContextManager[None]]
"""What a forward pass of the windows with these starts runs in, for instance one that has parts of it stored."""

Combine = Callable[[torch.Tensor], torch.Tensor]
"""What the sums of :class:`stlora_peft.metrics.ErrorSums` become."""


def no_replay(starts: torch.Tensor) -> AbstractContextManager[None]:
    """Compute everything."""
    return nullcontext()


def evaluate(
    model: nn.Module,
    windows: Windows,
    data: CityData,
    *,
    batch_size: int = 64,
    daily: DailyErrors | None = None,
    replaying: Replaying = no_replay,
    combine: Combine | None = None,
) -> Metrics:
    """Compare a model's forecasts with the truth.

    Args:
        model: A backbone, or a :class:`peft.PeftModel` around one. Its training mode is left as it was.
        windows: Which windows to forecast: ``data.train``, ``data.val`` or ``data.test``.
        data: The city they come from, with its scaler and its graph.
        batch_size: Windows in one forward pass.
        daily: Takes the errors in day by day as well.
        replaying: What the forward passes run in.
        combine: What the sums over these windows become before the errors are taken from them, for instance those of
            several processes added up.

    Returns:
        Errors in the city's units, missing truths left out.

    Raises:
        ValueError: If window, horizon or channels of the data do not fit the model.
    """
    batches = forecast_batches(model, windows, data, batch_size=batch_size, replaying=replaying)
    return measure(batches, windows.horizon, daily, combine)


def evaluate_persistence(
    windows: Windows, data: CityData, *, batch_size: int = 64, daily: DailyErrors | None = None
) -> Metrics:
    """Compare the forecast "as it is now" with the truth; see :func:`persistence_batches`.

    Args:
        windows: Which windows to forecast.
        data: The city they come from, with its scaler.
        batch_size: Windows in one step.
        daily: Takes the errors in day by day as well.

    Returns:
        Errors in the city's units, missing truths left out.
    """
    return measure(persistence_batches(windows, data, batch_size=batch_size), windows.horizon, daily)


def measure(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    horizon: int,
    daily: DailyErrors | None = None,
    combine: Combine | None = None,
) -> Metrics:
    """Compare forecasts with the truth.

    Args:
        batches: Forecast and truth, batch by batch, ``[b t n c]``.
        horizon: Number of forecast steps.
        daily: Takes the errors in day by day as well.
        combine: What the sums become before the errors are taken from them.

    Returns:
        Errors in the units of the batches, missing truths left out.
    """
    sums = ErrorSums(horizon)
    for forecast, truth in batches if daily is None else daily.watch(batches):
        sums.add(forecast, truth)
    sums.sums = sums.sums if combine is None else combine(sums.sums)
    return sums.metrics()


def forecast_batches(
    model: nn.Module, windows: Windows, data: CityData, *, batch_size: int = 64, replaying: Replaying = no_replay
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Forecast batch by batch, in the order of the windows, without gradients.

    Args:
        model: A backbone, or a :class:`peft.PeftModel` around one.
        windows: Which windows to forecast.
        data: The city they come from, with its scaler and its graph.
        batch_size: Windows in one forward pass.
        replaying: What the forward passes run in.

    Yields:
        Forecast and truth in the city's units, on the CPU.

    Shapes:
        - **forecast**, **truth:** ``[b t n c]`` with the horizon on ``t``

    Raises:
        ValueError: If window, horizon or channels of the data do not fit the model.
    """
    check_fit(model, windows)
    for batch in window_batches(windows, batch_size):
        with replaying(batch["start"]):
            found = forecast(model, batch["x"], data)
        yield found, batch["y"]


def forecast(model: nn.Module, x: torch.Tensor, data: CityData) -> torch.Tensor:
    """Forecast one batch of input windows without gradients.

    Args:
        model: A backbone, or a :class:`peft.PeftModel` around one. Its training mode is left as it was.
        x: Input windows, as ``data.test.inputs(starts)`` gathers them.
        data: The city they come from, with its scaler and its graph.

    Returns:
        Forecast in the city's units, on the CPU.

    Shapes:
        - **x:** ``[b t n c]`` with the window on ``t``
        - **output:** ``[b t n c]`` with the horizon on ``t``
    """
    device = next((parameter.device for parameter in model.parameters()), x.device)
    with evaluation_mode(model), torch.no_grad():
        scaled: torch.Tensor = model(x.to(device), data.edge_index.to(device), data.edge_weight.to(device))
    return data.scaler.inverse(scaled.float().cpu())


def persistence_batches(
    windows: Windows, data: CityData, *, batch_size: int = 64
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Repeat the last reading of the window at every forecast step.

    Where that reading is missing, the last one that was measured inside the window stands in for it, and where the
    window has none, the scaler's mean.

    Args:
        windows: Which windows to forecast.
        data: The city they come from, with its scaler.
        batch_size: Windows in one step.

    Yields:
        Forecast and truth in the city's units.

    Shapes:
        - **forecast**, **truth:** ``[b t n c]`` with the horizon on ``t``
    """
    values = windows.targets
    latest = last_reading(values)
    mean = torch.as_tensor(data.scaler.mean, dtype=values.dtype)
    for rows in torch.arange(len(windows)).split(batch_size):
        starts = windows.starts[rows]
        step = latest[starts + windows.window - 1]  # [b n c]
        reading = values.gather(0, step.clamp(min=0))
        inside = step >= starts[:, None, None]
        forecast = torch.where(inside, reading, mean)[:, None].expand(-1, windows.horizon, -1, -1)
        yield forecast, windows.__getitems__(rows.tolist())["y"]


def check_fit(model: nn.Module, windows: Windows) -> None:
    """Check that a model can read these windows, as far as it says what it reads.

    Args:
        model: A backbone with any of the attributes ``window``, ``horizon``, ``in_channels``, ``out_channels``, or a
            :class:`peft.PeftModel` around one.
        windows: Windows that it is to forecast.

    Raises:
        ValueError: If one of them differs.
    """
    backbone = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {
        "window": windows.window,
        "horizon": windows.horizon,
        "in_channels": windows.series.shape[-1],
        "out_channels": windows.targets.shape[-1],
    }
    needed = {name: getattr(backbone, name, value) for name, value in found.items()}
    if needed != found:
        wrong = [name for name in found if needed[name] != found[name]]
        raise ValueError(
            message(
                f"the data do not fit the backbone '{getattr(backbone, 'name', type(backbone).__name__)}'",
                expected=", ".join(f"{name}={needed[name]}" for name in wrong),
                got=", ".join(f"{name}={found[name]}" for name in wrong),
                fix="prepare the city with the backbone's window, horizon and time_features, or take another backbone",
            )
        )


def window_batches(windows: Windows, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Gather windows batch by batch, in their order.

    Args:
        windows: The windows.
        batch_size: Windows in one batch.

    Yields:
        Batches with the keys ``x``, ``y`` and ``start``.
    """
    for start in range(0, len(windows), batch_size):
        yield windows.__getitems__(list(range(start, min(start + batch_size, len(windows)))))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation for a while, and every module back to the mode it had (a frozen norm may have its own)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
