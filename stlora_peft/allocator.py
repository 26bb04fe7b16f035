"""What the C library does with memory that has been freed."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_USUAL = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}
"""Bytes that glibc itself comes to, once a program has freed large blocks."""
_LARGE = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30}


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Have glibc keep what is freed instead of giving it back to the system and asking for it again.

    A training frees at every step what the next step needs, and each page that comes back from the system costs about
    as much as computing with it: a step of the ``lstm`` backbone takes half the time with its memory kept. It is given
    back at the end. Nothing is changed where the C library is another one, or where the environment says what it is to
    do (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``, ``LD_PRELOAD``).
    """
    library = _glibc()
    if library is None:
        yield
        return
    _set(library, _LARGE)
    try:
        yield
    finally:
        _set(library, _USUAL)
        give_back()


def give_back() -> None:
    """Have the C library return its free memory to the system, where it can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and nobody has told it what to do."""
    told = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in told):
        return None
    return ctypes.CDLL(None)


def _set(library: ctypes.CDLL, thresholds: dict[int, int]) -> None:
    for name, size in thresholds.items():
        library.mallopt(name, size)
