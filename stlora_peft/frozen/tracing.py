"""Which calls of a forward pass are frozen: the same for a window at every epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stlora_peft.tuner.host_layers import STLoraAttention, STLoraEncoderLayer
from stlora_peft.tuner.recurrent_layers import STLoraRecurrent

_LARGE = (STLoraRecurrent, STLoraAttention, STLoraEncoderLayer)
"""Adapted layers whose base is worth keeping; reading a product from memory takes about as long as computing it."""

Run = Callable[[Tensor], Any]
"""A model as a function of input windows ``[b t n c]``."""


@dataclass(eq=False)
class Call:
    """One call of a module within a forward pass, and the calls inside it."""

    module: nn.Module
    inner: list[Call] = field(default_factory=list)
    output: Any = None
    frozen: bool = False
    axes: list[int | None] = field(default_factory=list)
    needed: list[bool] = field(default_factory=list)
    stored: list[Tensor | None] = field(default_factory=list)


def trace(model: nn.Module, run: Run, windows: Tensor, drifting: set[nn.Module]) -> Call:
    """Run a model and note every call; frozen is what has weights and requires no gradient."""
    whole = Call(nn.Module())
    stack = [whole]

    def noted(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = Call(module)
        stack[-1].inner.append(call)
        stack.append(call)
        output = forward(*args, **kwargs)
        stack.pop()
        if module in drifting:  # what it makes of a window depends on the others: nothing behind it is frozen
            return output + torch.zeros((), requires_grad=True)
        call.output, tensors = output, tensors_of(output)
        has_weights = next(module.parameters(), None) is not None
        call.frozen = bool(tensors) and has_weights and not any(tensor.requires_grad for tensor in tensors)
        return output

    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    with torch.enable_grad(), calling_instead({module: partial(noted, module) for module in modules}):
        run(windows)
    return whole


def drifting_norms(model: nn.Module) -> set[nn.Module]:
    """Normalisations that take their statistics from the batch."""
    norms = {module for module in model.modules() if isinstance(module, _BatchNorm)}
    return {norm for norm in norms if norm.training or norm.running_mean is None}


def compare(trace: Call, fewer: Call, count: int) -> None:
    """Find the windows' axis of every frozen output by a pass with one window less; without one it is not frozen."""
    same = [call.module for call in trace.inner] == [call.module for call in fewer.inner]
    for call, other in zip(trace.inner, fewer.inner, strict=False):
        compare(call, other, count)
        pairs = list(zip(tensors_of(call.output), tensors_of(other.output), strict=False))
        call.frozen = call.frozen and same and all(_comparable(*pair, count) for pair in pairs)
        call.axes = [_windows_axis(*pair) for pair in pairs] if call.frozen else []


def _comparable(tensor: Tensor, fewer: Tensor, count: int) -> bool:
    """Whether a tensor has its windows one after the other, each by itself, or nothing of them."""
    if tensor.shape == fewer.shape:
        return torch.equal(tensor, fewer)
    axis = _windows_axis(tensor, fewer)
    expected = list(tensor.shape)
    if axis is None:
        return False
    expected[axis] = tensor.shape[axis] // count * (count - 1)
    if tensor.shape[axis] % count or list(fewer.shape) != expected:
        return False
    scale = float(fewer.abs().max()) if fewer.numel() else 0.0
    return torch.allclose(tensor.narrow(axis, 0, expected[axis]), fewer, rtol=1e-4, atol=1e-5 * scale)


def _windows_axis(tensor: Tensor, fewer: Tensor) -> int | None:
    """First axis that is longer for more windows."""
    sizes = zip(tensor.shape, fewer.shape, strict=False)
    return next((axis for axis, (size, other) in enumerate(sizes) if size != other), None)


def outermost(trace: Call) -> dict[tuple[nn.Module, int], Call]:
    """Outermost frozen calls, each with how often its module was called before.

    Of adapted layers only what is more than a product is looked into: recurrent layers, attention and the like.
    """
    found: dict[tuple[nn.Module, int], Call] = {}
    counts: Counter[nn.Module] = Counter()

    def visit(call: Call) -> None:
        number = counts[call.module]
        counts[call.module] += 1
        if call.frozen:
            found[call.module, number] = call
        elif not isinstance(call.module, BaseTunerLayer) or isinstance(call.module, _LARGE):
            for inner in call.inner:
                visit(inner)

    for call in trace.inner:
        visit(call)
    for call in found.values():
        call.inner.clear()
        call.needed = [True] * len(call.axes)
    return found


# -- tensors and modules -------------------------------------------------------------------------------------


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output, which may lie in tuples and lists; none where it holds anything else."""
    if isinstance(output, Tensor):
        return [output]
    if type(output) not in (tuple, list):
        return []
    parts = [tensors_of(part) for part in output]
    return [tensor for part in parts for tensor in part] if all(parts) else []


def in_form_of(output: Any, tensors: Sequence[Tensor]) -> Any:
    """Tensors in the form of an output."""
    rest = iter(tensors)

    def form(part: Any) -> Any:
        return next(rest) if isinstance(part, Tensor) else type(part)(form(inner) for inner in part)

    return form(output)


def pairs_of(call: Call) -> list[tuple[Tensor, int | None]]:
    """Each tensor of a call with its windows' axis."""
    return list(zip(tensors_of(call.output), call.axes, strict=True))


def windows_first(tensor: Tensor, axis: int, count: int) -> Tensor:
    """View with an axis of its own for the windows, in front."""
    apart: Tensor = tensor.unflatten(axis, (count, -1))
    return apart.movedim(axis, 0)


def windows_along(rows: Tensor, axis: int) -> Tensor:
    """Inverse of :func:`windows_first`."""
    return rows.movedim(0, axis).flatten(axis, axis + 1)


@contextmanager
def calling_instead(wrappers: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Have ``wrapper(forward, *args)`` called in the place of each module's ``forward(*args)``."""
    own = {module: vars(module).get("forward") for module in wrappers}
    for module, wrapper in wrappers.items():
        vars(module)["forward"] = partial(wrapper, module.forward)
    try:
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward
