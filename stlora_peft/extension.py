"""New sensors in a city that has an adapter: entries for them, made of those of the sensors that they read like."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, cast

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from stlora_peft.data import City, Scaler
from stlora_peft.errors import message
from stlora_peft.tuner.config import STLoraConfig
from stlora_peft.tuner.node_bound import adapted_module, bound_size, find_module

Nearest = dict[str, dict[str, float]]
"""New node to the old nodes that it reads like, the nearest first, with weights that sum to one."""

_NAMED = 5  # nodes that an error names, of however many


def extend_adapter(
    model: PeftModel, backbone: nn.Module, city: City, neighbours: int = 1, *, given: range | None = None
) -> PeftModel:
    r"""Give the nodes that are new in a city entries of their own in its adapter, without training.

    Every tensor of the adapter with an entry for each node (gates, biases and cores of nodes, ``A`` of ``"full"``,
    node vectors, the predictor's, the copies of node-bound modules with their running statistics) keeps the entries
    of the old nodes bit for bit, at the places that these nodes have in the new city. The entry of a new node
    :math:`i` is a mean over the old nodes that :func:`nearest_nodes` finds,

    .. math::
        \theta_i = \sum_j w_{ij}\, \theta_j, \qquad \sum_j w_{ij} = 1 .

    A tensor with an entry for each pair of nodes is extended along both of its axes, and the entry of a new node with
    itself is the mean of :math:`\theta_{jj}`. All other tensors stay as they are bit for bit, and so does the scaler:
    readings must be scaled as when the adapter was trained.

    The parameters of the old nodes do not change, their forecasts may: a graph network hears the new neighbours, and
    what sums over nodes has more summands. Where nodes do not hear one another (``lstm``) the forecasts stay too.

    Args:
        model: Model with one active adapter; it is not changed.
        backbone: The backbone as it was pretrained, for the city that it was pretrained on; it is not changed.
        city: The city as it is now, with every node of the adapter and new ones, in any order.
        neighbours: See :func:`nearest_nodes`.
        given: See :func:`nearest_nodes`.

    Returns:
        The forecaster of the new city, in evaluation mode, with the extended adapter alone under the name that it had.

    Raises:
        ValueError: If the adapter does not know its nodes or has nothing that depends on them, if the city lacks one
            of them or has no other, if a new node has no reading in common with any of them, if a node-bound module
            cannot be extended, or if the backbone is another.

    Example:
        >>> from stlora_peft.backbones import build_backbone
        >>> from stlora_peft.data import adaptation_split, prepare, simulate_city
        >>> from stlora_peft.methods import build_adapter
        >>> city = simulate_city(num_nodes=6, days=4, seed=0)
        >>> before = city.select_nodes(range(4))
        >>> data = prepare(before, adaptation_split(city.num_steps, city.steps_per_day))
        >>> backbone = build_backbone("lstm", in_channels=3, hidden_size=4)
        >>> extend_adapter(build_adapter(backbone, data), backbone, city).peft_config["default"].num_nodes
        6
    """
    return extend_with(model, backbone, city, nearest_nodes(model, city, neighbours, given=given))


def nearest_nodes(model: PeftModel, city: City, neighbours: int = 1, *, given: range | None = None) -> Nearest:
    r"""Find the old nodes that each new node of a city reads like.

    The distance of two nodes is the mean difference of their readings, scaled as the adapter's, over all channels
    and over the given steps at which both are measured; the weights are inverse distances (Shepard's):

    .. math::
        d_{ij} = \operatorname{mean}_t |z_{ti} - z_{tj}|, \qquad
        w_{ij} = \frac{1 / d_{ij}}{\sum_k 1 / d_{ik}}

    A new node that reads exactly like an old one, :math:`d_{ij} = 0`, is given to it alone. Histories are compared
    and not places: the neighbour on the graph may be a road of another kind, an exit beside a motorway.

    Args:
        model: Model whose active adapter knows its nodes and its scaler. Without a scaler, one of the city's given
            steps stands in.
        city: The city, with every node of the adapter and new ones.
        neighbours: Number of old nodes that a new one is made of, at most. Old nodes with less than half as many
            steps in common with it as another one are passed by: a few steps say little.
        given: Steps of the record that may be compared; None takes all of them. Leave out those that forecasts are to
            be measured on.

    Returns:
        New nodes in the order of the city, each with its nearest old nodes and their weights.

    Raises:
        ValueError: If ``neighbours`` is below 1, if the adapter does not know its nodes or has nothing that depends
            on them, if the city lacks one of them or has no other, if a new node has no reading in common with any of
            them, or if the scaler has another number of channels.

    References:
        Shepard's interpolation of irregularly-spaced data, ACM 1968, doi:10.1145/800186.810616, its first function
        with exponent 1. Differs: the distance is that of histories.
    """
    if neighbours < 1:
        _refuse("option 'neighbours' is out of range", "1 or more", f"neighbours={neighbours}", "give a larger number")
    old = _known_nodes(model, city)
    new = [node for node in city.node_ids if node not in set(old)]
    if not new:
        _refuse(
            f"city '{city.name}' has no new node",
            f"nodes beside the {len(old)} of {_name(model)}",
            "its nodes alone",
            "use the adapter as it is, with the readings in its order of nodes",
        )
    steps = range(city.num_steps) if given is None else given
    series = _histories(_config(model), city, steps)
    nearest = {node: _nearest([_gap(series[node], series[other]) for other in old], neighbours) for node in new}
    alone = [node for node, found in nearest.items() if not found]
    if alone:
        _refuse(
            f"nodes of city '{city.name}' cannot be compared with those of {_name(model)}",
            "for each new node a step at which it and an old node are measured",
            f"no such step for {_names(alone)} among {len(steps)} given steps",
            "give more steps (given, --days), or leave these nodes out until they have readings",
        )
    return {node: {old[j]: weight for j, weight in found.items()} for node, found in nearest.items()}


def extend_with(model: PeftModel, backbone: nn.Module, city: City, nearest: Nearest) -> PeftModel:
    """Extend an adapter as :func:`extend_adapter` does, with neighbours that are known.

    Args:
        model: Model with one active adapter; it is not changed.
        backbone: The backbone as it was pretrained; it is not changed.
        city: The city as it is now.
        nearest: From :func:`nearest_nodes`, for this model and this city.

    Returns:
        The forecaster of the new city, in evaluation mode.

    Raises:
        ValueError: As :func:`extend_adapter` does.
    """
    old_nodes, adapter = _known_nodes(model, city), model.active_adapters[0]
    config = copy.deepcopy(_config(model))
    config.num_nodes, config.node_ids = city.num_nodes, list(city.node_ids)
    _check_node_bound(backbone, config, len(old_nodes))
    new = get_peft_model(copy.deepcopy(backbone), config, adapter_name=adapter)
    entries = _Entries.of(old_nodes, city.node_ids, nearest)
    before = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    after = get_peft_model_state_dict(new, adapter_name=adapter, save_embedding_layers=False)
    extended = {key: entries.extended(before[key], value.shape) for key, value in after.items()}
    set_peft_model_state_dict(new, extended, adapter_name=adapter)
    return cast(PeftModel, new.eval())


@dataclass(frozen=True)
class _Entries:
    """Where the entry of each node comes from: an old node's own, or the mean of several.

    Args:
        places: Place in the new city of each old node.
        shares: Place of each new node to the old nodes that it is made of, by number, with their weights.
    """

    places: Sequence[int]
    shares: Mapping[int, Mapping[int, float]]

    @classmethod
    def of(cls, old: Sequence[str], node_ids: Sequence[str], nearest: Nearest) -> _Entries:
        """Number the nodes."""
        place = {node: i for i, node in enumerate(node_ids)}
        number = {node: j for j, node in enumerate(old)}
        shares = {place[i]: {number[j]: weight for j, weight in found.items()} for i, found in nearest.items()}
        return cls([place[node] for node in old], shares)

    def extended(self, old: Tensor, shape: Sequence[int]) -> Tensor:
        """Extend a tensor along every axis in which ``shape`` differs: sizes alone could not tell a node axis."""
        axes = [axis for axis, size in enumerate(shape) if size != old.shape[axis]]
        if not axes:
            return old
        new = old.double()
        for axis in axes:
            new = self.along(new, axis)
        if len(axes) == 2:  # what a node is to itself, not what its neighbours are to one another
            itself = old.double().diagonal(dim1=axes[0], dim2=axes[1])
            new.diagonal(dim1=axes[0], dim2=axes[1]).copy_(self.along(itself, itself.ndim - 1))
        return new.to(old.dtype)

    def along(self, old: Tensor, axis: int) -> Tensor:
        """Extend a tensor along one axis."""
        shape = list(old.shape)
        shape[axis] = len(self.places) + len(self.shares)
        new = old.new_empty(shape)
        new.index_copy_(axis, torch.tensor(self.places, device=old.device), old)
        for place, shares in self.shares.items():
            entries = [weight * old.select(axis, j) for j, weight in shares.items()]
            new.select(axis, place).copy_(torch.stack(entries).sum(0))
        return new


def _config(model: PeftModel) -> STLoraConfig:
    """Configuration of the active adapter."""
    return cast(STLoraConfig, model.peft_config[model.active_adapters[0]])


def _known_nodes(model: PeftModel, city: City) -> list[str]:
    """The adapter's nodes, all of which the city has."""
    config = _config(model)
    if config.node_ids is None:
        _refuse(
            f"{_name(model)} does not know its nodes",
            "their names in its configuration",
            "node_ids=None",
            "make the adapter with 'stlora adapt', or with STLoraConfig(node_ids=[...], ...)",
        )
    if config.conditioning == "shared" and not config.node_bound:
        _refuse(
            f"{_name(model)} has nothing to extend",
            "tensors that depend on the node",
            "conditioning='shared' and no node-bound modules: the same for every node",
            "use it as it is: load_adapter(backbone, folder) without a city gives a model for any nodes",
        )
    missing = [node for node in config.node_ids if node not in set(city.node_ids)]
    if missing:
        _refuse(
            f"city '{city.name}' lacks nodes of {_name(model)}",
            f"all of its {len(config.node_ids)} nodes, and new ones",
            f"no node {_names(missing)}",
            "keep them in the city, with NaN where they have no reading",
        )
    return config.node_ids


def _check_node_bound(backbone: nn.Module, config: STLoraConfig, old_num_nodes: int) -> None:
    """Raise unless the axes of node-bound tensors are constant, or have one entry for each node.

    A kernel with the largest odd size up to N can have size N by chance: hence a third number, not the backbone's own.
    """
    for key in config.node_bound or []:
        module, now = find_module(backbone, key), config.num_nodes or 0
        sizes = (old_num_nodes, now, now + 1 + (bound_size(module, key) == now + 1))
        tables = [adapted_module(module, n, key, whole=not config.freeze_backbone).state_dict() for n in sizes]
        for name, value in (tables[1] | tables[0]).items():  # one may be whole and the others of low rank
            shapes = [tuple(table[name].shape) if name in table else "nothing" for table in tables]
            axes = {axis for axis in zip(*shapes, strict=False) if len(set(axis)) > 1}
            if len({*map(len, shapes)}) > 1 or axes - {sizes} or (axes and not value.is_floating_point()):
                found = ", ".join(f"{shape} at N={size}" for shape, size in zip(shapes, sizes, strict=True))
                _refuse(
                    f"node-bound module '{key}' cannot be extended",
                    "tensors of floats, the same for every N, with one entry for each node, or for each pair",
                    f"'{name}' of {value.dtype} with the shapes {found}",
                    "make a new adapter for the whole city with 'stlora adapt'",
                )


def _histories(config: STLoraConfig, city: City, steps: range) -> dict[str, npt.NDArray[np.float64]]:
    """The scaled readings of each node, one after the other."""
    values = city.values[steps.start : steps.stop].astype(np.float64)
    scaler = Scaler.fit(values) if config.scaler is None else Scaler.from_dict(config.scaler)
    series = scaler.transform(values).transpose(1, 0, 2).reshape(city.num_nodes, -1)
    return dict(zip(city.node_ids, series, strict=True))


def _gap(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> tuple[float, int]:
    """Mean difference of two histories, and over how many readings."""
    difference = np.abs(a - b)
    known = difference[np.isfinite(difference)]
    return (float(known.mean()) if len(known) else np.inf), len(known)


def _nearest(gaps: Sequence[tuple[float, int]], neighbours: int) -> dict[int, float]:
    """Numbers and weights of the nearest nodes, nothing where there is no reading in common."""
    most = max(count for _, count in gaps)
    distances = {j: distance for j, (distance, count) in enumerate(gaps) if 2 * count >= most > 0}
    chosen = sorted(distances, key=distances.__getitem__)[:neighbours]
    least = min(distances.values(), default=0.0)
    closeness = {j: least / distances[j] if least else float(distances[j] == 0) for j in chosen}
    total = sum(closeness.values())
    return {j: value / total for j, value in closeness.items() if value}


def _name(model: PeftModel) -> str:
    return f"stlora adapter '{model.active_adapters[0]}'"


def _names(nodes: Sequence[str]) -> str:
    """Names of nodes, the first few of many."""
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return ", ".join(repr(node) for node in nodes[:_NAMED]) + more


def _refuse(where: str, expected: str, got: str, fix: str) -> NoReturn:
    raise ValueError(message(where, expected=expected, got=got, fix=fix))
