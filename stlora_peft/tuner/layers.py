"""Layers that add a node-conditioned low-rank update to a frozen layer."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.conditioning import FACTOR_NAMES, condition, factor_shapes, new_factor
from stlora_peft.tuner.config import STLoraConfig
from stlora_peft.tuner.functional import Dropout
from stlora_peft.tuner.layout import Layout, check_layout, infer_layout, parse_layout
from stlora_peft.tuner.merging import MergingLayer
from stlora_peft.tuner.nodes import NodeTable
from stlora_peft.tuner.products import nodewise, project


class STLoraLayer(MergingLayer):
    r"""A layer with a node-conditioned low-rank update; subclasses say what it is multiplied with.

    .. math:: y_i = f(x)_i + \tfrac{\alpha}{r} B A_i z_i

    :math:`f` is the wrapped layer, :math:`z` its input (its output for recurrent layers). ``B`` starts at
    zero, so the untrained layer equals the wrapped one bit for bit.

    Args:
        base_layer: Layer to adapt.
        name: Its name in the backbone, for errors.
    """

    adapter_layer_names = tuple(f"nall_{name}" for name in FACTOR_NAMES)
    other_param_names = (
        "r",
        "lora_alpha",
        "scaling",
        "conditioning",
        "num_nodes",
        "layout",
        "nall_dropout",
        "node_table",
    )
    default_layout: str | None = None
    final_state = False  # whether the backbone reads nothing but the final hidden state of a recurrent layer
    inner: str | None = None  # part of the layer that holds its adapters, where they are not wrapped around it

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_shape, self.out_features = self._sizes(base_layer)
        self.in_features = self.in_shape[0]
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.nall_dropout = nn.ModuleDict()  # with the prefix, or PEFT before 0.20 cannot delete an adapter
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.conditioning: dict[str, str] = {}
        self.num_nodes: dict[str, int] = {}
        self.layout: dict[str, Layout] = {}
        self.node_table: dict[str, NodeTable] = {}
        self.ran_with: list[str] = []  # the adapters that were active when it was last called
        self.stack: Any = None  # updates of many cities side by side, in place of the adapters'

    # -- what a kind of layer says about itself ---------------------------------------------------------

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        """Input width with the kernel, and output width."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        """Why this layer cannot be adapted although its class can, or None."""
        return None

    def channel(self, ndim: int) -> int:
        """Index of the channel axis of an input."""
        return ndim - 1

    def node_axes(self, ndim: int) -> tuple[int, ...]:
        """Axes of an input that may hold the nodes."""
        return tuple(axis for axis in range(ndim) if axis != self.channel(ndim))

    def _root(self, x: Any) -> Tensor:
        """What the update reads of the layer's first argument."""
        return cast(Tensor, x)

    def _down(self, z: Tensor, weight: Tensor) -> Tensor:
        """Shared projection A z, axes kept."""
        return project(z, weight)

    def _down_full(self, z: Tensor, weight: Tensor, layout: Layout, num_nodes: int) -> Tensor:
        """Each node's own projection A_i z_i, with an unfolded node axis."""
        view, node, channel = layout.split(z, num_nodes)
        return nodewise(view, weight, node, channel)

    def _up(self, u: Tensor, weight: Tensor) -> Tensor:
        """Shared projection B u, axes kept."""
        return project(u, weight)

    # -- adapters ---------------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, config: STLoraConfig, *, r: int, lora_alpha: float, layout: str | None
    ) -> None:
        """Add an adapter, or replace the one of that name, at its starting value.

        Args:
            adapter_name: Name of the adapter.
            config: Its configuration.
            r: Rank of this layer.
            lora_alpha: Numerator of the scale of this layer.
            layout: Axis pattern of this layer's input; None finds it at the first forward.
        """
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = config.scaling(r, lora_alpha)
        self.conditioning[adapter_name] = config.conditioning
        for replaced in (self.num_nodes, self.layout, *(getattr(self, name) for name in self.adapter_layer_names)):
            if adapter_name in replaced:
                del replaced[adapter_name]
        self.ran_with = []
        if config.num_nodes is not None:
            self.num_nodes[adapter_name] = config.num_nodes
        if layout is not None:
            self.layout[adapter_name] = parse_layout(layout)
        self.nall_dropout[adapter_name] = Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        like = next((p for p in self.get_base_layer().parameters()), torch.empty(0))
        for name, shape in factor_shapes(
            config.conditioning,
            r=r,
            num_nodes=config.num_nodes or 0,
            in_shape=self.in_shape,
            out_features=self.out_features,
            emb_size=config.emb_size,
        ).items():
            factor = new_factor(name, shape, self.in_shape, identity=config.init_weights, like=like)
            getattr(self, f"nall_{name}")[adapter_name] = factor
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's tensors by factor name; empty if this layer does not have the adapter."""
        named = ((name, getattr(self, f"nall_{name}")) for name in FACTOR_NAMES)
        return {name: values[adapter_name] for name, values in named if adapter_name in values}

    def update(self, z: Tensor, adapter_name: str) -> Tensor:
        r"""Compute the update :math:`\tfrac{\alpha}{r} B A_i z_i` of one adapter.

        Args:
            z: Input of the update, in the adapter's layout for this layer.
            adapter_name: Adapter that this layer has.

        Returns:
            Tensor to be added to the wrapped layer's output.

        Raises:
            ValueError: If the nodes are not where the layout says, or cannot be found.
        """
        return self.update_with(self.scaled_factors(adapter_name), z, adapter_name)

    def scaled_factors(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's tensors by factor name, the scale of the update in ``B``."""
        factors = self.factors(adapter_name)
        return factors | {"B": factors["B"] * self.scaling[adapter_name]}

    def update_with(self, factors: dict[str, Tensor], z: Tensor, adapter_name: str) -> Tensor:
        """Compute an update from these factors, which may be those of several layers side by side; see :meth:`update`.

        Args:
            factors: Factors of the adapter's form, ``B`` scaled.
            z: Input of the update.
            adapter_name: Adapter whose layout, dropout and node vectors are taken.
        """
        z = self.nall_dropout[adapter_name](self._cast_input_dtype(z, factors["B"].dtype))
        if not self.cast_input_dtype_enabled:  # inside PEFT's disable_input_dtype_casting the input decides
            factors = {name: factor.to(z.dtype) for name, factor in factors.items()}
        up = factors["B"]
        if self.conditioning[adapter_name] == "shared":
            return self._up(self._down(z, factors["A"]), up)
        layout, num_nodes = self._checked_layout(z, adapter_name), self.num_nodes[adapter_name]
        if self.conditioning[adapter_name] == "full":
            u = self._down_full(z, factors["A"], layout, num_nodes)
        else:
            down = factors["A"] if "A" in factors else z.new_zeros(up.shape[1], *self.in_shape)  # a node bias has none
            view, node, channel = layout.split(self._down(z, down), num_nodes)
            table = self.node_table.get(adapter_name)
            embedding = None if table is None else partial(table.vectors, adapter_name)
            u = condition(view, factors, embedding, node, channel)
        if layout.folded:
            axis = layout.node_axis(z.ndim)
            u = u.flatten(axis, axis + 1)
        return self._up(u, up)

    def _checked_layout(self, z: Tensor, adapter_name: str) -> Layout:
        where = f"stlora adapter '{adapter_name}' on '{self.name}'"
        num_nodes, channel, axes = self.num_nodes[adapter_name], self.channel(z.ndim), self.node_axes(z.ndim)
        if adapter_name not in self.layout:
            self.layout[adapter_name] = infer_layout(z.shape, num_nodes, channel, axes, where)
        layout = self.layout[adapter_name]
        check_layout(layout, z.shape, num_nodes, where)
        if layout.channel_axis(z.ndim) != channel or layout.node_axis(z.ndim) not in axes:
            raise ValueError(
                message(
                    f"{where}: the layout does not fit this layer",
                    expected=f"channels on axis {channel} and nodes on one of the axes {axes}, which it does not mix",
                    got=f"layout '{layout.pattern}' of an input of shape {tuple(z.shape)}",
                    fix="correct node_layout, or leave the layer out with exclude_modules",
                )
            )
        return layout

    def _active_updates(self, z: Tensor) -> Tensor | None:
        """Sum of the updates of the active adapters that this layer has, or None."""
        if self.stack is not None:
            return cast(Tensor, self.stack(self, z))
        self.ran_with = self.active_adapters
        total: Tensor | None = None
        for name in self.active_adapters:
            if name in self.nall_B:
                update = self.update(z, name)
                total = update if total is None else total + update
        return total

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the wrapped layer and add the updates of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        out = cast(Tensor, self.base_layer(x, *args, **kwargs))
        update = self.active_update(self._root(x))
        return out if update is None else self._sum(out, update)

    def active_update(self, z: Tensor) -> Tensor | None:
        """Sum of the updates that are in force and not merged, or None; ``z`` as of :meth:`update`."""
        return None if self.disable_adapters or self.merged else self._active_updates(z)

    def _sum(self, out: Any, update: Tensor) -> Tensor:
        """Output of the wrapped layer with an update."""
        return cast(Tensor, out + update.to(out.dtype))

    def __getattr__(self, name: str) -> Any:
        """Forward what the backbone asks of its layer, e.g. ``hidden_size``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "stlora." + super().__repr__()
