"""The layers of torch and torch-geometric that can be adapted, and how each takes the update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.functional import full_conv, full_update
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.layout import Layout, check_union


class STLoraLinear(STLoraLayer):
    """``nn.Linear`` and ``torch_geometric.nn.Linear`` with a node-conditioned update; channels last."""

    mergeable = True

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        out_features, in_features = cast(Tensor, base_layer.weight).shape
        return (int(in_features),), int(out_features)

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        """Lazy layers have no size yet, and attention reads its out_proj's weight without calling it."""
        if isinstance(base_layer.weight, nn.parameter.UninitializedParameter):
            return "it is lazy and has no size yet: run the backbone once before adapting it"
        if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight without calling it, so an update would have no effect"
        return None


class STLoraConv(STLoraLayer):
    r"""``nn.Conv1d`` and ``nn.Conv2d`` along time with a node-conditioned update.

    :math:`A_i` is a temporal kernel with the stride, padding and dilation of the wrapped layer; :math:`B` is
    applied at each step. The kernel must have size 1 along the node axis, or it would mix nodes.
    """

    mergeable = True

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        weight = cast(Tensor, base_layer.weight)
        return tuple(int(size) for size in weight.shape[1:]), int(weight.shape[0])

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        """Grouped convolutions and kernels over two axes are not adapted."""
        conv = cast(nn.Conv2d, base_layer)
        if conv.groups != 1:
            return f"it is a grouped convolution (groups={conv.groups})"
        if sum(size > 1 for size in conv.kernel_size) > 1:
            kernel = tuple(conv.kernel_size)
            return f"its kernel {kernel} spans two axes, so it mixes nodes or is no convolution along time"
        return None

    @property
    def _conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())

    def channel(self, ndim: int) -> int:
        """Axis 1, or 0 where there is no batch."""
        return ndim - len(self._conv.kernel_size) - 1

    def _still(self, axis: int) -> bool:
        """Whether the convolution leaves spatial axis ``axis`` as it is."""
        conv = self._conv
        padding = cast(Any, conv)._reversed_padding_repeated_twice
        return conv.kernel_size[axis] == 1 and conv.stride[axis] == 1 and padding[-1 - 2 * axis] == 0

    def node_axes(self, ndim: int) -> tuple[int, ...]:
        """The batch axis and the spatial axes that the convolution leaves alone."""
        channel = self.channel(ndim)
        spatial = (channel + 1 + i for i in range(len(self._conv.kernel_size)) if self._still(i))
        return (*range(channel), *spatial)

    def _pad(self, z: Tensor) -> Tensor:
        padding = list(cast(Any, self._conv)._reversed_padding_repeated_twice)
        if not any(padding):
            return z
        mode = self._conv.padding_mode
        return F.pad(z, padding, mode="constant" if mode == "zeros" else mode)

    def _down(self, z: Tensor, weight: Tensor) -> Tensor:
        conv = F.conv1d if weight.ndim == 3 else F.conv2d
        return conv(self._pad(z), weight, None, self._conv.stride, 0, self._conv.dilation)

    def _down_full(self, z: Tensor, weight: Tensor, layout: Layout, num_nodes: int) -> Tensor:
        conv, first = self._conv, self.channel(z.ndim) + 1
        view, node, channel = layout.split(self._pad(z), num_nodes)
        along = [i for i in range(len(conv.kernel_size)) if first + i != layout.node_axis(z.ndim)]
        if all(self._still(i) for i in along):
            return full_update(view, weight.flatten(2), node, channel)
        kernels = weight.reshape(*weight.shape[:3], *(conv.kernel_size[i] for i in along))
        stride, dilation = [conv.stride[i] for i in along], [conv.dilation[i] for i in along]
        return full_conv(view, kernels, node, channel, stride, dilation)

    def _up(self, u: Tensor, weight: Tensor) -> Tensor:
        spatial = len(self._conv.kernel_size)
        return (F.conv1d if spatial == 1 else F.conv2d)(u, weight[(...,) + (None,) * spatial])


class STLoraGraphConv(STLoraLayer):
    r"""A graph convolution with the update on its root term.

    .. math:: y_i = \mathrm{conv}(x, E)_i + \tfrac{\alpha}{r} B A_i x_i

    The update conditions on the receiving node and reads that node's own input. For ``ChebConv`` it is exactly
    an update of the order-0 weight ``lins[0]``; ``GCNConv`` has no root weight, so the update adds one. Nodes are
    on axis -2, or, as PyG batches graphs, rows of a union of equal graphs (``row % N``).
    """

    default_layout = "... (b n) c"

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        return (int(cast(int, base_layer.in_channels)),), int(cast(int, base_layer.out_channels))

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        """Lazy layers have no size yet."""
        return "it is lazy: run the backbone once before adapting it" if base_layer.in_channels == -1 else None

    def forward(self, x: Tensor, edge_index: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the convolution and add the updates; ``edge_index`` and the rest pass through."""
        if not self.disable_adapters and isinstance(edge_index, Tensor):
            self._check_union(x, edge_index)
        return super().forward(x, edge_index, *args, **kwargs)

    def _check_union(self, x: Tensor, edge_index: Tensor) -> None:
        for name in self.active_adapters:
            if self.conditioning.get(name, "shared") == "shared":
                continue
            layout, num_nodes = self.layout[name], self.num_nodes[name]
            if layout.fits(x.shape, num_nodes):
                where = f"stlora adapter '{name}' on '{self.name}'"
                check_union(edge_index, x.shape[-2], num_nodes, layout, where)


class STLoraChebConv(STLoraGraphConv):
    """``ChebConv``: a shared update merges into the order-0 weight."""

    mergeable = True

    def _root_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, cast(Any, self.get_base_layer()).lins[0].weight)


class STLoraRecurrent(STLoraLayer):
    r"""``nn.LSTM`` and ``nn.GRU`` with the update on the output.

    .. math:: y_{i,t} = h_{i,t} + \tfrac{\alpha}{r} B A_i h_{i,t}

    The recurrence itself is untouched. The last layer's final hidden state gets the same update, so that it
    still equals the last output; the LSTM's cell state is returned as it is.
    """

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        rnn = cast(nn.LSTM, base_layer)
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        return (width,), width

    @property
    def _rnn(self) -> nn.LSTM:
        return cast(nn.LSTM, self.get_base_layer())

    def node_axes(self, ndim: int) -> tuple[int, ...]:
        """The batch axis of a recurrent layer."""
        return (0,) if self._rnn.batch_first else (1,)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the recurrent layer and update its output and final hidden state."""
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise ValueError(
                message(
                    f"stlora layer '{self.name}' cannot read its input",
                    expected="a padded tensor of three axes",
                    got=f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__,
                    fix="pad a packed sequence, and give a single series a batch axis",
                )
            )
        out, state = self.base_layer(x, *args, **kwargs)
        update = self._active_updates(out)
        if update is None:
            return out, state
        out = out + update.to(out.dtype)
        hidden = self._final_hidden(out, state[0] if isinstance(state, tuple) else state)
        return out, (hidden, *state[1:]) if isinstance(state, tuple) else hidden

    def _final_hidden(self, out: Tensor, hidden: Tensor) -> Tensor:
        """Put the last layer's updated final output into the hidden state."""
        time = 1 if self._rnn.batch_first else 0
        if not self._rnn.bidirectional:
            return torch.cat([hidden[:-1], out.select(time, -1)[None]])
        forward, backward = out.chunk(2, dim=-1)
        last = torch.stack([forward.select(time, -1), backward.select(time, 0)])
        return torch.cat([hidden[:-2], last])


def host_layers() -> Mapping[type[nn.Module], type[STLoraLayer]]:
    """Layer classes that can be adapted, those of torch-geometric where it is installed."""
    hosts: dict[type[nn.Module], type[STLoraLayer]] = {
        nn.Linear: STLoraLinear,
        nn.Conv1d: STLoraConv,
        nn.Conv2d: STLoraConv,
        nn.LSTM: STLoraRecurrent,
        nn.GRU: STLoraRecurrent,
    }
    try:
        import torch_geometric.nn as pyg
    except ImportError:
        return hosts
    return hosts | {pyg.Linear: STLoraLinear, pyg.GCNConv: STLoraGraphConv, pyg.ChebConv: STLoraChebConv}


def layer_sizes(layer: nn.Module) -> tuple[tuple[int, ...], int]:
    """Width that a layer's update reads, followed by the kernel of a convolution, and width that it writes."""
    return cast(type[STLoraLayer], host_class(layer))._sizes(layer)


def host_class(layer: nn.Module) -> type[STLoraLayer] | None:
    """The class that adapts ``layer``, looked up along its bases, or None."""
    hosts = host_layers()
    return next((hosts[cls] for cls in type(layer).__mro__ if cls in hosts), None)
