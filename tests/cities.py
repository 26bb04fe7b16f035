"""Several small cities with adapters on one backbone, forecast together and one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from small_city import small_city
from torch import Tensor, nn
from toys import graph, pristine, randomised, small_backbone

from stlora_peft import MultiCity, STLoraConfig
from stlora_peft.data import City, Scaler
from stlora_peft.data.splits import input_series

SIZES = {"ara": 5, "bor": 19, "cim": 3}
WINDOW = 9


@dataclass
class Cities:
    """A PEFT model with an adapter for each city, and what is known of the cities."""

    backbone: nn.Module
    model: PeftModel
    sizes: Mapping[str, int]
    scalers: dict[str, Scaler] = field(default_factory=dict)

    def around(self, name: str) -> dict[str, Any]:
        edge_index, edge_weight = graph(self.sizes[name], seed=len(name) + self.sizes[name])
        return {"edge_index": edge_index, "edge_weight": edge_weight.float(), "interval_minutes": 60}

    def add_to(self, served: MultiCity, name: str) -> None:
        self.model.set_adapter(name)
        served.add(name, self.model, **self.around(name))

    def served(self, **options: Any) -> MultiCity:
        served = MultiCity(self.backbone, **options)
        for name in self.sizes:
            self.add_to(served, name)
        return served

    def one_by_one(self, readings: Mapping[str, Tensor], start: datetime | None = None) -> dict[str, Tensor]:
        """What ``stlora forecast`` does, city after city."""
        return {name: self.alone(name, values, start) for name, values in readings.items()}

    def alone(self, name: str, values: Tensor, start: datetime | None) -> Tensor:
        self.model.set_adapter(name)
        known = self.around(name)
        city = City(
            values=values.numpy(),
            **{key: np.asarray(value) for key, value in known.items() if key != "interval_minutes"},
            interval_minutes=known["interval_minutes"],
            node_ids=tuple(map(str, range(self.sizes[name]))),
            start=start,
            dead_sensors="keep",
        )
        features = "day" if self.backbone.in_channels == 3 else "none"
        x = input_series(city, self.scalers[name], WINDOW, features)[-WINDOW:][None]
        with torch.no_grad():
            scaled = self.model.eval()(x, known["edge_index"], known["edge_weight"])
        return self.scalers[name].inverse(scaled)[0]


def make_cities(
    backbone: str,
    sizes: Mapping[str, int] = SIZES,
    each: Any = None,
    seed: int = 0,
    backbone_options: Any = None,
    **options: Any,
) -> Cities:
    """Cities with random adapters.

    Args:
        backbone: Name of the backbone.
        sizes: Number of nodes of each city.
        each: Further options of single cities by name.
        seed: Seed of the backbone's weights.
        backbone_options: Sizes of the backbone.
        options: Options of all adapters.
    """
    base = small_backbone(backbone, seed=seed, **(backbone_options or {})).eval()
    scalers = {name: Scaler((50.0 + size,), (5.0 + size,)) for name, size in sizes.items()}
    configs = {
        name: STLoraConfig(num_nodes=size, scaler=scalers[name].to_dict(), **(options | (each or {}).get(name, {})))
        for name, size in sizes.items()
    }
    first, *others = sizes
    model = get_peft_model(pristine(base), configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    return Cities(base, _scaled(randomised(model)), sizes, scalers)


def _scaled(model: PeftModel) -> PeftModel:
    """Smaller random factors: updates of the size of what they are added to, which trained ones do not exceed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "nall_" in name and "nall_node_bound" not in name:
                parameter.mul_(0.5)
            elif "nall_node_bound" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_readings(sizes: Mapping[str, int] = SIZES, steps: int = WINDOW, gaps: bool = False) -> dict[str, Tensor]:
    """A record of every city, in its own unit."""
    values = {name: torch.from_numpy(small_city(size, 2, seed=size).values[:steps]) for name, size in sizes.items()}
    return values if gaps else {name: value.nan_to_num(50.0) for name, value in values.items()}


def furthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of any city, relative to its largest forecast."""
    assert list(found) == list(expected)
    assert all(found[name].shape == expected[name].shape for name in expected)
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)
