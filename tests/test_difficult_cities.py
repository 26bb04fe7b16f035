"""Cities that are hard to adapt to: a clear error, or an adapter and forecasts without a NaN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from small_city import small_city, small_data
from torch import nn
from toys import raised, small_backbone

from stlora_peft.data import City, CityData
from stlora_peft.evaluation import evaluate, forecast_batches
from stlora_peft.methods import METHODS, build_adapter, calibrated
from stlora_peft.training import TrainingOptions, train

WHOLE = TrainingOptions(patience=None, max_steps=3, batch_size=16, learning_rate=1e-2, progress=False)


def backbone(name: str) -> nn.Module:
    return small_backbone(name, window=12, horizon=12)


def changed(city: City, nodes: slice, steps: slice, value: float) -> City:
    """The city with other readings at some nodes and steps."""
    values = city.values.copy()
    values[steps, nodes] = value
    return replace(city, values=values, dead_sensors="keep")


def given(city: City) -> slice:
    """The steps that a split of the small city gives away."""
    return slice(0, small_data(city).split.given.stop)


CITIES = {
    "dead sensor": lambda city: changed(city, slice(1, 2), slice(None), np.nan),
    "sensor that is dead in the given days": lambda city: changed(city, slice(1, 2), given(city), np.nan),
    "constant sensor": lambda city: changed(city, slice(1, 2), slice(None), 50.0),
    "a day without a reading": lambda city: changed(city, slice(None), slice(0, round(city.steps_per_day)), np.nan),
    "half of the readings missing": lambda city: replace(
        city, values=np.where(np.random.default_rng(0).random(city.values.shape) < 0.5, np.nan, city.values)
    ),
    "one node": lambda city: city.select_nodes([2]),
}


def adapted(name: str, data: CityData, how: str) -> PeftModel:
    torch.manual_seed(0)
    model = build_adapter(backbone(name), data)
    if how == "trained":
        train(model, data, WHOLE)
    else:
        calibrated(model, data)
    return model


@pytest.mark.parametrize("how", ["trained", "calibrated"])
@pytest.mark.parametrize("name", ["lstm", "stgcn", "gwnet", "agcrn"])
@pytest.mark.parametrize("kind", CITIES)
def test_adapter_of_a_difficult_city_is_finite_and_so_are_its_forecasts(kind: str, name: str, how: str) -> None:
    data = small_data(CITIES[kind](small_city(num_nodes=5)))
    model = adapted(name, data, how)
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
    for forecast, _ in forecast_batches(model, data.test, data):
        assert forecast.isfinite().all()
    assert np.isfinite(evaluate(model, data.test, data).mae)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trained and method.build])
def test_every_trained_method_survives_a_city_of_one_node_and_a_dead_sensor(method: str) -> None:
    for kind in ("one node", "sensor that is dead in the given days"):
        data = small_data(CITIES[kind](small_city(num_nodes=5)))
        torch.manual_seed(0)
        model = METHODS[method].build(backbone("stgcn"), data).model
        train(model, data, WHOLE)
        assert np.isfinite(evaluate(model, data.test, data).mae)


def test_given_days_without_any_reading_are_refused() -> None:
    city = small_city(num_nodes=5)
    empty = changed(city, slice(None), given(city), np.nan)
    assert raised(lambda: small_data(empty)) == {
        "where": "channel 0 cannot be scaled",
        "expected": "at least two different readings in the given days",
        "got": "no reading",
        "fix": "give more days, or leave this channel out",
    }


def test_fewer_steps_than_window_and_horizon_are_refused() -> None:
    from stlora_peft.data import adaptation_split, prepare

    city = small_city(num_nodes=5)
    split = adaptation_split(city.num_steps, city.steps_per_day, days=20 / city.steps_per_day)
    assert raised(lambda: prepare(city, split)) == {
        "where": f"city '{city.name}': the train part is too short for one window",
        "expected": "at least 24 steps for window=12 and horizon=12",
        "got": "15 steps",
        "fix": "give more days, or a shorter window and horizon",
    }
