"""Shared fixtures: one seed for each test and the folder of real city data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: threads would only wait for one another

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Path of a real data file; skips the test, naming the file, where it is absent."""

    def path(name: str) -> Path:
        file = SHARED_DATA / name
        if not file.exists():
            pytest.skip(f"real data file '{name}' is not beside the repository (shared/data)")
        return file

    return path
