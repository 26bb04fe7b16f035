"""D2STGNN: layers that take apart what spreads over the roads and what belongs to a node, and forecast both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stlora_peft.backbones.clock import time_rows, value_channels
from stlora_peft.backbones.d2stgnn.decoupling import Decomposition, DecoupledLayer, EstimationGate, Surroundings
from stlora_peft.backbones.d2stgnn.diffusion import DiffusionBlock
from stlora_peft.backbones.d2stgnn.dynamic_graph import DynamicGraph
from stlora_peft.backbones.d2stgnn.inherent import InherentBlock, positions
from stlora_peft.backbones.d2stgnn.times import TimeVectors
from stlora_peft.backbones.graphs import dense_graph
from stlora_peft.backbones.nodes import NodeBoundForecaster, NodeVectors
from stlora_peft.tuner.spec import BackboneSpec

_FAMILIES = 3  # of matrices: along the roads, against them, of the node vectors

# Without the gate, which sees places and times alone, and the keys of the attention: it does not see what an update
# adds to all keys of a node.
_LAYOUTS = {
    "embedding": "b n t c",
    "distance.window_1": "b n c",
    "distance.window_2": "b n c",
    "distance.query": "b n c",
    "distance.key": "b n c",
    "conv.transform": "b n t c",
    "conv.mix": "b n t c",
    "cell": "(b n) c",
    "attention.query": "b n t c",
    "attention.value": "b n t c",
    "attention.out": "b n t c",
    "backcast": "b n t c",
    "forecast": "b n t c",
    "regression_1": "b n t c",
    "regression_2": "b n t c",
}


class D2STGNN(NodeBoundForecaster):
    r"""Decoupled dynamic spatial-temporal graph network.

    Each layer :math:`l` estimates by a gate :math:`\Lambda` of place and time which share of its series spreads over
    the roads. A diffusion block explains that share, a recurrence with attention the rest, and what both leave is the
    series of the next layer:

    .. math::
        H^{dif} &= \mathrm{diffusion}(\Lambda \odot X^{l};\, P_f^{dy}, P_b^{dy}, P_{apt}), &
        X^{own} &= \mathrm{norm}\big(X^{l} - \mathrm{relu}(H^{dif} W_b)\big), \\
        H^{own} &= \mathrm{inherent}(X^{own}), &
        X^{l+1} &= \mathrm{norm}\big(X^{own} - \mathrm{relu}(H^{own} W_c)\big), \\
        \hat y &= \mathrm{relu}\big(\mathrm{relu}\big(\textstyle\sum_l F^{dif}_l + F^{own}_l\big) W_1\big) W_2 \;
        [\, + x_{last} \,] & &

    Both blocks go on beyond the window in strides; each of their forecast states :math:`F` makes ``gap`` steps, the
    last one fewer where the horizon is no multiple. The road graph, along the edges (:math:`P_f`) and against them
    (:math:`P_b`), is weighed anew for every window, see :class:`~stlora_peft.backbones.d2stgnn.dynamic_graph
    .DynamicGraph`; :math:`P_{apt}` comes from the two vectors of each node alone. These vectors are bound to the
    nodes; in another city they are drawn anew, see :class:`~stlora_peft.backbones.nodes.NodeVectors`.

    The times are read off the last channels of the input, the encodings of :func:`stlora_peft.data.windows
    .time_encoding`; their mean over the nodes counts, and a time moves in slots. Without encodings
    (``time_features="none"``) each step of the window has a learned vector of its own.

    Args:
        num_nodes: Number of nodes :math:`N` of the vectors.
        in_channels: Channels of the input: values first, time encodings last.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`. Every layer shortens its series by ``temporal_kernel - 1`` steps.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the series, a multiple of ``heads``.
        forecast_channels: Width of the forecast states.
        head_channels: Width between the two layers of the head.
        emb_size: Width of the two vectors of each node.
        time_emb_size: Width of the vectors of slots and days.
        gate_channels: Width of the gates.
        num_layers: Number of layers.
        spatial_kernel: Highest power :math:`k_s` of each transition matrix.
        temporal_kernel: Steps :math:`k_t` that the diffusion reads at once.
        gap: Steps that a forecast state makes, at most ``horizon``.
        heads: Number of heads of the attention.
        dropout: Share of values that training leaves out.
        time_features: Encodings that the input ends with: ``"none"``, ``"day"`` (2 channels) or ``"week"`` (4).
        steps_per_day: Slots that a day is divided into.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Cost:
        ``2 * spatial_kernel`` matrices of :math:`N \times N` for every window of a batch, once for all layers.

    Raises:
        ValueError: If a size is below 1, if the layers need a longer window, if ``hidden_channels`` is no multiple of
            ``heads``, if ``gap`` is above ``horizon``, if ``dropout`` is no share, if ``time_features`` is none of the
            three or leaves no channel for the values, or if ``residual`` is asked for with fewer values than output
            channels.

    Example:
        >>> model = D2STGNN(num_nodes=5, in_channels=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Shao et al. (D2STGNN), VLDB 2022, arXiv:2206.09112. With ``time_features="week"`` and one value channel it has
        the published 0.39 million parameters on METR-LA, and with vectors of width 12 the 0.40 million on PEMS04.
        As in the released code: the road graph enters as the mask of the dynamic matrices alone, whose rows sum to
        one; a node's own steps enter the convolution as their mean; the series get shorter from layer to layer; the
        windows of the distances are batch-normalised. Differs from it: parts without effect are left out (a
        normalisation, a map of times, the bias of the keys, what the last layer leaves); the recurrence goes on from
        its own state and each position is added once, where the released code adds positions to that state and again
        with every stride; one dropout after the positions instead of two; nodes without neighbours hear nobody along
        the roads, where they heard all; windows of several values; the residual.
    """

    name = "d2stgnn"
    stlora_spec = BackboneSpec(
        target_modules=tuple(_LAYOUTS),
        node_layout=_LAYOUTS,
        node_bound=("source_vectors", "target_vectors"),
        frugal=("diffusion.forecast", "inherent.forecast"),
        head=("regression_1", "regression_2"),
    )

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        forecast_channels: int = 256,
        head_channels: int = 512,
        emb_size: int = 10,
        time_emb_size: int = 10,
        gate_channels: int = 64,
        num_layers: int = 5,
        spatial_kernel: int = 2,
        temporal_kernel: int = 3,
        gap: int = 3,
        heads: int = 4,
        dropout: float = 0.1,
        time_features: str = "day",
        steps_per_day: int = 288,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {
            "num_nodes": num_nodes,
            "hidden_channels": hidden_channels,
            "forecast_channels": forecast_channels,
            "head_channels": head_channels,
            "emb_size": emb_size,
            "time_emb_size": time_emb_size,
            "gate_channels": gate_channels,
            "num_layers": num_layers,
            "spatial_kernel": spatial_kernel,
            "temporal_kernel": temporal_kernel,
            "gap": gap,
            "heads": heads,
            "steps_per_day": steps_per_day,
        }
        self.check_positive(**sizes)
        self.hyperparameters |= sizes | {"dropout": dropout, "time_features": time_features}
        self._check_sizes()
        self.values = value_channels(self, time_features)
        self.steps_per_day = steps_per_day
        self.num_strides = -(-horizon // gap)
        self.source_vectors = NodeVectors(num_nodes, emb_size, seed=1)
        self.target_vectors = NodeVectors(num_nodes, emb_size, seed=2)
        for table in (self.source_vectors, self.target_vectors):
            nn.init.xavier_uniform_(table.weight)
        rows = {"none": [window], "day": [steps_per_day], "week": [7, steps_per_day]}[time_features]
        self.time_vectors = TimeVectors(rows, time_emb_size)
        self.embedding = nn.Linear(self.values, hidden_channels)
        self.dynamic_graph = DynamicGraph(
            window * self.values, hidden_channels, self.time_vectors.size, emb_size, spatial_kernel, dropout
        )
        self.layers = nn.ModuleList(self._new_layer() for _ in range(num_layers))
        # One fewer: nobody reads what the last layer leaves.
        self.decompositions = nn.ModuleList(Decomposition(hidden_channels) for _ in range(num_layers - 1))
        self.regression_1 = nn.Linear(forecast_channels, head_channels)
        self.regression_2 = nn.Linear(head_channels, gap * out_channels)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the layers and make ``gap`` steps of each forecast state."""
        road = dense_graph(edge_index, edge_weight, x)
        values = x[..., : self.values].transpose(1, 2).contiguous()  # [b n t c]
        around = self._surroundings(values, x[..., self.values :], road)
        first, *others = self.layers
        series, states, ahead = first(self.embedding(values), around)
        for decomposition, layer in zip(self.decompositions, others, strict=True):
            series, states, forecast = layer(decomposition(series, states), around)
            ahead = ahead + forecast
        steps = self.regression_2(self.regression_1(ahead.relu()).relu()).flatten(2)  # [b n (t c)]
        change: Tensor = steps[..., : self.horizon * self.out_channels]
        return change

    def _surroundings(self, values: Tensor, encodings: Tensor, road: Tensor) -> Surroundings:
        """Graphs, times and places, once for all layers."""
        times = self.time_vectors(time_rows(encodings.mean(2), 0, self.steps_per_day))
        sources, targets = (table.weight.to(values.dtype) for table in (self.source_vectors, self.target_vectors))
        matrices = self.dynamic_graph(road, values.flatten(2), times[:, -1], sources, targets)
        steps = positions(self.window + self.num_strides, self.hyperparameters["hidden_channels"], values)
        return Surroundings(matrices, times, torch.cat([sources, targets], 1), steps)

    def _new_layer(self) -> DecoupledLayer:
        """A layer of this network's widths."""
        known = self.hyperparameters
        hidden, forecast, dropout = known["hidden_channels"], known["forecast_channels"], known["dropout"]
        num_matrices = _FAMILIES * known["spatial_kernel"]
        return DecoupledLayer(
            EstimationGate(self.time_vectors.size, 2 * known["emb_size"], known["gate_channels"]),
            DiffusionBlock(hidden, forecast, self.num_strides, known["temporal_kernel"], num_matrices, dropout),
            InherentBlock(hidden, forecast, self.num_strides, known["heads"], dropout),
            hidden,
        )

    def _check_sizes(self) -> None:
        """Refuse sizes that do not fit each other, and a dropout that is no share."""
        known = self.hyperparameters
        lost = known["temporal_kernel"] - 1
        least = known["num_layers"] * lost + 1
        if self.window < least:
            self.refuse(
                "window too short",
                f"window >= {least}: each of the {known['num_layers']} layers takes {lost} steps off it",
                f"window = {self.window}",
                "give a longer window, fewer layers or a smaller temporal_kernel",
            )
        if known["hidden_channels"] % known["heads"]:
            self.refuse(
                "hidden_channels out of range",
                f"a multiple of heads = {known['heads']}",
                f"hidden_channels = {known['hidden_channels']}",
                f"give hidden_channels={known['hidden_channels'] + -known['hidden_channels'] % known['heads']}",
            )
        if known["gap"] > self.horizon:
            self.refuse(
                "gap out of range",
                f"gap <= horizon = {self.horizon}",
                f"gap = {known['gap']}",
                f"give gap={self.horizon} or less",
            )
        if not 0 <= known["dropout"] < 1:
            self.refuse(
                "dropout out of range", "0 <= dropout < 1", f"dropout = {known['dropout']}", "give a smaller share"
            )
