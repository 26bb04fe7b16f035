"""From an adapter, in a folder or in a model, to a city that can be served."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, NoReturn, cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from stlora_peft.data import Scaler, time_encoding
from stlora_peft.data.validation import checked_edge_index, checked_edge_weight, checked_interval
from stlora_peft.data.windows import TimeFeatures
from stlora_peft.errors import message
from stlora_peft.serving.checks import joining_refusal
from stlora_peft.serving.joined import sharing_copy
from stlora_peft.serving.members import Member, Parts, Place, take_apart
from stlora_peft.storage import load_adapter
from stlora_peft.tuner.config import STLoraConfig
from stlora_peft.tuner.identity import check_fingerprint, check_nodes, fingerprint

Adapter = str | os.PathLike[str] | PeftModel


@dataclass(frozen=True)
class Surroundings:
    """What an adapter does not know of its city.

    Args:
        edge_index: Edges, source above target.
        edge_weight: Their weights; None makes them all one.
        interval_minutes: Minutes between two readings.
        node_ids: Names of the nodes in the order of the readings; None does not check them.
        num_nodes: Number of nodes, where the adapter does not say it.
        scaler: Statistics of the readings, where the adapter does not say them.
    """

    edge_index: Any
    edge_weight: Any = None
    interval_minutes: int = 5
    node_ids: Sequence[str] | None = None
    num_nodes: int | None = None
    scaler: Scaler | None = None


@dataclass(frozen=True, eq=False)
class Loader:
    """Loads cities for one backbone.

    Args:
        backbone: The frozen backbone.
        time_features: Time encodings that it reads.
    """

    backbone: nn.Module
    time_features: TimeFeatures
    fingerprint: str | None = field(init=False)
    refusals: dict[tuple[Any, ...], str] = field(init=False, default_factory=dict)
    lock: Lock = field(init=False, default_factory=Lock)

    def __post_init__(self) -> None:
        """Take the backbone's fingerprint once."""
        object.__setattr__(self, "fingerprint", fingerprint(self.backbone))

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next((parameter.device for parameter in self.backbone.parameters()), torch.device("cpu"))

    @property
    def window(self) -> int:
        """Input steps of the backbone."""
        return int(self.backbone.window)  # type: ignore[arg-type]

    @property
    def num_encodings(self) -> int:
        """Number of time encodings."""
        return time_encoding(1, 1, None, self.time_features).shape[1]

    def load(self, name: str, adapter: Adapter, around: Surroundings) -> Member:
        """Load a city.

        Args:
            name: Name of the city.
            adapter: Folder of an adapter, or a model whose active adapter is the city's.
            around: Its graph and its clock.

        Raises:
            FileNotFoundError: If there is no adapter in the folder.
            ValueError: If the adapter is damaged, or belongs to another backbone or to other nodes, or the graph does
                not fit it.
        """
        started = time.perf_counter()
        model = adapter if isinstance(adapter, PeftModel) else load_adapter(self.backbone, adapter)
        config = self._config(name, model)
        if around.node_ids is not None:
            check_nodes(model, around.node_ids)
        place = self._place(name, config, around)
        parts = take_apart(model, model.active_adapters[0], self.device)
        found = Member(name, place, parts, None, parts.num_bytes, 0.0)
        parts = replace(parts, refusal=self._refusal(found, model))
        own = None
        if parts.refusal:
            own = self._own(model)
            parts = Parts({}, None, None, {}, parts.refusal)
        return replace(found, parts=parts, model=own, seconds=time.perf_counter() - started)

    def _config(self, name: str, model: PeftModel) -> STLoraConfig:
        """Configuration of the model's adapter, of this backbone and of the right type."""
        active = model.active_adapters
        config = model.peft_config[active[0]]
        if len(active) != 1 or not isinstance(config, STLoraConfig):
            kinds = ", ".join(f"'{each}' ({type(model.peft_config[each]).__name__})" for each in active)
            _refuse(name, "a model with one active adapter of STLoraConfig", kinds, "call set_adapter(<its adapter>)")
        if self.fingerprint is not None:
            check_fingerprint(self.fingerprint, fingerprint(model), name)
        return config

    def _place(self, name: str, config: STLoraConfig, around: Surroundings) -> Place:
        """Check what surrounds the adapter."""
        where, num_nodes = f"city '{name}'", config.num_nodes or around.num_nodes
        if num_nodes is None:
            _refuse(name, "the number of its nodes", "an adapter that fits any number", "pass num_nodes=<N>")
        for given in (around.num_nodes, None if around.node_ids is None else len(around.node_ids)):
            if given not in (None, num_nodes):
                _refuse(name, f"the adapter's {num_nodes} nodes", f"{given} nodes", "give the adapter of this city")
        edges = checked_edge_index(where, _on_cpu(around.edge_index), num_nodes)
        weights = np.ones(edges.shape[1]) if around.edge_weight is None else _on_cpu(around.edge_weight)
        return Place(
            num_nodes,
            torch.from_numpy(edges).to(self.device),
            torch.from_numpy(checked_edge_weight(where, weights, edges.shape[1])).to(self.device),
            checked_interval(where, around.interval_minutes),
            self._scaler(name, config, around.scaler),
        )

    def _scaler(self, name: str, config: STLoraConfig, given: Scaler | None) -> Scaler:
        """The adapter's scaler, which must fit the channels of the backbone."""
        if config.scaler is None and given is None:
            _refuse(
                name,
                "an adapter that knows its scaler",
                "scaler=None in its configuration",
                "pass scaler=, or make the adapter with 'stlora adapt'",
            )
        scaler = cast(Scaler, given) if config.scaler is None else Scaler.from_dict(config.scaler)
        found = {"in_channels": len(scaler.mean) + self.num_encodings, "out_channels": len(scaler.mean)}
        needed = {key: getattr(self.backbone, key, value) for key, value in found.items()}
        if needed != found:
            _refuse(
                name,
                f"in_channels={needed['in_channels']}, out_channels={needed['out_channels']} of the backbone",
                f"{len(scaler.mean)} channel(s) in its scaler and {self.num_encodings} time encodings",
                "give MultiCity the time_features that the backbone was trained with, and adapters of its quantity",
            )
        return scaler

    def _refusal(self, member: Member, model: PeftModel) -> str:
        """Why a city is served alone; tried out for the first city of a kind."""
        kind = (*member.kind, member.parts.refusal, member.place.num_nodes == 1)  # one node has no edges to try
        with self.lock:
            if kind not in self.refusals:
                channels = len(member.place.scaler.mean) + self.num_encodings
                self.refusals[kind] = joining_refusal(self.backbone, member, model, self.window, channels)
            return self.refusals[kind]

    def _own(self, model: PeftModel) -> PeftModel:
        """A copy of a model, its frozen weights those of the backbone that all cities share."""
        name = model.active_adapters[0]
        config = copy.deepcopy(model.peft_config[name])
        own = cast(PeftModel, get_peft_model(cast(Any, sharing_copy(self.backbone)), config))
        set_peft_model_state_dict(own, get_peft_model_state_dict(model, adapter_name=name))
        return own.eval()


def _on_cpu(values: Any) -> Any:
    return values.detach().cpu() if isinstance(values, Tensor) else values


def _refuse(name: str, expected: str, got: str, fix: str) -> NoReturn:
    raise ValueError(message(f"city '{name}' is not added", expected=expected, got=got, fix=fix))
