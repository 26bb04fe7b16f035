"""Memory that is kept: no new pages for what was freed before, and given back at the end."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from stlora_peft.allocator import keeping_freed_memory

PAGES = 100 * 2**20 // resource.getpagesize()

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)


def faults() -> int:
    """Pages that four blocks of 100 MiB take from the system, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(100 * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1])


def test_freed_memory_is_used_again_inside_and_given_back_at_the_end() -> None:
    before = resident()
    with keeping_freed_memory():
        faults()
        assert faults() < PAGES / 4
        assert resident() - before > PAGES / 2
    assert resident() - before < PAGES / 2
    assert faults() > PAGES


def test_an_environment_that_says_what_to_do_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    with keeping_freed_memory():
        faults()
        assert faults() > PAGES


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="inside"), keeping_freed_memory():
        raise RuntimeError("inside")
    assert faults() > PAGES
