"""A cell that runs over the window: what the recurrent forecasters have in common."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from stlora_peft.backbones.base import Forecaster
from stlora_peft.backbones.graphs import union
from stlora_peft.errors import message
from stlora_peft.tuner.spec import BackboneSpec


class RecurrentForecaster(Forecaster):
    r"""A cell of torch-geometric-temporal run over the window, and a linear head on its last state.

    .. math::
        h_t = \mathrm{cell}(x_t, E, h_{t-1}), \quad h_0 = 0, \qquad
        \hat y_n = W h_{T,n} + b \; [\, + x_{T,n} \,]

    The state starts at zero for every window; nothing is carried from one call to the next.

    Args:
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        residual: Forecast the change since the last step of the window (the bracket above).
        **sizes: Further hyperparameters of at least 1, ``hidden_channels`` among them.

    Attributes:
        folded: Whether the cell has no batch axis. It then runs on the union of :math:`B` copies of the graph, with
            rows ``(b n)``, node fastest.
        num_states: Number of tensors that the cell carries on.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``
        - the cell sees ``[b n c]``, or ``[(b n) c]`` if ``folded``

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
    """

    folded: ClassVar[bool] = False
    num_states: ClassVar[int] = 1
    cell: Any  # torch-geometric-temporal ships no types
    head: nn.Module

    def __init__(
        self, in_channels: int, out_channels: int, window: int, horizon: int, residual: bool, **sizes: int
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        self.check_positive(**sizes)
        self.hyperparameters |= sizes
        self.hidden_channels = sizes["hidden_channels"]
        self._warned = False

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the network over the window and read the forecast off its last state."""
        if edge_weight is None:
            edge_weight = x.new_ones(edge_index.shape[1])
        features = self.encode(x, edge_index, edge_weight)
        change: Tensor = self.head(features.reshape(x.shape[0], x.shape[2], -1))  # [b n (t c)]
        return change

    def encode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """Features of each node that the head reads: ``[b n c]``, or the same rows folded."""
        steps = x.transpose(0, 1)  # [t b n c]
        if self.folded:
            steps = steps.flatten(1, 2)  # [t (b n) c]
        return self.read(self.unroll(self.cell, steps.unbind(), self.graph(x, edge_index, edge_weight)))

    def unroll(self, cell: Any, steps: Sequence[Tensor], graph: tuple[Any, ...]) -> list[Tensor]:
        """Output of ``cell`` at each step."""
        state, outputs = self.start(steps[0]), []
        for x in steps:
            state = self.step(cell, x, graph, state)
            outputs.append(state[0])
        return outputs

    def graph(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> tuple[Any, ...]:
        """Arguments of the cell that say how the nodes are joined, made once for the whole window."""
        return union(edge_index, edge_weight, x.shape[0], x.shape[2]) if self.folded else (edge_index, edge_weight)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """State before the first step ``x``, in its dtype: the cells' own zeros are always float32."""
        return (x.new_zeros(*x.shape[:-1], self.hidden_channels),) * self.num_states

    def step(self, cell: Any, x: Tensor, graph: tuple[Any, ...], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """State after one more step; its first tensor is the output of that step."""
        after = cell(x, *graph, *state)
        return after if isinstance(after, tuple) else (after,)

    def read(self, outputs: list[Tensor]) -> Tensor:
        """Features that the head reads, from the outputs of all steps."""
        return outputs[-1]

    def new_head(self, in_features: int) -> nn.Linear:
        """Linear layer from the features of a node to its forecast."""
        return nn.Linear(in_features, self.horizon * self.out_channels)

    def warn_once(self, problem: str, expected: str, got: str, fix: str) -> None:
        """Warn of numbers that are kept although they are wrong, once for each network."""
        if not self._warned:
            self._warned = True
            text = message(f"backbone '{self.name}': {problem}", expected=expected, got=got, fix=fix)
            warnings.warn(text, UserWarning, stacklevel=2)


def cell_spec(layers: Sequence[str], layout: str, node_bound: tuple[str, ...] = ()) -> BackboneSpec:
    """Spec of a forecaster whose adapted layers, apart from the head, all have the same layout.

    Args:
        layers: Names of the layers.
        layout: Axis pattern of their inputs.
        node_bound: Names of the modules whose tensors have one entry for each node.

    Example:
        >>> cell_spec(["conv_z"], "(b n) c").target_modules
        ('conv_z', 'head')
    """
    return BackboneSpec(
        target_modules=(*layers, "head"),
        node_layout={**dict.fromkeys(layers, layout), "head": "b n c"},
        node_bound=node_bound,
        head=("head",),
    )
