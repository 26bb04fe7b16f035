"""Peak memory of a piece of work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from stlora_peft.memory import PeakMemory

MIB = 1 << 20
on_linux = pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="reads Linux's own numbers")


def work(mebibytes: int) -> None:
    torch.ones(mebibytes * MIB, dtype=torch.uint8)


@on_linux
def test_peak_is_that_of_the_work_inside_also_where_the_memory_was_used_before() -> None:
    found = []
    for mebibytes in (64, 256, 64):  # the last one could be served from what the second has freed
        with PeakMemory() as memory:
            work(mebibytes)
        found.append(memory.bytes / MIB)
    for peak, mebibytes in zip(found, (64, 256, 64), strict=True):
        assert 0.8 * mebibytes < peak < 1.3 * mebibytes + 8


@on_linux
def test_small_tensors_that_were_freed_before_are_seen_again() -> None:
    for _ in range(2):
        with PeakMemory() as memory:
            rows = [torch.ones(4096, dtype=torch.uint8) for _ in range(8192)]  # 32 MiB on the heap
            del rows
        assert memory.bytes > 24 * MIB


def test_peak_is_none_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("stlora_peft.memory._RESET", tmp_path / "absent" / "clear_refs")
    with PeakMemory() as memory:
        work(1)
    assert memory.bytes is None
