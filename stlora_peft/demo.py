"""The demo: the whole job on two simulated cities, in a few minutes and without any data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from stlora_peft import rebuild
from stlora_peft.backbones import new_backbone
from stlora_peft.comparison import RESULTS, compare
from stlora_peft.data import City, CityData, prepare, pretraining_split, simulate_city
from stlora_peft.evaluation import evaluate, evaluate_persistence, forecast_batches
from stlora_peft.figures import draw_against_truth, pick_nodes
from stlora_peft.measurement import Row
from stlora_peft.methods import build_adapter
from stlora_peft.metrics import Metrics
from stlora_peft.sources import described
from stlora_peft.storage import SavedBackbone, load_adapter, load_backbone, save_adapter, save_backbone
from stlora_peft.training import TrainingOptions, TrainingResult, train

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerCallback

PRETRAINING = TrainingOptions(learning_rate=3e-3, max_epochs=12, batch_size=64, progress=False)
ADAPTATION = TrainingOptions(learning_rate=3e-3, patience=None, max_steps=400)


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults take about three minutes on two cores.

    Both records begin on a Monday. With 12 days, what is given and what is tested are weekdays: nothing can learn a
    weekend from three weekdays.

    Args:
        source_nodes: Sensors of the city with a long record.
        source_days: Days of its record.
        target_nodes: Sensors of the city with little data.
        target_days: Days of its record, of which the last 20 % test.
        days: Days of it that are given.
        width: Hidden channels of the backbone.
        pretraining: How the backbone is trained.
        adaptation: How every method is trained.
    """

    source_nodes: int = 30
    source_days: float = 21
    target_nodes: int = 20
    target_days: float = 12
    days: float = 3
    width: int = 24
    pretraining: TrainingOptions = PRETRAINING
    adaptation: TrainingOptions = ADAPTATION


@dataclass(frozen=True)
class Places:
    """Where the demo writes.

    Args:
        folder: Folder of everything.
    """

    folder: Path

    @property
    def source(self) -> Path:
        """City with a long record."""
        return self.folder / "source-city.npz"

    @property
    def target(self) -> Path:
        """City with little data."""
        return self.folder / "target-city.npz"

    @property
    def base(self) -> Path:
        """Pretrained backbone."""
        return self.folder / "backbone"

    @property
    def adapter(self) -> Path:
        """Adapter of the target city."""
        return self.folder / "adapter"

    @property
    def comparison(self) -> Path:
        """Rows, table and figure of the methods."""
        return self.folder / "compare"

    @property
    def picture(self) -> Path:
        """Forecasts against truth."""
        return self.folder / "forecasts.png"


def simulate(places: Places, settings: DemoSettings) -> tuple[City, City]:
    """Simulate two cities of different size, character and mix of roads, and write them.

    Args:
        places: Where to write.
        settings: Their sizes.

    Returns:
        The city with a long record, and the one with little data.
    """
    source = simulate_city(settings.source_nodes, settings.source_days, seed=1, character="radial")
    target = simulate_city(settings.target_nodes, settings.target_days, seed=2, character="grid")
    source.save(places.source)
    target.save(places.target)
    return source, target


@dataclass(frozen=True)
class Pretrained:
    """A pretrained backbone as it lies on disk.

    Args:
        saved: The backbone, read back.
        result: Its training.
        errors: Its test errors in its own city, and those of persistence.
    """

    saved: SavedBackbone
    result: TrainingResult
    errors: Mapping[str, Metrics]


def pretrain(
    places: Places, settings: DemoSettings, city: City, callbacks: Sequence[TrainerCallback] = ()
) -> Pretrained:
    """Train an STGCN on the source city and write it.

    Args:
        places: Where to write.
        settings: How to train.
        city: The source city.
        callbacks: Callbacks of the training, for instance a progress bar.

    Returns:
        The backbone and how good it is at home.
    """
    data = prepare(city, pretraining_split(city.num_steps))
    backbone = new_backbone("stgcn", data, seed=settings.pretraining.seed, hidden_channels=settings.width)
    result = train(backbone, data, settings.pretraining, callbacks=callbacks)
    save_backbone(places.base, backbone, **described([data]))
    errors = {"persistence": evaluate_persistence(data.test, data), "stgcn": evaluate(backbone, data.test, data)}
    return Pretrained(load_backbone(places.base), result, errors)


def compare_methods(places: Places, settings: DemoSettings, saved: SavedBackbone, city: City) -> list[Row]:
    """Bring the backbone to the target city by every method, with one seed and one learning rate.

    Args:
        places: Where to write the rows. Earlier ones are measured again.
        settings: How to train.
        saved: The backbone.
        city: The target city.

    Returns:
        One row for each method.
    """
    (places.comparison / RESULTS).unlink(missing_ok=True)
    return compare(
        saved,
        city,
        days=settings.days,
        methods=["zero-shot", "persistence", "head", "full", "lora", "st-lora"],
        seeds=[settings.adaptation.seed],
        learning_rates=[settings.adaptation.learning_rate],
        options=settings.adaptation,
        refit_steps=settings.adaptation.max_steps or 0,
        output_dir=places.comparison,
    )


def adapt(
    places: Places, settings: DemoSettings, saved: SavedBackbone, data: CityData, callbacks: Sequence[TrainerCallback]
) -> PeftModel:
    """Train the target city's adapter as the comparison has done, and write it.

    Args:
        places: Where to write.
        settings: How to train.
        saved: The backbone.
        data: The target city.
        callbacks: Callbacks of the training.

    Returns:
        The adapted model.
    """
    torch.manual_seed(settings.adaptation.seed)
    model = build_adapter(saved.backbone, data)
    train(model, data, replace(settings.adaptation, progress=False), callbacks=callbacks)
    save_adapter(places.adapter, model)
    return model


@dataclass(frozen=True)
class RoundTrip:
    """Forecasts before saving and after loading.

    Args:
        adapted: Forecasts of the model that was trained, ``[b t n c]``.
        loaded: Forecasts of the pristine backbone with the adapter file.
        alone: Forecasts of the backbone without it.
        mae: Test error of the loaded ones.
    """

    adapted: torch.Tensor
    loaded: torch.Tensor
    alone: torch.Tensor
    mae: float

    @property
    def identical(self) -> bool:
        """Whether all forecasts are the same bit for bit."""
        return torch.equal(self.adapted, self.loaded)

    @property
    def difference(self) -> float:
        """Largest difference between two of them, in the city's units."""
        return float((self.adapted - self.loaded).abs().max())


def load_into_pristine_backbone(places: Places, model: PeftModel, data: CityData) -> RoundTrip:
    """Read backbone and adapter from their files and forecast the whole test part with and without.

    Args:
        places: Where they lie.
        model: The model that was saved.
        data: The target city.

    Returns:
        All forecasts.
    """
    pristine = load_backbone(places.base).backbone
    loaded = load_adapter(pristine, places.adapter, data.city)
    alone = rebuild(pristine, data.city.num_nodes)
    return RoundTrip(
        adapted=_forecast_all(model, data),
        loaded=_forecast_all(loaded, data),
        alone=_forecast_all(alone, data),
        mae=evaluate(loaded, data.test, data).mae,
    )


def _forecast_all(model: nn.Module, data: CityData) -> torch.Tensor:
    """Forecasts of every test window."""
    return torch.cat([forecast for forecast, _ in forecast_batches(model, data.test, data)])


def draw(places: Places, data: CityData, forecasts: RoundTrip, hours: float = 36) -> list[str]:
    """Draw forecasts of the last step of the horizon against the readings, for a few different sensors.

    Args:
        places: Where to write the picture.
        data: The target city.
        forecasts: Forecasts of its test part.
        hours: How much of the test part.

    Returns:
        Names of the sensors.
    """
    nodes = pick_nodes(data.city)
    length = min(round(hours * 60 / data.city.interval_minutes), len(forecasts.loaded))
    first = int(data.test.starts[0]) + data.test.window + data.test.horizon - 1
    lines = {"zero-shot": forecasts.alone, "st-lora": forecasts.loaded}
    draw_against_truth(
        places.picture,
        data.city,
        range(first, first + length),
        {name: values[:length, -1, :, 0].numpy() for name, values in lines.items()},
        nodes=nodes,
        ahead_minutes=data.test.horizon * data.city.interval_minutes,
    )
    return [data.city.node_ids[node] for node in nodes]


def describe_settings(settings: DemoSettings) -> dict[str, str]:
    """Say how the methods were trained, for the page of results.

    Args:
        settings: Sizes of the demo.
    """
    how = settings.adaptation
    return {
        "learning rate": f"{how.learning_rate:g}",
        "budget": how.budget,
    }
