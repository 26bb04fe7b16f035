"""The cities of the comparison: pairs of one with a long record and one with a few days."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stlora_peft.data import City, load_city, simulate_city

Cities = City | tuple[City, ...]
Pair = tuple[Cities, City]

SOURCE_DAYS, TARGET_DAYS = 14, 35
"""Days of a simulated record. The test part, a fifth, of 35 days is one whole week, Monday to Sunday."""

UNLIKE = {"arterial": 0.1, "downtown": 0.2, "residential": 0.3, "leisure": 0.4}
"""Kinds of road of a city that lives from its leisure."""


@dataclass(frozen=True)
class Setting:
    """A source, or several, and a target.

    Args:
        title: In words.
        load: Reads or simulates both, given the folder of the real cities.
        files: Files of real cities that it needs.
    """

    title: str
    load: Callable[[Path], Pair]
    files: tuple[str, ...] = ()


def halves(city: City) -> Pair:
    """Split a city's sensors at the median of their longitudes: west, east."""
    longitude = np.asarray(city.coordinates)[:, 1]
    west = longitude < np.median(longitude)
    parts = (city.select_nodes(np.flatnonzero(side)) for side in (west, ~west))
    west_half, east_half = (
        replace(part, name=f"{city.name}-{side}", dead_sensors="keep")
        for part, side in zip(parts, ("west", "east"), strict=True)
    )
    return west_half, east_half


def _shenzhen(folder: Path) -> Pair:
    return load_city(folder / "la-loop.npz"), load_city(folder / "shenzhen-flow.npz")


def _alike() -> Pair:
    return (
        simulate_city(30, SOURCE_DAYS, seed=11, character="radial"),
        simulate_city(24, TARGET_DAYS, seed=12, character="radial"),
    )


def _unlike(days: float = TARGET_DAYS, source: int = 30, target: int = 24) -> Pair:
    return (
        simulate_city(source, min(days, SOURCE_DAYS), seed=13, character="radial"),
        simulate_city(target, days, seed=14, character="grid", mix=UNLIKE),
    )


def _three_sources() -> Pair:
    """The pair of :func:`_unlike` with two further sources; the target's mix of roads is in none of them."""
    source, target = _unlike()
    further = (
        simulate_city(26, SOURCE_DAYS, seed=15, character="grid"),
        simulate_city(34, SOURCE_DAYS, seed=16, character="radial"),
    )
    return (source, *further), target


SETTINGS = {
    "la-shenzhen": Setting("Los Angeles (speed) to Shenzhen (flow)", _shenzhen, ("la-loop.npz", "shenzhen-flow.npz")),
    "west-east": Setting(
        "Los Angeles: western half of the sensors to the eastern",
        lambda folder: halves(load_city(folder / "la-loop.npz")),
        ("la-loop.npz",),
    ),
    "east-west": Setting(
        "Los Angeles: eastern half of the sensors to the western",
        lambda folder: halves(load_city(folder / "la-loop.npz"))[::-1],
        ("la-loop.npz",),
    ),
    "alike": Setting("simulated, alike: radial to radial", lambda folder: _alike()),
    "unlike": Setting(
        "simulated, unlike in graph and roads: radial to grid with much leisure", lambda folder: _unlike()
    ),
    "weekend": Setting(
        "simulated, as `unlike`, 14 days: working days are given, a weekend is forecast", lambda folder: _unlike(14)
    ),
    "three-sources": Setting(
        "simulated, as `unlike`, but pretrained on three cities: radial, grid, radial", lambda folder: _three_sources()
    ),
}
"""Settings of the comparison by name."""

QUICK = {"quick": Setting("simulated, small: radial to grid", lambda folder: _unlike(10, source=12, target=10))}
"""The one of ``--quick``."""
