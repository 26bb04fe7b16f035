r"""The node-specific predictor: a correction of the backbone's forecast."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.activation import activated
from stlora_peft.tuner.conditioning import condition, factor_dtype, factor_shapes, new_factor
from stlora_peft.tuner.config import WIDTH, PredictorConfig, STLoraConfig
from stlora_peft.tuner.nodes import CityModule, NodeTable
from stlora_peft.tuner.products import nodewise, project

ATTRIBUTE = "stlora_predictor"


class NodePredictor(nn.Module):
    r"""Node-adaptive residual network from window and forecast to a correction of the forecast.

    .. math::
        H_0 = W_{in} [X, c, \hat Y] + b_{in}, \qquad
        H_l = H_{l-1} + \mathrm{NALL}_l(\sigma(H_{l-1})), \qquad
        \Delta Y = \mathrm{NALL}_{out}(\sigma(H_L))

    with the first ``history_channels`` channels :math:`X` of the window, the last step :math:`c` of the others, and
    :math:`\mathrm{NALL}(h)_i = W h_i + b + \tfrac{\alpha}{r} B A_i h_i` and :math:`\sigma` = RMSNorm,
    LeakyReLU(0.1), dropout. :math:`W_{out}`, :math:`b_{out}` and every :math:`B` start at zero, so the
    correction starts as exactly zero.

    Args:
        predictor: Sizes; only ``r`` may be None.
        config: The adapter's configuration: conditioning, number of nodes, rank and scale.
        like: Tensor whose device and dtype the parameters take.

    Shapes:
        - **window** :math:`X`: ``[b t n c]``, **forecast** :math:`\hat Y`: ``[b t n c]``
        - **output:** shape of the forecast

    References:
        ST-LoRA, arXiv:2404.07919, Eq. 3. Differs: reads the forecast beside the window, and is added to it.
    """

    def __init__(self, predictor: PredictorConfig, config: STLoraConfig, like: Tensor) -> None:
        super().__init__()
        self.predictor = predictor
        self.config = config
        self.r, self.width = predictor.r or config.rank, predictor.width or WIDTH
        self.dropout = (config.lora_dropout or 0.0) if predictor.dropout is None else predictor.dropout
        self.scaling = config.scaling(self.r, config.lora_alpha)
        outputs = required_size(predictor, "horizon") * required_size(predictor, "out_channels")
        channels = required_size(predictor, "in_channels")
        self.history_channels = min(predictor.history_channels or required_size(predictor, "out_channels"), channels)
        history = required_size(predictor, "window") * self.history_channels
        inputs = history + channels - self.history_channels + outputs
        self._linear("in", inputs, self.width, like)
        for layer in range(predictor.num_layers):
            self._node_layer(str(layer), self.width, like)
        self._node_layer("out", outputs, like)
        if config.init_weights:
            with torch.no_grad():
                self._tensor("weight_out").zero_()
                self._tensor("bias_out").zero_()

    def _linear(self, name: str, in_features: int, out_features: int, like: Tensor) -> None:
        """Register a weight and a bias with the starting values of ``nn.Linear``."""
        linear = nn.Linear(in_features, out_features, device=like.device, dtype=factor_dtype(like))
        # PEFT inserts the adapter's name one level above a tensor, so this module has no sub-modules.
        self.register_parameter(f"weight_{name}", cast(nn.Parameter, linear.weight))
        self.register_parameter(f"bias_{name}", linear.bias)

    def _node_layer(self, name: str, out_features: int, like: Tensor) -> None:
        """Register the parameters of one node-adaptive layer."""
        in_shape = (self.width,)
        self._linear(name, self.width, out_features, like)
        norm = torch.ones(in_shape, device=like.device, dtype=factor_dtype(like))
        self.register_parameter(f"norm_{name}", nn.Parameter(norm))
        shapes = factor_shapes(
            self.config.conditioning,
            r=self.r,
            num_nodes=self.config.num_nodes or 0,
            in_shape=in_shape,
            out_features=out_features,
            emb_size=self.config.emb_size,
        )
        for factor, shape in shapes.items():
            value = new_factor(factor, shape, in_shape, identity=self.config.init_weights, like=like)
            self.register_parameter(f"{factor}_{name}", value)
        self.factor_names = tuple(shapes)

    def _tensor(self, name: str) -> Tensor:
        """Look up a parameter; sharded training puts plain tensors in their place, which get_parameter refuses."""
        tensor: Tensor = getattr(self, name)
        return tensor

    def _activated(self, h: Tensor, name: str) -> Tensor:
        """RMSNorm, LeakyReLU and dropout before a node-adaptive layer."""
        return activated(h, self._tensor(f"norm_{name}"), self.dropout, self.training)

    def _nall(self, h: Tensor, name: str, embedding: Callable[[], Tensor] | None) -> Tensor:
        """Node-adaptive low-rank layer on rows ``[b n d]``."""
        h = self._activated(h, name)
        factors = {key: self._tensor(f"{key}_{name}") for key in self.factor_names}
        u = self._product(h, factors["A"]) if "A" in factors else h.new_zeros(*h.shape[:-1], self.r)
        u = condition(u, factors, embedding, 1, 2)
        return self._affine(h, name) + self._product(u, factors["B"] * self.scaling)

    def _product(self, h: Tensor, matrix: Tensor) -> Tensor:
        """Product with one matrix for all nodes, or with each node's own."""
        return nodewise(h, matrix, 1, 2) if matrix.ndim == 3 else project(h, matrix)

    def _affine(self, h: Tensor, name: str) -> Tensor:
        """Linear layer that all nodes share."""
        return project(h, self._tensor(f"weight_{name}"), self._tensor(f"bias_{name}"))

    def forward(self, window: Tensor, forecast: Tensor, embedding: Callable[[], Tensor] | None = None) -> Tensor:
        """Compute the correction.

        Args:
            window: Input window, in ``input_layout``.
            forecast: The backbone's forecast, in ``output_layout``.
            embedding: Gives the node vectors of ``conditioning="embedding"``.

        Returns:
            Tensor of the shape of ``forecast``.
        """
        out = self._nall(self._hidden(window, forecast, embedding), "out", embedding)
        pattern = f"b n (t c) -> {self.predictor.output_layout}"
        return rearrange(out, pattern, c=required_size(self.predictor, "out_channels")).to(forecast.dtype)

    def features(self, window: Tensor, forecast: Tensor, embedding: Callable[[], Tensor] | None = None) -> Tensor:
        """Compute what the output layer reads, ``[b n d]``; arguments as of :meth:`forward`."""
        return self._activated(self._hidden(window, forecast, embedding), "out")

    def _hidden(self, window: Tensor, forecast: Tensor, embedding: Callable[[], Tensor] | None) -> Tensor:
        """Compute the last hidden state, ``[b n d]``."""
        dtype = cast(Tensor, self.weight_in).dtype
        steps = rearrange(window, f"{self.predictor.input_layout} -> b n t c")
        rows = [
            steps[..., : self.history_channels].flatten(2),
            steps[:, :, -1, self.history_channels :],
            rearrange(forecast, f"{self.predictor.output_layout} -> b n (t c)"),
        ]
        h = self._affine(torch.cat([row.to(dtype) for row in rows], dim=-1), "in")
        for layer in range(self.predictor.num_layers):
            h = h + self._nall(h, str(layer), embedding)
        return h


class PredictorLayer(CityModule):
    """Holds the predictor of each adapter; a child of the backbone, called by a hook on its output.

    The backbone as a whole cannot be replaced by a wrapper without renaming every weight in it, so this one
    place uses a forward hook. PEFT calls the backbone as a module, which runs hooks.
    """

    adapter_layer_names = ("nall_predictor",)
    other_param_names = ("node_table",)

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.argument = next(iter(inspect.signature(backbone.forward).parameters))
        self.nall_predictor = nn.ModuleDict()
        self.node_table: dict[str, NodeTable] = {}

    def update_layer(self, adapter_name: str, config: STLoraConfig, like: Tensor, table: NodeTable | None) -> None:
        """Add the predictor of an adapter."""
        if isinstance(config.predictor, PredictorConfig):
            self.nall_predictor[adapter_name] = NodePredictor(config.predictor, config, like)
        if table is not None:
            self.node_table[adapter_name] = table

    def forward(self, window: Tensor, forecast: Tensor) -> Tensor:
        """Add the corrections of the active adapters to the forecast.

        Raises:
            ValueError: If window or forecast do not have the sizes that the predictor was made for.
        """
        if self.disable_adapters:
            return forecast
        out = forecast
        for name in self.active_adapters:
            if name in self.nall_predictor:
                predictor = cast(NodePredictor, self.nall_predictor[name])
                _check_sizes(predictor, window, forecast, name)
                table = self.node_table.get(name)
                embedding = None if table is None else partial(table.vectors, name)
                out = out + predictor(window, forecast, embedding)
        return out


def correct_forecast(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Forward hook of the backbone: give the window and the forecast to the predictor."""
    layer = getattr(backbone, ATTRIBUTE)
    window = args[0] if args else kwargs[layer.argument]
    corrected: Tensor = layer(window, output)
    return corrected


def attach_predictor(backbone: nn.Module) -> PredictorLayer:
    """Return the backbone's predictor layer, adding it and its hook on the first call."""
    if not hasattr(backbone, ATTRIBUTE):
        setattr(backbone, ATTRIBUTE, PredictorLayer(backbone))
        backbone.register_forward_hook(correct_forecast, with_kwargs=True)
    return cast(PredictorLayer, getattr(backbone, ATTRIBUTE))


def _check_sizes(predictor: NodePredictor, window: Tensor, forecast: Tensor, adapter_name: str) -> None:
    expected: dict[str, int | None]
    for what, tensor, layout, expected in (
        ("window", window, predictor.predictor.input_layout, _axes(predictor, "window", "in_channels")),
        ("forecast", forecast, predictor.predictor.output_layout, _axes(predictor, "horizon", "out_channels")),
    ):
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
        sizes = dict(zip(layout.split(), shape, strict=False))
        if len(shape) != 4 or any(sizes[axis] != size for axis, size in expected.items()):
            wanted = ", ".join(f"{axis}={size}" for axis, size in expected.items())
            raise ValueError(
                message(
                    f"stlora adapter '{adapter_name}': the {what} does not fit the node-specific predictor",
                    expected=f"{wanted} in layout '{layout}'",
                    got=f"shape {shape}" if isinstance(tensor, Tensor) else type(tensor).__name__,
                    fix="use data of this window, horizon and number of nodes, or build the adapter for these sizes",
                )
            )


def _axes(predictor: NodePredictor, time: str, channels: str) -> dict[str, int | None]:
    sizes = predictor.predictor
    nodes = {} if predictor.config.conditioning == "shared" else {"n": predictor.config.num_nodes}
    return nodes | {"t": getattr(sizes, time), "c": getattr(sizes, channels)}


def required_size(predictor: PredictorConfig, name: str) -> int:
    """One of the predictor's sizes.

    Raises:
        ValueError: If neither the user nor the backbone says it.
    """
    size: int | None = getattr(predictor, name)
    if size is None:
        raise ValueError(
            message(
                f"PredictorConfig.{name} is not known",
                expected=f"a backbone with an attribute '{name}', or the number itself",
                got="neither",
                fix=f"pass predictor=PredictorConfig({name}=<number>, ...)",
            )
        )
    return size
