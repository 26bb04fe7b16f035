"""Linear layers, convolutions and attention of torch with a node-conditioned update on their input."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.tuner.functional import convolve, full_conv
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.layout import Layout
from stlora_peft.tuner.products import nodewise


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
        return convolve(self._pad(z), weight, None, self._conv.stride, self._conv.dilation)

    def _down_full(self, z: Tensor, weight: Tensor, layout: Layout, num_nodes: int) -> Tensor:
        conv, first = self._conv, self.channel(z.ndim) + 1
        view, node, channel = layout.split(self._pad(z), num_nodes)
        along = [i for i in range(len(conv.kernel_size)) if first + i != layout.node_axis(z.ndim)]
        if all(self._still(i) for i in along):
            return nodewise(view, weight.flatten(2), node, channel)
        kernels = weight.reshape(*weight.shape[:3], *(conv.kernel_size[i] for i in along))
        stride, dilation = [conv.stride[i] for i in along], [conv.dilation[i] for i in along]
        return full_conv(view, kernels, node, channel, stride, dilation)

    def _up(self, u: Tensor, weight: Tensor) -> Tensor:
        spatial = len(self._conv.kernel_size)
        return convolve(u, weight[(...,) + (None,) * spatial], None, (1,) * spatial, (1,) * spatial)


class STLoraAttention(STLoraLayer):
    r"""``nn.MultiheadAttention`` with the update beside it.

    .. math:: y_i = \mathrm{attention}(q, k, v)_i + \tfrac{\alpha}{r} B A_i q_i

    Its projections cannot be adapted one by one: torch reads their weights without calling them. The update
    conditions on the node that asks, :math:`q_i`.
    """

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        width = cast(nn.MultiheadAttention, base_layer).embed_dim
        return (width,), width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention and update its output; the weights of the attention are returned as they are."""
        out, weights = self.base_layer(*args, **kwargs)
        update = None if self.disable_adapters else self._active_updates(args[0] if args else kwargs["query"])
        return (out if update is None else out + update.to(out.dtype)), weights


class STLoraEncoderLayer(STLoraLayer):
    r"""``nn.TransformerEncoderLayer`` with the update beside the whole layer.

    .. math:: y_i = \mathrm{layer}(x)_i + \tfrac{\alpha}{r} B A_i x_i

    Nothing inside it can be adapted: when it does not train, torch runs the layer as one kernel that reads the weights
    of its parts without calling them.
    """

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        width = cast(nn.TransformerEncoderLayer, base_layer).self_attn.embed_dim
        return (width,), width
