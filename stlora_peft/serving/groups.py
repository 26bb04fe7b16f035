"""Which cities share a forward, and one state of the whole object that never changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from stlora_peft.serving.inputs import Request, Units
from stlora_peft.serving.joined import Alone, Joined
from stlora_peft.serving.members import Member
from stlora_peft.serving.tiles import WIDTH

KEPT = 16
"""Selections of cities whose stacks are kept for the next request."""


class Group:
    """Cities that share a forward; the stacks are made at the first one.

    Args:
        members: The cities, all of one kind.
        backbone: The frozen backbone.
    """

    def __init__(self, members: Sequence[Member], backbone: nn.Module) -> None:
        self.members = tuple(members)
        self.backbone = backbone

    @cached_property
    def network(self) -> Joined | Alone:
        """What forecasts the cities."""
        return Alone(self.members[0]) if self.members[0].model is not None else Joined(self.backbone, self.members)

    @cached_property
    def units(self) -> Units:
        """The cities' scalers."""
        return Units(self.members, self.network.tiles)

    @cached_property
    def num_slots(self) -> int:
        """Length of the node axis, at most."""
        return sum(slots(member) for member in self.members)

    @property
    def num_bytes(self) -> int:
        """Bytes of the stacks, if they have been made; the backbone's own weights are not among them."""
        network = self.__dict__.get("network")
        if not isinstance(network, Joined):
            return 0
        shared = {id(tensor) for tensor in (*self.backbone.parameters(), *self.backbone.buffers())}
        own = (tensor for tensor in (*network.parameters(), *network.buffers()) if id(tensor) not in shared)
        return sum(tensor.nbytes for tensor in own)

    def forecast(self, requests: Sequence[Request], window: int) -> list[Tensor]:
        """Forecast all cities of the group, ``[b t n c]`` each, in their own units."""
        x = self.units.scaled(requests, window)
        dtype = next((weight.dtype for weight in self.backbone.parameters() if weight.is_floating_point()), x.dtype)
        with torch.no_grad():
            return [forecast.cpu() for forecast in self.units.restored(self.network(x.to(dtype)))]


def slots(member: Member) -> int:
    """Slots that a city takes beside others."""
    return -(-member.place.num_nodes // WIDTH) * WIDTH


@dataclass(frozen=True, eq=False)
class State:
    """All cities at one moment. Every change makes a new state; a forecast works on the one that it began with.

    Args:
        backbone: The frozen backbone.
        max_nodes: Slots of a group, at most, unless one city alone has more.
        members: The cities by name.
        groups: The cities by forward.
        selections: Groups of requests for some of the cities, by their names.
    """

    backbone: nn.Module
    max_nodes: int
    members: Mapping[str, Member] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    selections: dict[tuple[str, ...], Group] = field(default_factory=dict)

    def including(self, member: Member) -> State:
        """The state with a city more, or with another one of its name."""
        kept = self if member.name not in self.members else self._emptied(member.name)
        members = {**self.members, member.name: member}
        return replace(self, members=members, groups=tuple(self._placed(kept.groups, member)), selections={})

    def excluding(self, name: str) -> State:
        """The state with a city less."""
        return self._emptied(name)

    def _emptied(self, name: str) -> State:
        groups = []
        for group in self.groups:
            rest = [member for member in group.members if member.name != name]
            if len(rest) == len(group.members):
                groups.append(group)
            elif rest:
                groups.append(Group(rest, self.backbone))
        members = {key: member for key, member in self.members.items() if key != name}
        return replace(self, members=members, groups=tuple(groups), selections={})

    def _placed(self, groups: Sequence[Group], member: Member) -> list[Group]:
        """The groups with one more city, in the first that has room."""
        for i, group in enumerate(groups):
            same = group.members[0].kind == member.kind
            if same and group.num_slots + slots(member) <= self.max_nodes:
                return [*groups[:i], Group([*group.members, member], self.backbone), *groups[i + 1 :]]
        return [*groups, Group([member], self.backbone)]

    def selected(self, names: Sequence[str]) -> list[Group]:
        """Groups that hold these cities and no others: whole ones where they are asked for as a whole."""
        asked, found, rest = set(names), [], []
        for group in self.groups:
            wanted = [member for member in group.members if member.name in asked]
            if len(wanted) == len(group.members):
                found.append(group)
            else:
                rest.extend(wanted)
        packed: list[Group] = []
        for member in rest:
            packed = self._placed(packed, member)
        return found + [self._kept(group) for group in packed]

    def _kept(self, group: Group) -> Group:
        """The group as it was made for an earlier request of the same cities."""
        key = tuple(member.name for member in group.members)
        if key not in self.selections and len(self.selections) >= KEPT:
            self.selections.clear()
        return self.selections.setdefault(key, group)
