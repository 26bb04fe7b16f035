"""Which layers can be adapted, by the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any, Final, cast

from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.bare_layers import STLoraGCLSTM
from stlora_peft.tuner.graph_layers import (
    STLoraAdaptiveConv,
    STLoraAttentionConv,
    STLoraChebConv,
    STLoraDiffusionConv,
    STLoraGatedGraphConv,
    STLoraGraphConv,
    STLoraRGCNConv,
    STLoraSAGEConv,
)
from stlora_peft.tuner.host_layers import STLoraAttention, STLoraConv, STLoraEncoderLayer, STLoraLinear
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.recurrent_layers import STLoraCell, STLoraRecurrent

_TORCH = "torch.nn.modules"
_PYG = "torch_geometric.nn"
_TGT = "torch_geometric_temporal.nn"

Host = type[STLoraLayer] | type[STLoraGCLSTM]

# By name, so that no package is imported for it.
BUILT_IN: Final[Mapping[str, Host]] = {
    f"{_TORCH}.linear.Linear": STLoraLinear,
    f"{_TORCH}.conv.Conv1d": STLoraConv,
    f"{_TORCH}.conv.Conv2d": STLoraConv,
    f"{_TORCH}.rnn.LSTM": STLoraRecurrent,
    f"{_TORCH}.rnn.GRU": STLoraRecurrent,
    f"{_TORCH}.rnn.LSTMCell": STLoraCell,
    f"{_TORCH}.rnn.GRUCell": STLoraCell,
    f"{_TORCH}.rnn.RNNCell": STLoraCell,
    f"{_TORCH}.activation.MultiheadAttention": STLoraAttention,
    f"{_TORCH}.transformer.TransformerEncoderLayer": STLoraEncoderLayer,
    f"{_PYG}.dense.linear.Linear": STLoraLinear,
    f"{_PYG}.conv.gcn_conv.GCNConv": STLoraGraphConv,
    f"{_PYG}.conv.cheb_conv.ChebConv": STLoraChebConv,
    f"{_PYG}.conv.sage_conv.SAGEConv": STLoraSAGEConv,
    f"{_PYG}.conv.rgcn_conv.RGCNConv": STLoraRGCNConv,
    f"{_PYG}.conv.gated_graph_conv.GatedGraphConv": STLoraGatedGraphConv,
    f"{_TGT}.recurrent.dcrnn.DConv": STLoraDiffusionConv,
    f"{_TGT}.recurrent.dcrnn.BatchedDConv": STLoraDiffusionConv,
    f"{_TGT}.recurrent.agcrn.AVWGCN": STLoraAdaptiveConv,
    f"{_TGT}.attention.astgcn.ChebConvAttention": STLoraAttentionConv,
    f"{_TGT}.recurrent.gc_lstm.GCLSTM": STLoraGCLSTM,
    f"{_TGT}.hetero.heterogclstm.HeteroGCLSTM": STLoraGCLSTM,
}


# Holds layers that can be adapted, in a part of this name.
_CONTAINERS: Final[Mapping[str, str]] = {f"{_PYG}.conv.hetero_conv.HeteroConv": "convs"}


@dataclass(frozen=True)
class HostLayer:
    """What a layer class of the user's says about itself.

    Args:
        in_features: Attribute that holds the width of its input; dots lead into its parts.
        out_features: Attribute that holds the width of its output.
        layout: Axis pattern of its first argument; None finds it as for any layer.
    """

    in_features: str = "in_channels"
    out_features: str = "out_channels"
    layout: str | None = None


_registered: dict[str, HostLayer] = {}


class STLoraRegistered(STLoraGraphConv):
    """A layer of the user's, registered with :func:`register_host_layer`."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.default_layout = _described(base_layer).layout

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        host = _described(base_layer)
        return (int(attrgetter(host.in_features)(base_layer)),), int(attrgetter(host.out_features)(base_layer))

    def _sum(self, out: Any, update: Tensor) -> Tensor:
        if not isinstance(out, Tensor):
            raise ValueError(
                message(
                    f"stlora layer '{self.name}' returns what no update can be added to",
                    expected="one tensor",
                    got=f"a {type(out).__name__} from {type(self.get_base_layer()).__name__}",
                    fix="name layers inside it in target_modules instead",
                )
            )
        return super()._sum(out, update)


def register_host_layer(
    cls: type[nn.Module],
    *,
    in_features: str = "in_channels",
    out_features: str = "out_channels",
    layout: str | None = None,
) -> None:
    r"""Let layers of a class of your own be adapted, for instance a ``MessagePassing`` layer.

    The layer takes the update beside it, on its first argument,

    .. math:: y_i = \mathrm{layer}(x, \dots)_i + \tfrac{\alpha}{r} B A_i x_i ,

    so its output must have the axes of that argument, channels last. What was registered is written into the
    configuration of an adapter that uses it: the adapter loads without registering again.

    Args:
        cls: The class; classes derived from it count too.
        in_features: Attribute that holds the width of the first argument; dots lead into parts of the layer.
        out_features: Attribute that holds the width of the output.
        layout: Axis pattern of the first argument, e.g. ``"... (b n) c"`` for PyG's rows; None finds it at the first
            forward, or leaves it to ``node_layout``.

    Raises:
        ValueError: If the class can be adapted already, or was registered otherwise.

    Example:
        >>> class Mean(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.width, self.lin = width, nn.Linear(width, width)
        ...     def forward(self, x, adjacency):
        ...         return self.lin(adjacency @ x)
        >>> register_host_layer(Mean, in_features="width", out_features="lin.out_features", layout="b n c")
    """
    remember(class_name(cls), HostLayer(in_features, out_features, layout))


def remember(name: str, host: HostLayer) -> None:
    """Keep a description under the name of its class, unless another one is there."""
    known = "a layer that can be adapted already" if name in BUILT_IN else _registered.get(name, host)
    if known != host:
        raise ValueError(
            message(
                f"layer class '{name}' cannot be registered",
                expected="a class that is not known yet, or the description that it has",
                got=f"{host} for {known}",
                fix="register each class once, with one description in every program that uses it",
            )
        )
    _registered[name] = host


def class_name(cls: type) -> str:
    """Full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def registered_hosts(layers: list[nn.Module]) -> dict[str, dict[str, Any]]:
    """Descriptions of the registered classes among the layers' own, as JSON can hold them."""
    names = {name for layer in layers for name in map(class_name, type(layer).__mro__) if name in _registered}
    return {name: asdict(_registered[name]) for name in sorted(names)}


def host_class(layer: nn.Module) -> Host | None:
    """The class that adapts ``layer``, looked up along its bases, or None."""
    if isinstance(layer, STLoraGCLSTM):
        return STLoraGCLSTM
    for name in map(class_name, type(layer).__mro__):
        if name in _registered:
            return STLoraRegistered
        if name in BUILT_IN:
            return BUILT_IN[name]
    return None


def inner_targets(layer: nn.Module) -> list[str]:
    """Names of the layers in a known container, which can be targets in its place."""
    part = next((_CONTAINERS[name] for name in map(class_name, type(layer).__mro__) if name in _CONTAINERS), None)
    return [name for name, _ in layer.get_submodule(part).named_children()] if part else []


def host_names() -> dict[str, Host]:
    """The layers that can be adapted, under the names that users import them by."""
    short = {f"{name.split('.')[0]}.nn.{name.rpartition('.')[2]}": host for name, host in BUILT_IN.items()}
    return short | dict.fromkeys(_registered, STLoraRegistered)


def layer_sizes(layer: nn.Module) -> tuple[tuple[int, ...], int]:
    """Width that a layer's update reads, followed by the kernel of a convolution, and width that it writes."""
    return cast(Host, host_class(layer))._sizes(layer)


def _described(layer: nn.Module) -> HostLayer:
    return next(_registered[name] for name in map(class_name, type(layer).__mro__) if name in _registered)
