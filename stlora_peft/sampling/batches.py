"""Batches of one part of the graph at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stlora_peft.data import CityData, Scaler, Windows
from stlora_peft.evaluation import check_fit, evaluation_mode
from stlora_peft.metrics import ErrorSums, Metrics
from stlora_peft.sampling.partition import SubGraph, partition
from stlora_peft.tuner.reestimation import reestimate
from stlora_peft.tuner.subset import node_subset


class PartBatches(Dataset[dict[str, Tensor]]):
    """Batches as the items of a data set: some windows of one part.

    A pass over the items meets every window at every core node once. Which windows share a batch changes from pass to
    pass, see :meth:`set_epoch`.

    Args:
        windows: The windows.
        parts: The parts of the graph.
        batch_size: Windows in one batch.
        seed: Where the order of the windows begins.

    Example:
        >>> series = torch.zeros(20, 6, 1)
        >>> windows = Windows(series, series, torch.arange(5), window=3, horizon=2)
        >>> none = torch.empty(2, 0, dtype=torch.long)
        >>> parts = partition(none, torch.empty(0), 6, nodes_per_step=4, hops=1)
        >>> batches = PartBatches(windows, parts, batch_size=3, seed=0)
        >>> len(batches), batches[3]["x"].shape, int(batches[3]["part"])
        (4, torch.Size([2, 3, 3, 1]), 1)
    """

    def __init__(self, windows: Windows, parts: Sequence[SubGraph], batch_size: int, seed: int) -> None:
        self._windows, self._parts = windows, parts
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0
        self._per_part = -(-len(windows) // batch_size)

    def __len__(self) -> int:
        return len(self._parts) * self._per_part

    def set_epoch(self, epoch: int) -> None:
        """Begin another pass: the order of the windows depends on its number and on the seed alone."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Gather a batch.

        Args:
            index: Number of the batch.

        Returns:
            ``x`` of shape ``[b t n c]`` for the part, ``y`` for its core, ``start``, and ``part``, its number.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, chunk = divmod(index, self._per_part)
        drawn = np.random.SeedSequence([self._seed, self._epoch, number]).generate_state(1)
        generator = torch.Generator().manual_seed(int(drawn[0]))
        order = torch.randperm(len(self._windows), generator=generator)
        part = self._parts[number]
        rows = order[chunk * self._batch_size : (chunk + 1) * self._batch_size]
        return {**self._windows.of_nodes(rows, part.node_ids, part.num_core), "part": torch.tensor(number)}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Gather the one batch of these indices; a data loader calls this and needs no collation."""
        (index,) = indices
        return self[index]


def city_parts(data: CityData, nodes_per_step: int, hops: int) -> list[SubGraph]:
    """Divide a city's graph into parts; see :func:`stlora_peft.sampling.partition`."""
    return partition(data.edge_index, data.edge_weight, data.city.num_nodes, nodes_per_step=nodes_per_step, hops=hops)


def core_forecast(model: nn.Module, x: Tensor, part: SubGraph, *, sparse: bool = False) -> Tensor:
    """Forecast the core of a part, scaled as the model does it.

    Args:
        model: The model of the whole city.
        x: Windows of the part's nodes.
        part: The part, on the device of ``x``.
        sparse: Give sparse gradients to what has a row for each node.

    Shapes:
        - **x:** ``[b t n c]`` with the nodes of the part; **output:** ``[b t n c]`` with those of its core
    """
    with node_subset(model, part.node_ids, num_core=part.num_core, sparse=sparse):
        forecast: Tensor = model(x, part.edge_index, part.edge_weight)
    return forecast[:, :, : part.num_core]


def evaluate_parts(
    model: nn.Module, windows: Windows, scaler: Scaler, parts: Sequence[SubGraph], *, batch_size: int = 64
) -> Metrics:
    """Compare a model's forecasts with the truth, one part of the graph after the other.

    The errors are over all nodes: those of :func:`stlora_peft.evaluation.evaluate`, as far as the halo reaches.

    Args:
        model: A backbone, or a :class:`peft.PeftModel` around one. Its training mode is left as it was.
        windows: Which windows to forecast.
        scaler: The city's scaler.
        parts: The parts of its graph.
        batch_size: Windows in one forward pass.

    Returns:
        Errors in the city's units, missing truths left out.

    Raises:
        ValueError: If window, horizon or channels of the data do not fit the model.
    """
    check_fit(model, windows)
    sums = ErrorSums(windows.horizon)
    device = next((parameter.device for parameter in model.parameters()), windows.series.device)
    with evaluation_mode(model), torch.no_grad():
        for part in parts:
            moved = part.to(device)
            for rows in torch.arange(len(windows)).split(batch_size):
                batch = windows.of_nodes(rows, part.node_ids, part.num_core)
                forecast = core_forecast(model, batch["x"].to(device), moved).float().cpu()
                sums.add(scaler.inverse(forecast), batch["y"])
    return sums.metrics()


def reestimate_parts(model: nn.Module, windows: Windows, parts: Sequence[SubGraph], *, batch_size: int = 64) -> None:
    """Re-estimate node-bound normalisation statistics part by part; see :func:`stlora_peft.reestimate`.

    Args:
        model: PEFT model whose active adapter belongs to the city.
        windows: Windows to estimate on.
        parts: The parts of the city's graph.
        batch_size: Windows in one forward pass.
    """
    for part in parts:
        with node_subset(model, part.node_ids, num_core=part.num_core):
            if reestimate(model, _forward_batches(windows, part, batch_size)) == 0:
                return


def _forward_batches(windows: Windows, part: SubGraph, batch_size: int) -> Iterator[Mapping[str, Tensor]]:
    """Arguments of a backbone's ``forward``."""
    for rows in torch.arange(len(windows)).split(batch_size):
        x = windows.of_nodes(rows, part.node_ids, part.num_core)["x"]
        yield {"x": x, "edge_index": part.edge_index, "edge_weight": part.edge_weight}
