"""A city of a few nodes and hourly readings, small enough to train on in a test."""

from datetime import datetime

import numpy as np

from stlora_peft.data import City, CityData, adaptation_split, prepare


def small_city(num_nodes: int = 4, num_days: int = 16, seed: int = 0, name: str = "small") -> City:
    rng = np.random.default_rng(seed)
    hours = np.arange(24 * num_days)[:, None]
    phase, swing = rng.uniform(0, 6, num_nodes), rng.uniform(5, 15, num_nodes)
    values = 50 + swing * np.sin(2 * np.pi * hours / 24 + phase) + rng.normal(0, 1, (len(hours), num_nodes))
    values[rng.random(values.shape) < 0.05] = np.nan
    values[rng.random(values.shape) < 0.02] = 0.0
    nodes = np.arange(num_nodes)
    return City(
        values=values.astype(np.float32),
        edge_index=np.stack([nodes, (nodes + 1) % num_nodes]),
        edge_weight=np.linspace(0.5, 1.0, num_nodes, dtype=np.float32),
        interval_minutes=60,
        node_ids=tuple(f"{name}-{node}" for node in nodes),
        start=datetime(2024, 3, 4),
        name=name,
        quantity="speed",
    )


def small_data(city: City | None = None, days: float = 8) -> CityData:
    city = city or small_city()
    split = adaptation_split(city.num_steps, city.steps_per_day, days)
    return prepare(city, split, window=12, horizon=12, time_features="day")
