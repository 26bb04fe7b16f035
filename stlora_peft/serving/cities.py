"""Many cities on one frozen backbone, forecast together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from stlora_peft.data import Scaler
from stlora_peft.data.windows import TimeFeatures
from stlora_peft.errors import message
from stlora_peft.serving.groups import State
from stlora_peft.serving.inputs import Clock, Moment, Readings, Request, read_request
from stlora_peft.serving.loading import Adapter, Loader, Surroundings
from stlora_peft.serving.members import Member
from stlora_peft.storage import SavedBackbone

Starts = Moment | Sequence[Moment] | Mapping[str, Moment | Sequence[Moment]]

MAX_NODES = {"cpu": 2048}
"""Nodes of one forward where the user does not say it: on a CPU, more of them leave its caches."""
MAX_NODES_ELSEWHERE = 65_536


@dataclass(frozen=True)
class CityReport:
    """What a city costs.

    Args:
        name: Name of the city.
        num_nodes: Number of its nodes.
        seconds: Time that loading its adapter took.
        num_bytes: Bytes of its adapter.
        stacked_bytes: Its share of the stacks that a forward reads; 0 before the first one, and for a city alone.
        alone: Why it has a forward of its own; an empty text where it shares one with others.
    """

    name: str
    num_nodes: int
    seconds: float
    num_bytes: int
    stacked_bytes: int
    alone: str


class MultiCity:
    r"""One frozen backbone with the adapters of many cities, forecast together.

    The cities of a request are laid side by side as one block-diagonal graph. The frozen weights run once over all of
    their nodes; row :math:`i` of city :math:`c` adds its own city's update,

    .. math:: y_{c,i} = W x_{c,i} + b + s_c\, B_c A_{c,i}\, x_{c,i} ,

    by one batched product over tiles of nodes. Node-bound modules, predictors and scalers are each city's own. The
    result is that of one city after the other, up to rounding.

    Cities whose adapters have the same layers, ranks and predictor sizes share a forward, ``max_nodes`` at a time;
    whether they can is tried out for the first city of a kind. Where it does not hold, as for a backbone that attends
    from each node to all others or learns a graph, each city has a forward of its own, in the same object.

    Changes are safe while other threads forecast: a forecast sees all cities as they were when it began.

    Args:
        backbone: The backbone, or what :func:`stlora_peft.storage.load_backbone` returned. It is copied.
        time_features: Time encodings that the backbone reads, values first; None takes those of the saved backbone,
            ``"day"`` where there is none.
        max_nodes: Nodes of one forward; a larger city alone has more. None takes 2,048 on a CPU and 65,536 elsewhere.

    Shapes:
        - **readings:** ``[b t n c]``, or ``[t n c]`` for one window
        - **forecast:** ``[b t n c]``, or ``[t n c]``

    Units:
        Readings and forecasts in each city's own unit.

    Raises:
        ValueError: If the backbone does not say its window.

    Example:
        >>> import copy
        >>> import torch
        >>> from peft import get_peft_model
        >>> from stlora_peft import STLoraConfig
        >>> from stlora_peft.backbones import build_backbone
        >>> backbone = build_backbone("lstm", in_channels=3, hidden_size=4)
        >>> cities = MultiCity(backbone)
        >>> edge_index = torch.tensor([[0, 1], [1, 2]])
        >>> for name, num_nodes in (("a", 3), ("b", 5)):
        ...     scaler = {"mean": [50.0], "std": [10.0]}
        ...     own = get_peft_model(copy.deepcopy(backbone), STLoraConfig(num_nodes=num_nodes, scaler=scaler))
        ...     _ = cities.add(name, own, edge_index=edge_index)
        >>> readings = {"a": torch.full((12, 3, 1), 40.0), "b": torch.full((12, 5, 1), 60.0)}
        >>> {name: tuple(forecast.shape) for name, forecast in cities.forecast(readings).items()}
        {'a': (12, 3, 1), 'b': (12, 5, 1)}
    """

    def __init__(
        self,
        backbone: nn.Module | SavedBackbone,
        *,
        time_features: TimeFeatures | None = None,
        max_nodes: int | None = None,
    ) -> None:
        saved = backbone if isinstance(backbone, SavedBackbone) else None
        backbone = saved.backbone if saved else cast(nn.Module, backbone)
        if not isinstance(getattr(backbone, "window", None), int):
            _refuse(
                "the backbone does not say its window",
                "an attribute 'window', the number of input steps",
                f"a {type(backbone).__name__} without it",
                "set backbone.window before giving it to MultiCity",
            )
        frozen = copy.deepcopy(backbone).requires_grad_(False).eval()
        self._loader = Loader(frozen, time_features or (saved.time_features if saved else "day"))
        device = self._loader.device.type
        self._state = State(frozen, max_nodes or MAX_NODES.get(device, MAX_NODES_ELSEWHERE))
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._state.members)

    def __contains__(self, name: object) -> bool:
        return name in self._state.members

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cities, in the order in which they came."""
        return tuple(self._state.members)

    def add(
        self,
        name: str,
        adapter: Adapter,
        *,
        edge_index: Any,
        edge_weight: Any = None,
        interval_minutes: int = 5,
        node_ids: Sequence[str] | None = None,
        num_nodes: int | None = None,
        scaler: Scaler | None = None,
    ) -> CityReport:
        """Add a city; the others are not touched, and an error leaves everything as it was.

        Args:
            name: Name of the city.
            adapter: Folder of its adapter, or a model whose active adapter it is; of a model, copies are kept.
            edge_index: Edges of its graph, source above target.
            edge_weight: Their weights; all one where absent.
            interval_minutes: Minutes between two readings.
            node_ids: Names of its nodes in the order of the readings, compared with those of the adapter.
            num_nodes: Number of its nodes; needed where the adapter fits any number (``"shared"``).
            scaler: Statistics of its readings, where the adapter does not know them.

        Returns:
            What the city costs.

        Raises:
            FileNotFoundError: If there is no adapter in the folder.
            ValueError: If there is a city of this name, the adapter is damaged or belongs to another backbone or other
                nodes, or the graph does not fit it.
        """
        self._check_absent(name)
        around = Surroundings(edge_index, edge_weight, interval_minutes, node_ids, num_nodes, scaler)
        return self._put(name, adapter, around, new=True)

    def replace(self, name: str, adapter: Adapter, **around: Any) -> CityReport:
        """Put another adapter, or another graph, in place of a city's; otherwise as :meth:`add`.

        Args:
            name: Name of the city.
            adapter: Folder of its adapter, or a model whose active adapter it is.
            around: The other arguments of :meth:`add`.

        Returns:
            What the city costs.

        Raises:
            FileNotFoundError: If there is no adapter in the folder.
            ValueError: If there is no such city, or as of :meth:`add`. The old one stays then.
        """
        self._check_present([name], self._state)
        return self._put(name, adapter, Surroundings(**around), new=False)

    def remove(self, name: str) -> None:
        """Remove a city; the others are not touched.

        Args:
            name: Name of the city.

        Raises:
            ValueError: If there is no such city.
        """
        with self._lock:
            self._check_present([name], self._state)
            self._state = self._state.excluding(name)

    def forecast(self, readings: Mapping[str, Readings], *, start: Starts = None) -> dict[str, Tensor]:
        """Forecast some or all cities.

        Missing readings (NaN) are filled as everywhere in the package: with the last reading of at most ``window - 1``
        steps before, also from before the window where a longer record is given, else with the mean.

        Args:
            readings: Readings by city, ``window`` steps or more; what follows the last one is forecast.
            start: Time of the first reading: one for all cities, or by city; for several windows, one for each. None
                where it is unknown: a day then counts from the first reading.

        Returns:
            Forecasts by city, in the order of ``readings``, on the CPU.

        Shapes:
            - **readings:** ``[b t n c]`` or ``[t n c]``; **forecasts:** the same, with the horizon on ``t``

        Raises:
            ValueError: If there is no such city, or readings or times do not fit it. Nothing is computed then.
        """
        state = self._state
        self._check_present(list(readings), state)
        clock = Clock(self._loader.window, self._loader.time_features)
        requests: dict[str, Request] = {}
        for name, values in readings.items():
            member = state.members[name]
            moment = start.get(name) if isinstance(start, Mapping) else start
            requests[name] = read_request(member, values, moment, clock, len(member.place.scaler.mean))
        found: dict[str, Tensor] = {}
        for batch in {request.batch for request in requests.values()}:
            names = [name for name, request in requests.items() if request.batch == batch]
            for group in state.selected(names):
                asked = [requests[member.name] for member in group.members]
                for request, forecast in zip(asked, group.forecast(asked, clock.window), strict=True):
                    found[request.member.name] = forecast[0] if request.single else forecast
        return {name: found[name] for name in requests}

    def report(self) -> list[CityReport]:
        """What each city costs."""
        state, rows = self._state, {}
        for group in state.groups:
            num_nodes, stacked = sum(member.place.num_nodes for member in group.members), group.num_bytes
            for member in group.members:
                rows[member.name] = _report(member, stacked * member.place.num_nodes // num_nodes)
        return [rows[name] for name in state.members]

    def _put(self, name: str, adapter: Adapter, around: Surroundings, *, new: bool) -> CityReport:
        """Load a city and swap the state for one with it."""
        member = self._loader.load(name, adapter, around)
        with self._lock:
            if new:  # another thread may have added or removed it in the meantime
                self._check_absent(name)
            else:
                self._check_present([name], self._state)
            self._state = self._state.including(member)
        return _report(member, 0)

    def _check_absent(self, name: str) -> None:
        if name in self._state.members:
            _refuse(f"city '{name}' is not added", "a new name", "a city of this name", "call replace or remove")

    @staticmethod
    def _check_present(names: Sequence[str], state: State) -> None:
        for name in names:
            if name not in state.members:
                known = ", ".join(map(repr, list(state.members)[:8])) or "none yet"
                _refuse(
                    f"there is no city '{name}'", f"one of {known}", repr(name), "add it first, or correct the name"
                )


def _report(member: Member, stacked_bytes: int) -> CityReport:
    size, refusal = member.place.num_nodes, member.parts.refusal
    return CityReport(member.name, size, member.seconds, member.num_bytes, stacked_bytes, refusal)


def _refuse(where: str, expected: str, got: str, fix: str) -> NoReturn:
    raise ValueError(message(where, expected=expected, got=got, fix=fix))
