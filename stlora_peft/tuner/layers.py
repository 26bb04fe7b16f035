"""Layers that add a node-conditioned low-rank update to a frozen layer."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.conditioning import FACTOR_NAMES, condition, factor_shapes, new_factor
from stlora_peft.tuner.config import STLoraConfig
from stlora_peft.tuner.functional import Dropout, delta_weight, full_update, project
from stlora_peft.tuner.layout import Layout, check_layout, infer_layout, parse_layout
from stlora_peft.tuner.nodes import AdapterModule, NodeTable, check_mergeable


class STLoraLayer(AdapterModule):
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
    mergeable = False
    default_layout: str | None = None
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
        return full_update(view, weight, node, channel)

    def _up(self, u: Tensor, weight: Tensor) -> Tensor:
        """Shared projection B u, axes kept."""
        return project(u, weight)

    def _root_weight(self) -> Tensor:
        """Weight that a shared update is merged into."""
        return cast(Tensor, self.get_base_layer().weight)

    def _set_root_weight(self, value: Tensor) -> None:
        """Put values into that weight."""
        self._root_weight().data = value

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
        factors = self.factors(adapter_name)
        z = self.nall_dropout[adapter_name](self._cast_input_dtype(z, factors["B"].dtype))
        if not self.cast_input_dtype_enabled:  # inside PEFT's disable_input_dtype_casting the input decides
            factors = {name: factor.to(z.dtype) for name, factor in factors.items()}
        up = factors["B"] * self.scaling[adapter_name]
        if self.conditioning[adapter_name] == "shared":
            return self._up(self._down(z, factors["A"]), up)
        layout, num_nodes = self._checked_layout(z, adapter_name), self.num_nodes[adapter_name]
        if self.conditioning[adapter_name] == "full":
            u = self._down_full(z, factors["A"], layout, num_nodes)
        else:
            down = factors.get("A", z.new_zeros(self.r[adapter_name], *self.in_shape))  # a node bias has no A
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
        if self.disable_adapters or self.merged:
            return out
        update = self._active_updates(self._root(x))
        return out if update is None else self._sum(out, update)

    def _sum(self, out: Any, update: Tensor) -> Tensor:
        """Output of the wrapped layer with an update."""
        return cast(Tensor, out + update.to(out.dtype))

    # -- merging ----------------------------------------------------------------------------------------

    def merge_refusal(self, adapter_name: str) -> str | None:
        """Why the adapter cannot be folded into this layer's weights, or None."""
        if self.conditioning.get(adapter_name, "shared") != "shared":
            form = self.conditioning[adapter_name]
            return f"its update depends on the node (conditioning='{form}'): one weight cannot hold N of them"
        if self.mergeable:
            return None
        return f"{type(self.get_base_layer()).__name__} has no weight that equals the update"

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Dense update of a shared adapter, in the shape of the weight that it is merged into."""
        factors = self.factors(adapter_name)
        return delta_weight(factors["B"], factors["A"], self.scaling[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold shared adapters into the wrapped layer's weights.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Adapters to fold; the active ones by default.

        Raises:
            ValueError: If an adapter depends on the node, or the result is not finite. Nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.nall_B]
        if names:
            self._set_root_weight(self.merged_weight(names, safe_merge))
            self.merged_adapters.extend(names)

    def merged_weight(self, adapter_names: list[str], safe_merge: bool = False) -> Tensor:
        """Compute the wrapped layer's weight with adapters folded in; arguments and errors as of :meth:`merge`."""
        for name in adapter_names:
            check_mergeable(self.merge_refusal(name), name, self.name)
        merged = self._root_weight().data
        for name in adapter_names:
            merged = merged + self.get_delta_weight(name).to(merged.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    message(
                        f"adapter '{name}' cannot be merged into '{self.name}'",
                        expected="finite weights",
                        got="NaN or infinity",
                        fix="train the adapter again with a smaller learning rate",
                    )
                )
        return merged

    def unmerge(self) -> None:
        """Take merged adapters out of the wrapped layer's weights again; nothing happens if there are none."""
        while self.merged_adapters:
            weight = self._root_weight().data
            self._set_root_weight(weight - self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype))

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
