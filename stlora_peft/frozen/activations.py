"""What the frozen part of a model computes, kept for every window instead of computed at every pass."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.evaluation import evaluation_mode
from stlora_peft.frozen.tracing import (
    Call,
    Run,
    calling_instead,
    compare,
    drifting_norms,
    in_form_of,
    outermost,
    pairs_of,
    tensors_of,
    trace,
    windows_along,
    windows_first,
)

MEMORY_LIMIT = 2**30
"""Bytes of activations from which they lie in memory-mapped files."""

BATCH = 64
"""Windows in one forward pass that fills the store."""


_NO_ROWS = torch.full((1,), -1)


class FrozenActivations:
    r"""Outputs of the frozen modules that see nothing of what is trained, one entry for every window.

    With a frozen backbone everything in front of the first adapted layer is the same at every epoch. The outermost
    modules of that part are found by two forward passes: they have weights, their outputs require no gradient, have
    the windows along one axis and do not depend on the other windows of a batch. :meth:`replaying` puts the stored
    outputs in their place; all other code of the model runs as ever. What lies within an adapted layer is computed.
    An output that nothing trained reads is not kept.

    Args:
        model: The model, with what is trained requiring gradients, in training mode but for what stays in evaluation.
        run: The model as a function of input windows.
        windows: Three different input windows, ``[b t n c]``, to find the frozen part with.
        limit: Bytes of activations from which they lie in memory-mapped files, which are deleted with this object.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 8).requires_grad_(False), nn.Linear(8, 1))
        >>> x = torch.randn(9, 12, 5, 1)
        >>> frozen = FrozenActivations(model, model, x[:3])
        >>> frozen.fill(torch.arange(9), lambda starts: x[starts])
        >>> with frozen.replaying(torch.tensor([4, 2])):
        ...     kept = model(x[[4, 2]])
        >>> len(frozen.modules), torch.allclose(kept, model(x[[4, 2]]))
        (1, True)
    """

    def __init__(self, model: nn.Module, run: Run, windows: Tensor, *, limit: int = MEMORY_LIMIT) -> None:
        self._model, self._run, self._limit = model, run, limit
        self._calls: dict[tuple[nn.Module, int], Call] = {}
        self._counts: Counter[nn.Module] = Counter()
        self._batch = torch.zeros(0, dtype=torch.long)
        self._rows = _NO_ROWS
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._traced = len(windows)
        drifting = drifting_norms(model)
        with evaluation_mode(model):
            whole, fewer = (trace(model, run, some, drifting) for some in (windows, windows[:-1]))
            compare(whole, fewer, self._traced)
            self._calls = outermost(whole)
            if self._calls:
                self._find_needed(windows)

    @property
    def modules(self) -> list[nn.Module]:
        """The frozen modules, each once; none where the first layer is trained."""
        return list(dict.fromkeys(module for module, _ in self._calls))

    @property
    def still(self) -> list[nn.Module]:
        """They and everything inside them but adapters: what stays in evaluation mode, its dropout off."""
        layers = (module for module in self._model.modules() if isinstance(module, BaseTunerLayer))
        adapters = {inner for layer in layers for inner in cast(nn.Module, layer).modules()}
        inside = (inner for module in self.modules for inner in module.modules())
        return [module for module in dict.fromkeys(inside) if module not in adapters]

    @property
    def num_bytes(self) -> int:
        """Size of what is kept."""
        return sum(tensor.nbytes for call in self._calls.values() for tensor in call.stored if tensor is not None)

    def fill(self, starts: Tensor, inputs: Callable[[Tensor], Tensor]) -> None:
        """Compute and keep the outputs for some windows, in place of what was kept before.

        Args:
            starts: What the windows are called: whole numbers from 0, each once.
            inputs: Gathers the input windows of some of them, ``[b t n c]``.
        """
        if not self._calls:
            return
        self._rows = torch.full((int(starts.max()) + 1,), -1)
        self._rows[starts] = torch.arange(len(starts))
        self._make_room(len(starts))
        with evaluation_mode(self._model), torch.no_grad():
            for rows in torch.arange(len(starts)).split(BATCH):
                self._batch = rows
                with self._called_as(self._record):
                    self._run(inputs(starts[rows]))

    @contextmanager
    def replaying(self, starts: Tensor) -> Iterator[None]:
        """Take the frozen part from the store during a forward pass.

        Args:
            starts: What the windows of the batch are called, in their order; they must have been filled.

        Raises:
            ValueError: If one of them has not.
        """
        if not self._calls:
            yield
            return
        self._batch = self._rows_of(starts.cpu())
        with self._called_as(self._replay):
            yield

    def _rows_of(self, starts: Tensor) -> Tensor:
        """Where the windows lie in the store."""
        inside = (starts >= 0) & (starts < len(self._rows))
        rows = torch.where(inside, self._rows[starts.where(inside, 0)], -1)
        if (rows < 0).any():
            raise ValueError(
                message(
                    "nothing is kept of some windows",
                    expected="windows that fill() was given",
                    got=str(starts[rows < 0].tolist()[:8]),
                    fix="fill them, or forecast them outside replaying()",
                )
            )
        return rows

    # -- inside a forward pass -----------------------------------------------------------------------------

    @contextmanager
    def _called_as(self, answer: Callable[..., Any]) -> Iterator[None]:
        """Have the calls of the frozen modules answered by ``answer(call, forward, *args)``."""
        self._counts.clear()
        with calling_instead({module: partial(self._answered, module, answer) for module in self.modules}):
            yield

    def _answered(
        self, module: nn.Module, answer: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        call = self._calls.get((module, self._counts[module]))
        self._counts[module] += 1
        if call is None:
            return forward(*args, **kwargs)
        return answer(call, forward, *args, **kwargs)

    def _record(self, call: Call, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counts = self._counts.copy()
        output = forward(*args, **kwargs)
        self._counts = counts  # the calls inside are not made when it is replayed
        for stored, tensor, axis in zip(call.stored, tensors_of(output), call.axes, strict=True):
            if stored is None:
                continue
            rows = tensor if axis is None else windows_first(tensor, axis, len(self._batch))
            stored[self._batch if axis is not None else slice(None)] = rows.to(stored.dtype)
        return output

    def _replay(self, call: Call, *_: Any, **__: Any) -> Any:
        kept = []
        for stored, (tensor, axis) in zip(call.stored, pairs_of(call), strict=True):
            if stored is None:
                kept.append(self._nothing(tensor, axis))
                continue
            rows = stored if axis is None else windows_along(stored[self._batch], axis)
            kept.append(rows.to(tensor.device))
        return in_form_of(call.output, kept)

    # -- what to keep, and where ---------------------------------------------------------------------------

    def _find_needed(self, windows: Tensor) -> None:
        """Leave out what changes nothing where it is not a number."""
        starts = torch.arange(len(windows))
        self.fill(starts, lambda rows: windows[rows])
        with torch.no_grad():
            expected = self._replayed(windows)
            for call in self._calls.values():
                for part, (tensor, stored) in enumerate(zip(tensors_of(call.output), call.stored, strict=True)):
                    if tensor.is_floating_point():
                        call.stored[part] = None
                        call.needed[part] = not all(map(torch.equal, expected, self._replayed(windows)))
                        call.stored[part] = stored if call.needed[part] else None
        self._rows = _NO_ROWS
        for call in self._calls.values():
            call.stored = []

    def _replayed(self, windows: Tensor) -> list[Tensor]:
        with self.replaying(torch.arange(len(windows))):
            return tensors_of(self._run(windows))

    def _make_room(self, count: int) -> None:
        """Give every call empty tensors for so many windows, in memory or in files."""
        for call in self._calls.values():
            call.stored = []
        size = sum(tensor.element_size() * self._shape(tensor, axis, count).numel() for tensor, axis in self._needed())
        self._folder = None if size <= self._limit else tempfile.TemporaryDirectory(prefix="stlora-activations-")
        for number, call in enumerate(self._calls.values()):
            for part, (tensor, axis) in enumerate(pairs_of(call)):
                shape = self._shape(tensor, axis, count)
                name = f"{number}-{part}"
                call.stored.append(self._new(name, tensor, shape) if call.needed[part] else None)

    def _new(self, name: str, like: Tensor, shape: torch.Size) -> Tensor:
        """An empty tensor of this shape, in memory or in the file of that name."""
        if self._folder is None:
            return like.new_empty(shape)
        path = str(Path(self._folder.name) / name)
        return torch.from_file(path, shared=True, size=shape.numel(), dtype=like.dtype).view(shape)

    def _needed(self) -> Iterator[tuple[Tensor, int | None]]:
        """What is to be stored, each with its windows' axis."""
        for call in self._calls.values():
            yield from (pair for pair, needed in zip(pairs_of(call), call.needed, strict=True) if needed)

    def _shape(self, tensor: Tensor, axis: int | None, count: int) -> torch.Size:
        """Shape of what is stored of an output for so many windows."""
        if axis is None:
            return tensor.shape
        return torch.Size((count, *windows_first(tensor, axis, self._traced).shape[1:]))

    def _nothing(self, tensor: Tensor, axis: int | None) -> Tensor:
        """Stand-in of an output that nothing reads, for the windows of the batch."""
        shape = list(tensor.shape)
        if axis is not None:
            shape[axis] = shape[axis] // self._traced * len(self._batch)
        return tensor.new_full((), torch.nan).expand(shape)
