"""The Trainer of a forecaster that sees one part of its graph at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stlora_peft.data import CityData, Windows
from stlora_peft.errors import message
from stlora_peft.frozen import FrozenActivations
from stlora_peft.launch import process_count
from stlora_peft.sampling.batches import PartBatches, city_parts, core_forecast, evaluate_parts
from stlora_peft.sampling.optimizer import RowAdamW, clip_gradients
from stlora_peft.sampling.partition import SubGraph
from stlora_peft.trainer import TRACED, CityTrainer, spread
from stlora_peft.training import TrainingOptions
from stlora_peft.tuner.subset import node_subset


class PartTrainer(CityTrainer):
    """:class:`stlora_peft.trainer.CityTrainer` on the parts of a graph, for ``nodes_per_step`` of the options.

    A batch is some windows of one part, its loss that of the part's core. Tensors with a row for each node get sparse
    gradients, and only the rows of the part make a step. Arguments are those of the class it is derived from.
    """

    optimizer_class = RowAdamW

    def __init__(
        self, model: nn.Module, data: CityData, options: TrainingOptions, folder: Path, **others: Any
    ) -> None:
        _check_one_process(process_count())
        self._parts = self._all_parts(data, options)
        super().__init__(model, data, options, folder, **others)
        self._on_device = [part.to(self.args.device) for part in self._parts]
        self._average.stepped = cast(RowAdamW, self.optimizer).stepped
        self.accelerator.clip_grad_norm_ = self._clip  # torch's own refuses sparse gradients

    def _divided(self, data: CityData, options: TrainingOptions) -> list[SubGraph]:
        """The parts of a city; one where nothing divides it."""
        return city_parts(data, options.nodes_per_step or data.city.num_nodes, options.hops)

    def _all_parts(self, data: CityData, options: TrainingOptions) -> list[SubGraph]:
        """The parts as the batches number them."""
        return self._divided(data, options)

    def _batches(self, data: CityData, options: TrainingOptions) -> tuple[Dataset[Any], int]:
        return PartBatches(options.windows(data), self._parts, options.batch_size, options.seed), 1

    def _keep_frozen(self) -> None:
        """Find the frozen part, whose dropout is off from here on; nothing is kept of it."""
        windows, part = self._options.windows(self._data), self._on_device[0]
        if len(windows) < TRACED:
            return
        x = windows.of_nodes(spread(torch.arange(len(windows)), TRACED), self._parts[0].node_ids, part.num_core)["x"]
        self._forecaster.train()
        self._set_still()
        with node_subset(self._forecaster, part.node_ids, num_core=part.num_core), self.accelerator.autocast():
            self._still += FrozenActivations(
                self._forecaster,
                lambda x: self._forecaster(x.to(self.args.device), part.edge_index, part.edge_weight),
                x,
            ).still

    def _forecast_batch(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return core_forecast(model, inputs["x"], self._on_device[int(inputs["part"])], sparse=True)

    def _validation_mae(self, windows: Windows) -> float:
        size = self._options.eval_batch_size
        return evaluate_parts(self._forecaster, windows, self._data.scaler, self._parts, batch_size=size).mae

    def _clip(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
        """Shorten the gradients."""
        self.accelerator.unscale_gradients()
        return clip_gradients(parameters, max_norm, norm_type)


def _check_one_process(count: int) -> None:
    """Raise where the gradients of several processes would have to be summed."""
    if count > 1:
        raise ValueError(
            message(
                "parts of a graph cannot be trained by several processes",
                expected="one process where nodes_per_step is given",
                got=f"{count} processes",
                fix="start it without 'accelerate launch', or train on the whole graph with nodes_per_step=None",
            )
        )
