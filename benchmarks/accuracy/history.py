"""What the given days say before the first step: node vectors, an adapter that can read them, calibrated forecasts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stlora_peft.data import City, CityData, Scaler, prepare, pretraining_split
from stlora_peft.evaluation import window_batches
from stlora_peft.methods import build_adapter
from stlora_peft.storage import SavedBackbone
from stlora_peft.training import TrainingOptions, train

Array = npt.NDArray[np.floating]
NODES = "base_model.model.stlora_nodes"
LAGS, PERCENTILES, PARTS_OF_DAY = (1, 3, 6, 12), (5, 25, 50, 75, 95), 12
SEGMENTS = 12
PRETRAINING = TrainingOptions(learning_rate=3e-3, max_epochs=10, patience=5, batch_size=64, progress=False)


def with_history(settings: dict[str, Any]) -> Callable[[SavedBackbone, CityData, City], nn.Module]:
    """Build an adapter whose node vectors start from what the given days say about each node."""

    def build(saved: SavedBackbone, data: CityData, source: City) -> nn.Module:
        found = _given(data)
        vectors = (found - found.mean(0)) / (found.std(0) + 1e-3)
        return _started(build_adapter(saved.backbone, data, **settings), vectors)

    return build


def from_source(settings: dict[str, Any]) -> Callable[[SavedBackbone, CityData, City], nn.Module]:
    """Build the same adapter, its other factors as they were trained on the source with vectors of that kind."""

    def build(saved: SavedBackbone, data: CityData, source: City) -> nn.Module:
        seed = torch.initial_seed()
        mean, std, state = _learned(saved, source, len(data.split.given) / data.city.steps_per_day, settings)
        torch.manual_seed(seed)
        model = build_adapter(saved.backbone, data, **settings)
        model.load_state_dict(state, strict=False)
        return _started(model, (_given(data) - mean) / std)

    return build


def _learned(
    saved: SavedBackbone, source: City, days: float, settings: dict[str, Any]
) -> tuple[Array, Array, dict[str, Tensor]]:
    """Train an adapter on the source, the vectors of every step from a random segment of its record.

    Returns:
        Mean and standard deviation of the vectors, and every factor that is not bound to the source's nodes.
    """
    split = pretraining_split(source.num_steps)
    data = prepare(source, split, time_features=saved.time_features)
    found = np.stack([_features(source, part, data.scaler) for part in _segments(source, split.train, days)])
    mean, std = found.mean((0, 1)), found.std((0, 1)) + 1e-3
    vectors = torch.from_numpy(((found - mean) / std).clip(-3, 3)).float()
    torch.manual_seed(0)
    model = build_adapter(saved.backbone, data, same_city=True, **settings)
    chosen = torch.Generator().manual_seed(1)

    def read(adapter_name: str) -> Tensor:
        return vectors[torch.randint(len(vectors), (1,), generator=chosen).item() if model.training else 0]

    model.get_submodule(NODES).vectors = read
    result = train(model, data, PRETRAINING)
    print(f"on the source: {result.history[0]['val_mae']:.4f} -> {result.best_val_mae:.4f}", flush=True)
    state = model.state_dict()
    own = [name for name in state if "nall_" in name and "nall_emb" not in name and "node_bound" not in name]
    return mean, std, {name: state[name].clone() for name in own}


def _started(model: nn.Module, vectors: Array) -> nn.Module:
    """Copy vectors into the adapter's table, from where they are trained."""
    table = model.get_submodule(NODES).nall_emb["default"]
    table.data.copy_(torch.from_numpy(vectors.clip(-3, 3)).float())
    return model


def _given(data: CityData) -> Array:
    """Features of every node over the given days."""
    return _features(data.city, data.split.given, data.scaler)


def _segments(city: City, steps: range, days: float) -> Sequence[range]:
    """Parts of a record, as long as the given days or three quarters of it, that begin at midnight where they can."""
    chosen, day = np.random.default_rng(0), int(city.steps_per_day)
    found = []
    for number in range(SEGMENTS):
        length = min(int((days if number % 2 == 0 else 0.75 * days) * day), len(steps))
        latest = steps.stop - length
        start = int(chosen.integers(steps.start, max(steps.start + 1, latest)))
        start = start // day * day if latest > day else start
        found.append(range(start, start + length))
    return found


def _features(city: City, steps: range, scaler: Scaler) -> Array:
    """Level, spread, percentiles, jumps, memory, daily course and neighbours of every node, ``(N, 25)``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a node without readings has no mean; its features become 0
        return np.nan_to_num(np.stack(_columns(city, steps, scaler), 1)).astype(np.float32)


def _columns(city: City, steps: range, scaler: Scaler) -> list[Array]:
    z = (city.values[steps.start : steps.stop, :, 0] - scaler.mean[0]) / scaler.std[0]
    mean = np.nanmean(z, 0)
    columns = [mean, np.nanstd(z, 0), *(np.nanpercentile(z, level, axis=0) for level in PERCENTILES)]
    columns.append(np.log(np.nanstd(np.diff(z, axis=0), 0) + 1e-3))
    centred = z - mean
    variance = np.nanmean(centred * centred, 0) + 1e-6
    columns += [np.nanmean(centred[lag:] * centred[:-lag], 0) / variance for lag in LAGS]
    day = int(city.steps_per_day)
    first = 0 if city.start is None else int((city.start.hour * 60 + city.start.minute) / city.interval_minutes)
    part = ((np.arange(len(z)) + steps.start + first) % day / day * PARTS_OF_DAY).astype(int)
    for number in range(PARTS_OF_DAY):
        rows = z[part == number]
        level = np.nanmean(rows, 0) if len(rows) > 3 else mean
        columns.append(np.where(np.isfinite(level), level, mean) - mean)
    return [*columns, _neighbours(city, mean) - mean]


def _neighbours(city: City, mean: Array) -> Array:
    """Mean of the nodes that an edge comes from, each by the edge's weight; a node without edges has its own."""
    source, target = city.edge_index
    weight = city.edge_weight.astype(float)
    degree, total = np.zeros(city.num_nodes), np.zeros(city.num_nodes)
    np.add.at(degree, target, weight)
    np.add.at(total, target, weight * mean[source])
    return np.where(degree > 0, total / np.maximum(degree, 1e-9), mean)


def least_absolute(F: Tensor, Y: Tensor, start: Tensor, ridge: float, iterations: int = 15) -> Tensor:
    r"""Fit :math:`\min_\theta \sum_i |y_i - f_i \theta|` near a start, by iteratively re-weighted least squares.

    Args:
        F: Features.
        Y: Truths, NaN where missing.
        start: What :math:`\theta` is drawn to.
        ridge: How strongly, relative to the sum of the weights.
        iterations: Number of least squares.

    Shapes:
        - **F:** :math:`(n, *, K)`; **Y:** :math:`(n, *)`; **start**, **output:** :math:`(*, K)`
    """
    known = torch.isfinite(Y)
    Y = torch.where(known, Y, 0)
    eye = torch.eye(F.shape[-1], dtype=F.dtype)
    theta = start.clone()
    for _ in range(iterations):
        weight = known / (Y - (F * theta).sum(-1)).abs().clamp(min=0.02)
        gram = torch.einsum("n...i,n...j,n...->...ij", F, F, weight)
        rest = torch.einsum("n...i,n...->...i", F, weight * (Y - (F * start).sum(-1)))
        pull = (ridge * weight.sum(0))[..., None, None] * eye
        theta = start + torch.linalg.solve(gram + pull + 1e-8 * eye, rest)
    return theta


def fit_city_then_nodes(F: Tensor, Y: Tensor, start: Tensor, city_ridge: float, ridge: float | None) -> Tensor:
    """Fit one map for the city, then one for each node that is drawn to it; ``ridge=None`` keeps the city's.

    Shapes:
        - **F:** :math:`(n, H, N, K)`; **Y:** :math:`(n, H, N)`; **start:** :math:`(H, K)`
        - **output:** :math:`(H, N, K)`
    """
    rows = F.transpose(1, 2).flatten(0, 1), Y.transpose(1, 2).flatten(0, 1)
    city = least_absolute(*rows, start, city_ridge)[:, None].expand(-1, F.shape[2], -1)
    return city if ridge is None else least_absolute(F, Y, city, ridge)


class Calibrated(nn.Module):
    """A model whose forecast is scaled, shifted and drawn to the last reading, step by step and node by node.

    Args:
        model: The model.
        data: The city; its training windows are what the maps are fitted on.
        ridge: How strongly nodes are drawn to the city's map; None takes that for all.

    Shapes:
        - **theta:** :math:`(H, N, 3)`
    """

    def __init__(self, model: nn.Module, data: CityData, ridge: float | None) -> None:
        super().__init__()
        self.model = model
        F, Y = self.collect(data)
        start = torch.zeros(F.shape[1], F.shape[-1], dtype=F.dtype)
        self.theta = nn.Parameter(fit_city_then_nodes(F, Y, self.start(start), self.city_ridge, ridge).float())
        self.theta.requires_grad_(any(p.requires_grad for p in model.parameters()))

    city_ridge = 0.001

    def start(self, zeros: Tensor) -> Tensor:
        """Return the map that leaves the forecast as it is."""
        return zeros.index_fill(1, torch.tensor([0]), 1.0)

    def features(self, forecast: Tensor, x: Tensor) -> Tensor:
        """Numbers that the corrected forecast is a linear map of.

        Shapes:
            - **forecast:** ``[b t n c]`` with one channel; **x:** ``[b t n c]``
            - **output:** ``[b t n k]``
        """
        last = x[:, -1:, :, :1].expand_as(forecast)
        return torch.cat([forecast, last, torch.ones_like(forecast)], -1)

    def collect(self, data: CityData) -> tuple[Tensor, Tensor]:
        """Features and scaled truths of the training windows."""
        self.model.eval()
        F, Y = [], []
        with torch.no_grad():
            for batch in window_batches(data.train, 64):
                forecast = self.model(batch["x"], data.edge_index, data.edge_weight)
                F.append(self.features(forecast, batch["x"]))
                Y.append(data.scaler.transform(batch["y"])[..., 0])
        return torch.cat(F).double(), torch.cat(Y).double()

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Forecast; shapes are those of the model."""
        features = self.features(self.model(x, edge_index, edge_weight), x)
        return (features * self.theta).sum(-1, keepdim=True)


class WindowCalibrated(Calibrated):
    """The same with the whole window, the whole forecast and the clock as features of every step."""

    city_ridge = 0.0001

    def start(self, zeros: Tensor) -> Tensor:
        """Return the map that leaves the forecast as it is."""
        steps = len(zeros)
        zeros[:, :steps] = torch.eye(steps, dtype=zeros.dtype)
        zeros[:, -1] = 1.0  # the last reading: forecasts are taken relative to it
        return zeros

    def features(self, forecast: Tensor, x: Tensor) -> Tensor:
        """Relative forecast, relative window, clock, one and the last reading, the same for every step."""
        last = x[:, -1:, :, :1]
        rows = [(forecast - last)[..., 0], (x[:, :-1, :, :1] - last)[..., 0], x[:, -1, :, 1:].movedim(-1, 1)]
        rows += [torch.ones_like(last[..., 0]), last[..., 0]]
        return torch.cat(rows, 1).transpose(1, 2)[:, None].expand(-1, forecast.shape[1], -1, -1)
