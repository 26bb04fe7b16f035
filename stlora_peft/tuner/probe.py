"""What running a backbone tells of its layers: the axis patterns of their inputs, and which are never called."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.hosts import host_class
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.layout import infer_layout, layout_readings


def find_layouts(
    backbone: nn.Module, *inputs: Any, num_nodes: int, target_modules: list[str], batch_axis: int = 0
) -> dict[str, str]:
    """Read the axis pattern of each layer's input off one probing forward.

    Choose an example whose sizes cannot be confused: at least two samples, and a number of nodes that is neither
    the window nor a width of the backbone. Rows that fold batch and nodes into one axis are told apart by a
    second forward with one sample changed.

    Args:
        backbone: Backbone without adapters.
        inputs: Arguments of its forward; the first is the window.
        num_nodes: Number of nodes in the example.
        target_modules: Name endings of the layers to look at.
        batch_axis: Axis of the samples in the first input.

    Returns:
        Layer name to pattern, for ``STLoraConfig(node_layout=...)``.

    Raises:
        ValueError: If a name is no layer's, a layer is not reached, or its sizes leave more than one reading.

    Example:
        >>> backbone = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> find_layouts(backbone, torch.rand(2, 5, 7, 3), num_nodes=7, target_modules=["0"])
        {'0': 'b t n c'}
    """
    layers = {
        key: module
        for key, module in backbone.named_modules()
        if any(_ends_with(key, name) for name in target_modules)
    }
    for name in target_modules:
        if not any(_ends_with(key, name) for key in layers):
            raise ValueError(
                message(
                    f"no layer is called '{name}'",
                    expected="endings of names from backbone.named_modules()",
                    got=repr(name),
                    fix="correct the name, or leave it out",
                )
            )
    changed = inputs[0].clone()
    changed.select(batch_axis, 0).add_(1)
    first = _record(backbone, layers, inputs)
    second = _record(backbone, layers, (changed, *inputs[1:]))
    return {key: _read(key, module, first, second, num_nodes) for key, module in layers.items()}


def _ends_with(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _record(backbone: nn.Module, layers: dict[str, nn.Module], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Run the backbone and keep the first input that each layer gets."""
    seen: dict[str, Tensor] = {}
    training = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad(), _recording(layers, seen):
            backbone(*inputs)
    finally:
        for module, mode in training.items():
            module.training = mode
    return seen


@contextmanager
def _recording(layers: dict[str, nn.Module], seen: dict[str, Tensor]) -> Iterator[None]:
    # torch-geometric calls some layers' forward directly, which module hooks do not see.
    own = {key: vars(module)["forward"] for key, module in layers.items() if "forward" in vars(module)}
    for key, module in layers.items():
        cast(Any, module).forward = _recorder(key, module.forward, seen)
    try:
        yield
    finally:
        for key, module in layers.items():
            del vars(module)["forward"]
            if key in own:
                cast(Any, module).forward = own[key]


def _recorder(key: str, forward: Any, seen: dict[str, Tensor]) -> Any:
    first = next(iter(inspect.signature(forward).parameters), "")

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.setdefault(key, args[0] if args else kwargs[first])
        return forward(*args, **kwargs)

    return record


def _read(key: str, module: nn.Module, first: dict[str, Tensor], second: dict[str, Tensor], num_nodes: int) -> str:
    if key not in first:
        raise ValueError(
            message(
                f"layer '{key}' is not reached by the probing forward",
                expected="a layer that the backbone calls",
                got="no call",
                fix="leave it out of target_modules: an adapter on it would have no effect",
            )
        )
    host = host_class(module)
    wrapper = host(module, key) if host else None
    x, changed = (wrapper._root(seen[key]) if wrapper else seen[key] for seen in (first, second))
    channel = wrapper.channel(x.ndim) if wrapper else x.ndim - 1
    axes = wrapper.node_axes(x.ndim) if wrapper else tuple(range(x.ndim - 1))
    readings = layout_readings(x.shape, num_nodes, channel, axes)
    folds = [reading for reading in readings if "(" in reading]
    if len(folds) == len(readings) == 2:
        axis = next(i for i in axes if x.shape[i] > num_nodes and x.shape[i] % num_nodes == 0)
        rows = (x != changed).movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
        slow, fast = bool((rows < num_nodes).all()), bool((rows % (x.shape[axis] // num_nodes) == 0).all())
        if len(rows) and slow != fast:
            return next(reading for reading in folds if ("(b n)" if slow else "(n b)") in reading)
    return infer_layout(x.shape, num_nodes, channel, axes, f"layer '{key}'").pattern


class UnreachedTargets:
    """Forward hook of an adapted backbone: warns of targets that its first forward with an adapter does not call.

    It goes once every adapter has been reported. A layer that PEFT replaced may still have its weight read by the
    backbone instead of being called, which nothing but a forward can tell.
    """

    def __init__(self) -> None:
        self.adapters: set[str] = set()

    def __call__(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Report the adapters that are active for the first time."""
        if torch.compiler.is_compiling():
            return
        found = (module for module in backbone.modules() if isinstance(module, STLoraLayer))
        first = next(found, None)  # all of them have the same adapters active
        running = self.adapters.intersection(first.active_adapters) if first else set()
        if first is None or not running or first.disable_adapters or first.merged:
            return
        layers = [first, *found]
        for name in sorted(running):
            own = [layer for layer in layers if name in layer.nall_B]
            _warn_unreached(name, [layer.name for layer in own if name not in layer.ran_with])
        waiting = self.adapters - running
        self.adapters = {name for name in waiting if any(name in layer.nall_B for layer in layers)}
        if not self.adapters:
            stop_watching(backbone)


def watch_targets(backbone: nn.Module, adapter_name: str) -> None:
    """Have the targets of an adapter reported that its first forward does not call."""
    hook = next((hook for hook in backbone._forward_hooks.values() if isinstance(hook, UnreachedTargets)), None)
    if hook is None:
        hook = UnreachedTargets()
        backbone.register_forward_hook(hook)
    hook.adapters.add(adapter_name)


def stop_watching(backbone: nn.Module) -> None:
    """Remove the hook of :func:`watch_targets`, if it is there."""
    for key, hook in list(backbone._forward_hooks.items()):
        if isinstance(hook, UnreachedTargets):
            del backbone._forward_hooks[key]


def _warn_unreached(adapter_name: str, layers: list[str]) -> None:
    if layers:
        text = message(
            f"stlora adapter '{adapter_name}' on {', '.join(map(repr, layers))}: not called by the forward",
            expected="layers that the backbone calls",
            got="no call",
            fix="leave them out of target_modules: an adapter there has no effect; ignore this if another input leads "
            "there",
        )
        warnings.warn(text, UserWarning, stacklevel=2)
