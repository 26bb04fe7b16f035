"""A backbone and a city's adapter, loaded for forecasting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stlora_peft.errors import message

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from stlora_peft.data import City, CityData, Scaler
    from stlora_peft.storage import SavedBackbone

AdapterFolder = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="FOLDER", help="Folder of the city's adapter.", show_default="backbone alone"),
]


@dataclass(frozen=True)
class Loaded:
    """A backbone, and an adapter where there is one, for a city.

    Args:
        saved: The backbone.
        adapted: The backbone with the adapter, or None.
        city: The city to forecast.
        scaler: The scaler of the adapter; without one, that of the backbone in its own city, else None.
    """

    saved: SavedBackbone
    adapted: PeftModel | None
    city: City
    scaler: Scaler | None

    def alone(self) -> nn.Module:
        """Return the backbone without an adapter, for the city's nodes: a source's own, or as in a new city."""
        from stlora_peft import rebuild
        from stlora_peft.sources import backbone_of

        number = _source_number(self.saved, self.city)
        if number is not None:
            return backbone_of(self.saved.backbone, [one.num_nodes for one in self.saved.sources], number).eval()
        return rebuild(self.saved.backbone, self.city.num_nodes).eval()

    def data(self) -> CityData:
        """Prepare the city's test part, with all before it as given where no scaler is known.

        Raises:
            ValueError: If the record is too short.
        """
        from stlora_peft.data import adaptation_split, prepare

        split = adaptation_split(self.city.num_steps, self.city.steps_per_day)
        backbone = self.saved.backbone
        return prepare(
            self.city, split, backbone.window, backbone.horizon, self.saved.time_features, scaler=self.scaler
        )


def load(city: City, base: Path, adapter: Path | None) -> Loaded:
    """Load what forecasts a city.

    Args:
        city: The city.
        base: Folder of the backbone.
        adapter: Folder of the adapter, or None.

    Returns:
        The forecaster, checked against the city's nodes and channels.

    Raises:
        FileNotFoundError: If a file is absent.
        ValueError: If a file is damaged, or belongs to something else.
    """
    from stlora_peft.storage import load_adapter, load_backbone

    saved = load_backbone(base)
    _check_channels(city, saved)
    if adapter is None:
        return Loaded(saved, None, city, _home_scaler(saved, city))
    adapted = load_adapter(saved.backbone, adapter, city)
    return Loaded(saved, adapted, city, _adapter_scaler(adapted, adapter))


def _source_number(saved: SavedBackbone, city: City) -> int | None:
    """Which of several cities that the backbone was trained on this is."""
    known = [(source.city, source.num_nodes) for source in saved.sources]
    return known.index((city.name, city.num_nodes)) if (city.name, city.num_nodes) in known else None


def _home_scaler(saved: SavedBackbone, city: City) -> Scaler | None:
    """Scaler that the backbone was trained with in this city, or None in one that is new to it."""
    number = _source_number(saved, city)
    if number is not None:
        return saved.sources[number].scaler
    num_nodes = saved.backbone.hyperparameters.get("num_nodes", city.num_nodes)
    return saved.scaler if (city.name, city.num_nodes) == (saved.city, num_nodes) else None


def _adapter_scaler(model: PeftModel, folder: Path) -> Scaler:
    """Scaler that the adapter was trained with."""
    from stlora_peft.data import Scaler

    known = getattr(model.peft_config[model.active_adapters[0]], "scaler", None)
    if known is None:
        raise ValueError(
            message(
                f"adapter '{folder}' does not say how its city's readings are scaled",
                expected="the statistics of a scaler in its configuration",
                got="scaler=None",
                fix="make the adapter with 'stlora adapt', or with STLoraConfig(scaler=data.scaler.to_dict(), ...)",
            )
        )
    return Scaler.from_dict(known)


def _check_channels(city: City, saved: SavedBackbone) -> None:
    """Raise where the city has another number of channels than the backbone reads."""
    wanted = len(saved.scaler.mean)
    if city.num_channels != wanted:
        raise ValueError(
            message(
                f"city '{city.name}' does not fit the backbone, which was trained on {saved.city}",
                expected=f"{wanted} channel{'s' * (wanted != 1)}: {saved.quantity or 'as in its own city'}",
                got=f"{city.num_channels} channels",
                fix="choose with --channels",
            )
        )
