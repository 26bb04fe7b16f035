"""The Trainer of a forecaster that is trained on several cities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stlora_peft.checkpoints import signature
from stlora_peft.data import CityData, Windows
from stlora_peft.sampling.batches import PartBatches, evaluate_parts
from stlora_peft.sampling.partition import SubGraph
from stlora_peft.sampling.trainer import PartTrainer
from stlora_peft.sources import in_deviations, nodes_of
from stlora_peft.training import TrainingOptions
from stlora_peft.tuner.subset import node_subset


class SourceBatches(Dataset[dict[str, Tensor]]):
    """Batches of several cities as the items of one data set, each of a single city.

    A pass over the items meets every window of every city once, at every core node.

    Args:
        cities: The batches of each city.
        parts: Number of parts of each city; ``part`` of a batch counts on through all of them.
    """

    def __init__(self, cities: Sequence[PartBatches], parts: Sequence[int]) -> None:
        self._cities = cities
        self._first = [0, *accumulate(len(city) for city in cities)]
        self._first_part = [0, *accumulate(parts)]

    def __len__(self) -> int:
        return self._first[-1]

    def set_epoch(self, epoch: int) -> None:
        """Begin another pass in every city."""
        for city in self._cities:
            city.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Gather a batch; see :class:`stlora_peft.sampling.PartBatches`.

        Args:
            index: Number of the batch.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = next(city for city, after in enumerate(self._first[1:]) if index < after)
        batch = self._cities[number][index - self._first[number]]
        return {**batch, "part": batch["part"] + self._first_part[number]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Gather the one batch of these indices; a data loader calls this and needs no collation."""
        (index,) = indices
        return self[index]


class SourcesTrainer(PartTrainer):
    """:class:`stlora_peft.trainer.CityTrainer` on several cities.

    The cities are the parts of one graph, that of all their nodes, without an edge from one city to another: a batch
    is some windows of one city, or of a part of it for ``nodes_per_step``, and of what is bound to the nodes it sees
    and moves the rows of this city alone. Truths and errors are in standard deviations of each city's readings.

    Args:
        model: The model to train, its node-bound modules for the nodes of all cities.
        prepared: The cities.
        options: How to train.
        folder: Folder for checkpoints.
        **others: As in the class that it is derived from.
    """

    def __init__(
        self, model: nn.Module, prepared: Sequence[CityData], options: TrainingOptions, folder: Path, **others: Any
    ) -> None:
        self._sources = [in_deviations(data) for data in prepared]
        self._parts_of = [self._divided(data, options) for data in self._sources]
        sizes = [data.city.num_nodes for data in prepared]
        self._nodes = [nodes_of(sizes, number) for number in range(len(sizes))]
        super().__init__(model, self._sources[0], options, folder, **others)
        self._signature = signature(model, prepared, options)

    def _batches(self, data: CityData, options: TrainingOptions) -> tuple[Dataset[Any], int]:
        cities = [
            PartBatches(options.windows(source), parts, options.batch_size, options.seed)
            for source, parts in zip(self._sources, self._parts_of, strict=True)
        ]
        return SourceBatches(cities, [len(parts) for parts in self._parts_of]), 1

    def _all_parts(self, data: CityData, options: TrainingOptions) -> list[SubGraph]:
        """The parts of all cities, their nodes numbered through."""
        return [
            replace(part, node_ids=part.node_ids + nodes[0])
            for parts, nodes in zip(self._parts_of, self._nodes, strict=True)
            for part in parts
        ]

    def _validation_mae(self, windows: Windows) -> float:
        """Mean over the cities, so that none is given up for a larger one."""
        size, found = self._options.eval_batch_size, []
        for source, parts, nodes in zip(self._sources, self._parts_of, self._nodes, strict=True):
            with node_subset(self._forecaster, nodes):
                found.append(evaluate_parts(self._forecaster, source.val, source.scaler, parts, batch_size=size).mae)
        return float(torch.tensor(found, dtype=torch.float64).mean())
