"""Peak memory of a piece of work."""

from __future__ import annotations

import gc
from pathlib import Path
from types import TracebackType

import torch

from stlora_peft.allocator import give_back

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures how much memory the work inside takes at most beyond what was in use before.

    On a GPU it is what torch has allocated there; otherwise the resident memory of the process, which Linux keeps the
    peak of. What the process had freed before is given back to the system first, or its reuse would not be seen; a C
    library that cannot leaves the peak a lower bound.

    Attributes:
        bytes: The peak, once the work is done; None where the system does not say.

    Example:
        >>> with PeakMemory() as memory:
        ...     _ = torch.ones(1000, 1000)
        >>> memory.bytes is None or memory.bytes >= 0
        True
    """

    bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        """Begin to measure."""
        gc.collect()
        give_back()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
            return self
        try:
            _RESET.write_text("5")  # Linux: the peak begins anew
            self._before = _resident("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Read the peak."""
        if self._before is not None:
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
            self.bytes = max(peak - self._before, 0)


def _resident(key: str) -> int:
    """Read one of the kernel's numbers about this process, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
