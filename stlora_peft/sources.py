"""Several cities that one model is trained on: what they must share, their common unit, and the nodes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stlora_peft.data import CityData, Scaler, Windows
from stlora_peft.errors import message
from stlora_peft.launch import process_count
from stlora_peft.storage import SourceCity
from stlora_peft.tuner.node_bound import rebuild
from stlora_peft.tuner.subset import node_tensors


def nodes_of(sizes: Sequence[int], number: int) -> Tensor:
    """Numbers of a city's nodes among those of all cities, one city after the other.

    Args:
        sizes: Number of nodes of each city.
        number: Which city.

    Shapes:
        - **output:** :math:`(N_k,)`, int64

    Example:
        >>> nodes_of([3, 2, 4], 1)
        tensor([3, 4])
    """
    first = sum(sizes[:number])
    return torch.arange(first, first + sizes[number])


def backbone_of(backbone: nn.Module, sizes: Sequence[int], number: int) -> nn.Module:
    """Copy a backbone of several cities as that of one of them: what is bound to the nodes is this city's own.

    Args:
        backbone: Backbone that was trained on all of them; it is not changed.
        sizes: Number of nodes of each city, in the order of the training.
        number: Which city.

    Raises:
        ValueError: If a module is bound to the nodes in a way that several cities cannot share.

    Example:
        >>> from stlora_peft.backbones import build_backbone
        >>> backbone = build_backbone("stgcn", num_nodes=5, in_channels=1)
        >>> backbone_of(backbone, sizes=[3, 2], number=1).hyperparameters["num_nodes"]
        2
    """
    new, nodes = rebuild(backbone, sizes[number]), nodes_of(sizes, number)
    for own, whole in zip(node_tensors(new), node_tensors(backbone), strict=True):
        with torch.no_grad():
            own.value.copy_(whole.value.index_select(whole.axis, nodes.to(whole.value.device)))
    return new


def in_deviations(data: CityData) -> CityData:
    r"""Copy a city's data with truths in standard deviations, a unit that all cities have.

    .. math::
        z = \frac{y - \mu_c}{\sigma_c}

    with the mean and the standard deviation of channel :math:`c` that the city's scaler holds. The scaler of the copy
    changes nothing.

    Args:
        data: The city's data.

    Example:
        >>> from stlora_peft.data import adaptation_split, prepare, simulate_city
        >>> city = simulate_city(num_nodes=4, days=4, seed=0)
        >>> data = in_deviations(prepare(city, adaptation_split(city.num_steps, city.steps_per_day)))
        >>> data.scaler, abs(float(data.given.targets.nanmean())) < 0.5
        (Scaler(mean=(0.0,), std=(1.0,)), True)
    """
    targets = data.scaler.transform(data.train.targets)
    train, val, test = (
        Windows(part.series, targets, part.starts, window=part.window, horizon=part.horizon)
        for part in (data.train, data.val, data.test)
    )
    channels = len(data.scaler.mean)
    scaler = Scaler((0.0,) * channels, (1.0,) * channels)
    return replace(data, scaler=scaler, train=train, val=val, test=test)


def described(prepared: Sequence[CityData]) -> dict[str, Any]:
    """What a saved backbone says of the cities that it was trained on.

    Args:
        prepared: The cities, in the order of the training.

    Returns:
        ``city``, ``quantity``, ``scaler``, ``time_features`` and ``sources`` of
        :func:`stlora_peft.storage.save_backbone`.

    Example:
        >>> from stlora_peft.data import adaptation_split, prepare, simulate_city
        >>> cities = [simulate_city(num_nodes=4, days=4, seed=seed) for seed in (0, 1)]
        >>> prepared = [prepare(city, adaptation_split(city.num_steps, city.steps_per_day)) for city in cities]
        >>> described(prepared)["city"], [source.num_nodes for source in described(prepared)["sources"]]
        ('radial-0 + radial-1', [4, 4])
    """
    sources = [SourceCity(data.city.name, data.city.quantity, data.city.num_nodes, data.scaler) for data in prepared]
    return {
        "city": " + ".join(source.city for source in sources),
        "quantity": " + ".join(dict.fromkeys(source.quantity for source in sources)),
        "scaler": prepared[0].scaler,
        "time_features": prepared[0].time_features,
        "sources": sources if len(sources) > 1 else [],
    }


def check_sources(model: nn.Module, prepared: Sequence[CityData]) -> None:
    """Refuse cities that one model cannot be trained on together; with a single one there is nothing to share.

    Args:
        model: The model.
        prepared: The cities.

    Raises:
        ValueError: If there is no city, window, horizon, channels, interval or clock of the cities differ, the start
            of a record is unknown where the model reads the clock, the model is bound to another number of nodes than
            all cities have or in a way that cannot be shared, or several processes train.
    """
    if not prepared:
        raise ValueError(
            message(
                "there is nothing to train on",
                expected="a city, or a list of at least one",
                got="an empty list",
                fix="give what prepare(city, split) returns",
            )
        )
    if len(prepared) == 1:
        return
    for other in prepared[1:]:
        _check_alike(prepared[0], other)
    _check_clocks(prepared)
    _check_nodes(model, prepared)
    if process_count() > 1:
        raise ValueError(
            message(
                "several cities cannot be trained by several processes",
                expected="one process where there is more than one city",
                got=f"{process_count()} processes, {len(prepared)} cities",
                fix="start it without 'accelerate launch', or train on one city",
            )
        )


def _properties(data: CityData) -> dict[str, object]:
    """What the cities must share."""
    return {
        "window": data.train.window,
        "horizon": data.train.horizon,
        "channels": data.city.num_channels,
        "interval_minutes": data.city.interval_minutes,
        "time_features": data.time_features,
    }


def _check_alike(first: CityData, other: CityData) -> None:
    wanted, found = _properties(first), _properties(other)
    wrong = [name for name in wanted if wanted[name] != found[name]]
    if wrong:
        raise ValueError(
            message(
                f"cities '{first.city.name}' and '{other.city.name}' cannot be trained on together",
                expected=", ".join(f"{name}={wanted[name]!r}" for name in wrong) + f", as '{first.city.name}' has",
                got=", ".join(f"{name}={found[name]!r}" for name in wrong),
                fix="prepare all cities with the same window, horizon and time_features, and give the same channels "
                "at the same interval",
            )
        )


def _check_clocks(prepared: Sequence[CityData]) -> None:
    """Refuse a city whose hours nobody knows: its noon would be another city's night."""
    unknown = [data.city.name for data in prepared if data.city.start is None]
    if unknown and prepared[0].time_features != "none":
        raise ValueError(
            message(
                f"city '{unknown[0]}' has no clock, so it cannot be trained on together with others",
                expected=f"the time of the first step in every city, for time_features={prepared[0].time_features!r}",
                got="start=None in " + ", ".join(f"'{name}'" for name in unknown),
                fix="give the time with City(start=...) or 'stlora convert --start', or take time_features='none'",
            )
        )


def _check_nodes(model: nn.Module, prepared: Sequence[CityData]) -> None:
    total = sum(data.city.num_nodes for data in prepared)
    wrong = next((held for held in node_tensors(model) if held.value.shape[held.axis] != total), None)
    if wrong is not None:
        sizes = " and ".join(f"{data.city.num_nodes} of '{data.city.name}'" for data in prepared)
        raise ValueError(
            message(
                "the model is not bound to the nodes of all cities",
                expected=f"N={total} nodes: {sizes}, in this order",
                got=f"N={wrong.value.shape[wrong.axis]} in {wrong.what}",
                fix=f"build it with new_backbone(name, [data, ...], seed=...), or take rebuild(backbone, {total})",
            )
        )
