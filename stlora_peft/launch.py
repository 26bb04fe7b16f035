"""Which of the processes that were started together this one is."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

# What torchrun and accelerate, Intel MPI and MPICH, Open MPI, and MVAPICH say; accelerate reads the same.
INDEX_NAMES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNT_NAMES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def process_count() -> int:
    """Number of processes that were started together, for instance by ``accelerate launch``; 1 for one by itself.

    Example:
        >>> process_count()
        1
    """
    group = _group()
    return _from_environment(COUNT_NAMES, 1) if group is None else int(group.get_world_size())


def process_index() -> int:
    """Number of this process among them, from 0.

    Example:
        >>> process_index()
        0
    """
    group = _group()
    return _from_environment(INDEX_NAMES, 0) if group is None else int(group.get_rank())


def is_main_process() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return process_index() == 0


def _group() -> Any:
    """Torch's module of the processes that have met; None before, and where torch was not needed so far."""
    module: Any = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None


def _from_environment(names: Sequence[str], otherwise: int) -> int:
    found = [value for name in names if (value := os.environ.get(name, "")).isdigit()]
    return int(found[0]) if found else otherwise
