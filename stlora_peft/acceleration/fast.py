"""What the fast layers have in common: when one matrix can stand for the edges of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from stlora_peft.backbones.propagation import DENSE_ON_ACCELERATOR, Propagation, PropagationCache, outside_graphs
from stlora_peft.tuner.layers import STLoraLayer

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STEPS = ("propagate", "message", "aggregate", "message_and_aggregate")


class Fast:
    """A layer in the place of another one, ``plain``, which it is derived from: same parameters, same numbers.

    An instance becomes one by a change of its class, see :func:`stlora_peft.acceleration.accelerate`. Whatever a
    fast layer does not know goes the way of ``plain``.

    Attributes:
        plain: The class that an instance had before, and gets back.
        is_cell: Whether it computes several layers together only as long as none of them has an adapter.
    """

    plain: ClassVar[type[nn.Module]]
    is_cell: ClassVar[bool] = False
    _cache: PropagationCache

    def __setstate__(self, state: Any) -> None:
        """Restore a copy as ``plain``: PyG compiles code for the class that it finds then."""
        fast, module = type(self), cast(Any, self)
        module.__class__ = self.plain
        module.__setstate__(state)
        module.__class__ = fast

    @classmethod
    def replace(cls, layer: nn.Module) -> None:
        """Make a layer of the class ``plain`` one of this class."""
        layer.__class__ = cls  # type: ignore[assignment]
        layer._cache = PropagationCache()  # type: ignore[assignment]

    def restore(self) -> None:
        """Make this a layer of the class ``plain`` again."""
        del self._cache
        cast(Any, self).__class__ = self.plain

    @outside_graphs
    def kept(self, inputs: tuple[Any, ...], build: Callable[..., Any]) -> Any:
        """What ``build`` makes of these inputs, computed only if one of them differs from last time."""
        return self._cache.get(inputs, build)

    @outside_graphs
    def heard(self, x: Tensor, *graph: Any) -> Tensor:
        """Sum of what the nodes hear from their neighbours, by the matrix that ``propagation`` builds of the graph."""
        matrix: Propagation = self.kept((*graph, x.shape[-2], x.dtype), self.propagation)
        return matrix.terms(x, 2)[1].to(x.dtype)

    def propagation(self, *inputs: Any) -> Propagation:
        """Build the matrix of a graph, of a number of nodes and a type."""
        raise NotImplementedError


def one_graph(x: Any, edge_index: Any, *values: Any) -> bool:
    """Whether a matrix that is kept can stand for these edges: no learnable weights, no special kind of tensor.

    A compiler traces the layer's own way, which has no break in its graph.

    Args:
        x: Features of the nodes, on axis ``-2``.
        edge_index: Edges.
        *values: Weights of the edges, and other numbers or tensors that belong to the graph.
    """
    if torch.compiler.is_compiling() or bool(getattr(torch.compiler, "is_exporting", bool)()):  # torch 2.6 cannot tell
        return False
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or type(edge_index) is not Tensor:
        return False
    if edge_index.dtype != torch.long or edge_index.layout != torch.strided or edge_index.ndim != 2:
        return False
    huge = x.device.type != "cpu" and x.shape[-2] > DENSE_ON_ACCELERATOR
    return not huge and edge_index.device == x.device and all(_constant(value, x) for value in values)


def _constant(value: Any, x: Tensor) -> bool:
    """Whether a value of a graph is a plain number, or a tensor that nobody learns and that leaves the type of x."""
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, (int, float))
    learnable = value.requires_grad and torch.is_grad_enabled()
    wider = torch.promote_types(value.dtype, x.dtype) != x.dtype
    return not learnable and not wider and value.device == x.device and value.layout == torch.strided


def ordinary(conv: Any, *aggregations: str) -> bool:
    """Whether a layer of PyG adds up, or whatever else ``aggregations`` allow, what the sources of its edges send.

    Explainers, hooks on the steps of the propagation, and rarely used arguments make it something else.
    """
    if str(conv.aggr) not in (*aggregations, "add", "sum") or conv.flow != "source_to_target":
        return False
    hooks = (getattr(conv, f"_{step}_forward{kind}_hooks", None) for step in _STEPS for kind in ("", "_pre"))
    return conv.node_dim == -2 and not conv.explain and conv.decomposed_layers == 1 and not any(hooks)


def base_layers(layers: Sequence[nn.Module], *kinds: type) -> list[Any] | None:
    """The layers without their adapters, whose weights may be used without calling them, or None.

    What the adapters add is then :func:`stlora_peft.tuner.siblings.sibling_updates`.
    """
    adapted = [layer for layer in layers if isinstance(layer, STLoraLayer)]
    if not bare(adapted, *map(type, adapted)) or any(layer.merged and layer.disable_adapters for layer in adapted):
        return None
    found = [base_of(layer) for layer in layers]
    return found if bare(found, *kinds) else None


def base_of(layer: nn.Module) -> Any:
    """The layer without its adapters."""
    return layer.base_layer if isinstance(layer, STLoraLayer) else layer


def bare(layers: Iterable[nn.Module], *kinds: type) -> bool:
    """Whether all layers are exactly of these kinds, so that their weights may be used without calling them.

    A layer with an adapter, a hook, a parametrization or a quantized weight is not.
    """
    if torch_module._has_any_global_hook():
        return False
    return all(
        type(layer) in kinds and not any(vars(layer).get(hook) for hook in _HOOKS) and "forward" not in vars(layer)
        for layer in layers
    )
