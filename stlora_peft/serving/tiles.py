"""Where the nodes of many cities lie on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 16
"""Slots of a tile: enough rows for a matrix product, few enough that a small city wastes little."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """Cities one after the other on a node axis, each filled up to whole tiles.

    All slots of a tile belong to one city, so that one batched product over the tiles multiplies every node by its own
    city's matrix, whatever the sizes of the cities. A city that is alone is one tile without any filling.

    Args:
        sizes: Number of nodes of each city.
        starts: First slot of each city.
        num_slots: Length of the axis.
        width: Slots of a tile.
        owner: Number of the city of each tile.

    Example:
        >>> tiles = Tiles.pack([20, 3], torch.device("cpu"))
        >>> tiles.starts, tiles.num_slots, tiles.owner.tolist()
        ((0, 32), 48, [0, 0, 1])
    """

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    num_slots: int
    width: int
    owner: Tensor

    @classmethod
    def pack(cls, sizes: Sequence[int], device: torch.device) -> Tiles:
        """Lay cities of these sizes side by side.

        Args:
            sizes: Number of nodes of each city, at least one city.
            device: Where the numbers of the cities are kept.
        """
        width = sizes[0] if len(sizes) == 1 else WIDTH
        counts = torch.tensor([-(-size // width) for size in sizes])
        starts = (counts.cumsum(0) - counts) * width
        owner = torch.arange(len(sizes)).repeat_interleave(counts).to(device)
        return cls(tuple(sizes), tuple(starts.tolist()), int(counts.sum()) * width, width, owner)

    def matrices(self, values: Tensor) -> Tensor:
        """Repeat what each city has once for each of its tiles: ``[city *]`` to ``[tile *]``."""
        return values.index_select(0, self.owner)

    def entries(self, values: Tensor) -> Tensor:
        """Repeat what each city has once for each of its slots: ``[city *]`` to ``[slot *]``."""
        return self.matrices(values)[:, None].expand(-1, self.width, *values.shape[1:]).flatten(0, 1)

    def join(self, parts: Sequence[Tensor], axis: int = 0, fill: float = 0.0) -> Tensor:
        """Put what each city has for its nodes side by side, the slots that are left filled up.

        Args:
            parts: One tensor for each city, its nodes on axis ``axis``, otherwise of one shape.
            axis: Index of the node axis.
            fill: Value of the slots that belong to no node.
        """
        shape = list(parts[0].shape)
        shape[axis] = self.num_slots
        joined = parts[0].new_full(shape, fill)
        for part, start in zip(parts, self.starts, strict=True):
            joined.narrow(axis, start, part.shape[axis]).copy_(part)
        return joined

    def split(self, joined: Tensor, axis: int) -> list[Tensor]:
        """Each city's own nodes of a tensor, as copies."""
        pairs = zip(self.starts, self.sizes, strict=True)
        return [joined.narrow(axis, start, size).clone() for start, size in pairs]
