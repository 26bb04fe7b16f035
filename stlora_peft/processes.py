"""A training in several processes: the share of each in a batch, and sums over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from stlora_peft.data import Windows
from stlora_peft.errors import message
from stlora_peft.launch import COUNT_NAMES, process_count, process_index


def check_processes(known: int, batch_size: int) -> None:
    """Refuse processes that cannot train together.

    Args:
        known: Number of processes that accelerate has found.
        batch_size: Windows in one step, over all processes.

    Raises:
        ValueError: If the processes do not know of one another, or a step has fewer windows than there are processes.
    """
    if known != process_count():
        raise ValueError(
            message(
                "the processes do not know of one another",
                expected=f"{process_count()} processes, as the environment says ({', '.join(COUNT_NAMES)})",
                got=f"{known} found by accelerate",
                fix="start them with 'accelerate launch' or torchrun, or unset these variables to train in one",
            )
        )
    if batch_size < known:
        raise ValueError(
            message(
                "there are more processes than windows in a step",
                expected=f"batch_size >= {known}, so that each of {known} processes has a window of every whole batch",
                got=f"batch_size = {batch_size}",
                fix="give a larger batch_size, which counts the windows of all processes, or start fewer processes",
            )
        )


def check_same_start(step: int) -> None:
    """Refuse to go on where the processes have found different checkpoints.

    Args:
        step: Step of this process's newest checkpoint, 0 where it has none.

    Raises:
        ValueError: If another process has another.
    """
    if process_count() == 1:
        return
    steps: list[Any] = [None] * process_count()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise ValueError(
            message(
                "the processes have found different checkpoints",
                expected="the same folder of checkpoints in all processes",
                got="checkpoints of steps " + ", ".join(f"{one} (process {place})" for place, one in enumerate(steps)),
                fix="write to a folder that all machines share, or delete the checkpoints to start again",
            )
        )


class Share(Dataset[dict[str, Tensor]]):
    """Windows of which this process gathers every so-manyth of each batch.

    The batches are those of one process: same order, same size. The shares of a last, smaller batch differ by one
    window. Where it has fewer windows than there are processes, those without one gather its first window with every
    truth missing, so that it counts nowhere, and the batch says so by ``idle``.

    Args:
        windows: All windows.
        index: Number of a process; this one's by default.
        count: Number of processes; as many as there are by default.

    Example:
        >>> from stlora_peft.data import Windows
        >>> series = torch.arange(9.0).reshape(9, 1, 1)
        >>> windows = Windows(series, series, torch.arange(6), window=2, horizon=1)
        >>> [Share(windows, index, 2).__getitems__([5, 0, 3])["start"].tolist() for index in (0, 1)]
        [[5, 3], [0]]
    """

    def __init__(self, windows: Windows, index: int | None = None, count: int | None = None) -> None:
        self._windows = windows
        self._index = process_index() if index is None else index
        self._count = process_count() if count is None else count

    def __len__(self) -> int:
        """All windows: what is counted out to the processes is a batch, not the data."""
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one window."""
        return self._windows[index]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Gather this process's share of a batch.

        Args:
            indices: Numbers of the windows of the whole batch.
        """
        share = indices[self._index :: self._count]
        if share:
            return self._windows.__getitems__(share)
        batch: dict[str, Any] = self._windows.__getitems__(indices[:1])
        return {**batch, "y": torch.full_like(batch["y"], torch.nan), "idle": True}


def share_of(windows: Windows) -> Windows:
    """Return the windows that this process takes, where each is to be taken by one; all of them in one process.

    Args:
        windows: All windows.
    """
    return windows if process_count() == 1 else windows.at(windows.starts[process_index() :: process_count()])


def measured(truth: Tensor) -> Tensor | None:
    r"""Count what each process has to divide its sum of errors by.

    With :math:`\sum_q n_q / P`, where :math:`n_q` truths are measured in process :math:`q` of :math:`P`, the average
    of the processes' losses is the mean over all their truths. The average is what ``DistributedDataParallel`` makes
    of the gradients, and the Trainer of the loss that it logs.

    Args:
        truth: Truths of this process; NaN is missing.

    Returns:
        The count, the same in every process; None in one process, which counts its own.
    """
    if process_count() == 1:
        return None
    return total(torch.isfinite(truth).sum().double()).clamp(min=1) / process_count()


def total(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Add a tensor up over the processes, in their order: the same bits in each of them.

    Args:
        tensor: A tensor of the same shape in every process.
        device: Where the processes exchange it; None leaves it where it is.

    Returns:
        The sum, on the tensor's own device.
    """
    if process_count() == 1:
        return tensor
    own = tensor.to(device or tensor.device).contiguous()
    parts = [torch.empty_like(own) for _ in range(process_count())]
    dist.all_gather(parts, own)
    return torch.stack(parts).sum(dim=0).to(tensor.device)


def reaches(output: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether the gradient of an output reaches each of some parameters.

    Args:
        output: What a model has computed.
        parameters: Parameters that require gradients.

    Example:
        >>> layer, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> reaches(layer(torch.ones(1)), layer.parameters()), reaches(layer(torch.ones(1)), other.parameters())
        (True, False)
    """
    found, open_nodes = set(), [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            open_nodes += [following for following, _ in node.next_functions]
    leaves = {id(node.variable) for node in found if hasattr(node, "variable")}
    return leaves.issuperset(map(id, parameters))
