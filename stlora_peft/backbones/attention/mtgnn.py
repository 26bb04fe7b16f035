"""MTGNN: a graph learned from vectors of the nodes, mix-hop propagation and dilated convolutions along time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import dense_graph
from stlora_peft.backbones.nodes import NodeBoundForecaster, NodeVectors, NoVectors
from stlora_peft.tuner.spec import BackboneSpec

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _GraphConstructor(nn.Module):
        _embedding1: nn.Module
        _embedding2: nn.Module
        _linear1: nn.Linear
        _linear2: nn.Linear
        _k: int
        _alpha: float

        def __init__(self, nnodes: int, k: int, dim: int, alpha: float) -> None:
            """Types of torch-geometric-temporal's GraphConstructor."""

        def _reset_parameters(self) -> None: ...

    class _MTGNN(nn.Module):
        def __init__(self, **arguments: Any) -> None:
            """Types of torch-geometric-temporal's MTGNN."""
else:
    _upstream = tgt.load().nn.attention.mtgnn
    _MTGNN, _GraphConstructor = _upstream.MTGNN, _upstream.GraphConstructor

KERNELS = (2, 3, 6, 7)
"""Steps that the convolutions of a layer span, those of the paper."""

_LAYERS = (
    "_start_conv",
    *(f"_time_conv.{i}" for i in range(len(KERNELS))),
    "_mlp._mlp",
    "_skip_conv",
    "_skip_conv_0",
    "_skip_conv_E",
    "_end_conv_1",
    "_end_conv_2",
)


class LearnedGraph(_GraphConstructor):
    r"""torch-geometric-temporal's GraphConstructor: directed edges from two vectors of each node.

    .. math::
        s = \tanh(\alpha M_1)\tanh(\alpha M_2)^\top - \tanh(\alpha M_2)\tanh(\alpha M_1)^\top, \qquad
        A = \mathrm{relu} \tanh(\alpha s)

    with :math:`M_i = E_i \Theta_i + b_i`, of which each node keeps its ``k`` largest entries. They are chosen by
    :math:`s`, which orders as :math:`A` does, but for entries that are both one to the last bit: there
    torch-geometric-temporal's choice depends on the order of the nodes, and on the compiler.

    Args:
        num_nodes: Number of nodes.
        neighbours: Most edges into a node, ``k``.
        emb_size: Width of the vectors.
        sharpness: The factor :math:`\alpha`.

    Shapes:
        - **road:** :math:`(N, N)`, not used
        - **output:** :math:`(N, N)`, a node's edges in its row
    """

    def __init__(self, num_nodes: int, neighbours: int, emb_size: int, sharpness: float = 3.0) -> None:
        super().__init__(num_nodes, neighbours, emb_size, sharpness)
        self._embedding1 = NodeVectors(num_nodes, emb_size, seed=1)
        self._embedding2 = NodeVectors(num_nodes, emb_size, seed=2)
        self._reset_parameters()

    def forward(self, road: Tensor) -> Tensor:
        """Edges of the vectors; the road graph is not used."""
        first = torch.tanh(self._alpha * self._linear1(self._embedding1.weight))
        second = torch.tanh(self._alpha * self._linear2(self._embedding2.weight))
        scores = first @ second.T - second @ first.T
        kept = scores.topk(min(self._k, scores.shape[1]), 1).indices
        edges = torch.tanh(self._alpha * scores).relu()
        return edges * torch.zeros_like(edges).scatter(1, kept, 1.0)


class RoadGraph(nn.Module):
    """The road graph as it is given, in the place of a learned one.

    Shapes:
        - **road:** :math:`(N, N)`
        - **output:** :math:`(N, N)`
    """

    def __init__(self) -> None:
        super().__init__()
        self._embedding1 = NoVectors()  # the names of node-bound modules belong to the class, whatever its arguments
        self._embedding2 = NoVectors()

    def forward(self, road: Tensor) -> Tensor:
        """Hand the graph on."""
        return road


class MTGNN(NodeBoundForecaster):
    r"""torch-geometric-temporal's MTGNN on a learned graph or on the road graph.

    Each layer convolves along time with kernels of 2, 3, 6 and 7 steps, a gated pair of them, and propagates over the
    graph, once along and once against its edges, mixing the hops:

    .. math::
        H^{(j)} = \beta H^{(0)} + (1 - \beta)\, \tilde D^{-1} (A + I) H^{(j-1)}, \qquad
        z = \sum_j H^{(j)} W^{(j)}

    Layer outputs are normalised over channels, nodes and steps together and skip connections sum them up; two
    convolutions of width one make the forecast. By default :math:`A` is learned from two vectors of each node, see
    :class:`LearnedGraph`, and **the edges are ignored**; ``learned_graph=False`` takes the road graph instead, and
    then nothing is bound to the nodes.

    Args:
        num_nodes: Number of nodes :math:`N` of the vectors.
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`; padded to the 19 that three layers see where it is shorter.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the layers, a multiple of 4, one part for each kernel.
        skip_channels: Width of the skip connections.
        end_channels: Width between the last two convolutions.
        num_layers: Number of layers.
        dilation: Factor by which the dilation grows from layer to layer.
        depth: Number of hops :math:`j` that a layer mixes.
        learned_graph: Learn the graph. The road graph is taken otherwise.
        neighbours: Most edges into a node of the learned graph.
        emb_size: Width of the vectors.
        dropout: Share of values that training leaves out.
        residual: Forecast the change since the last step of the window.

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, if ``hidden_channels`` is no multiple of 4, if ``dropout`` is no share, or
            if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> model = MTGNN(num_nodes=5, in_channels=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Wu et al. (MTGNN), KDD 2020, arXiv:2005.11650. Differs: the layer normalisation has no weight and bias for
        each channel, node and step, which alone would outnumber all other weights and belong to one city; the
        residual. Differs from torch-geometric-temporal 0.56.2: the choice of edges, see :class:`LearnedGraph`, at
        most :math:`N` neighbours, float64, and no layers that are never called.
    """

    name = "mtgnn"
    stlora_spec = BackboneSpec(
        target_modules=_LAYERS,
        node_layout=dict.fromkeys(_LAYERS, "b c n t"),
        node_bound=("adjacency._embedding1", "adjacency._embedding2"),
        head=("network._end_conv_1", "network._end_conv_2"),
    )

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        skip_channels: int = 64,
        end_channels: int = 128,
        num_layers: int = 3,
        dilation: int = 1,
        depth: int = 2,
        learned_graph: bool = True,
        neighbours: int = 20,
        emb_size: int = 40,
        dropout: float = 0.3,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {
            "num_nodes": num_nodes,
            "hidden_channels": hidden_channels,
            "skip_channels": skip_channels,
            "end_channels": end_channels,
            "num_layers": num_layers,
            "dilation": dilation,
            "depth": depth,
            "neighbours": neighbours,
            "emb_size": emb_size,
        }
        self.check_positive(**sizes)
        self._check_shares(hidden_channels, dropout)
        self.hyperparameters |= sizes | {"learned_graph": learned_graph, "dropout": dropout}
        self.adjacency = LearnedGraph(num_nodes, neighbours, emb_size) if learned_graph else RoadGraph()
        self.network = self._build_network()

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Run the layers over the graph and read the skip connections."""
        road = dense_graph(edge_index, edge_weight, x).T  # a row holds what a node hears
        forecast = self.network(x.permute(0, 3, 2, 1), self.adjacency(road))  # [b (t c) n 1]
        change: Tensor = forecast.squeeze(3).transpose(1, 2)  # [b n (t c)]
        return change

    def _build_network(self) -> nn.Module:
        """torch-geometric-temporal's network, without the parts that are not used."""
        known = self.hyperparameters
        network = _MTGNN(
            gcn_true=True,
            build_adj=False,
            gcn_depth=known["depth"],
            num_nodes=known["num_nodes"],
            kernel_set=list(KERNELS),
            kernel_size=max(KERNELS),
            dropout=known["dropout"],
            subgraph_size=known["neighbours"],
            node_dim=1,
            dilation_exponential=known["dilation"],
            conv_channels=known["hidden_channels"],
            residual_channels=known["hidden_channels"],
            skip_channels=known["skip_channels"],
            end_channels=known["end_channels"],
            seq_length=self.window,
            in_dim=self.in_channels,
            out_dim=self.horizon * self.out_channels,
            layers=known["num_layers"],
            propalpha=0.05,
            tanhalpha=3.0,
            layer_norm_affline=False,
        )
        del network._graph_constructor
        network._idx = torch.empty(0)  # numbers of the nodes, for the weights that the normalisation does not have
        for layer in cast(nn.ModuleList, network._mtgnn_layers):
            del layer._residual_conv
        return network

    def _check_shares(self, hidden_channels: int, dropout: float) -> None:
        """Refuse a width that cannot be divided among the kernels, and a dropout that is no share."""
        if hidden_channels % len(KERNELS):
            self.refuse(
                "hidden_channels out of range",
                f"a multiple of {len(KERNELS)}, the number of kernels",
                f"hidden_channels = {hidden_channels}",
                f"give hidden_channels={hidden_channels + -hidden_channels % len(KERNELS)}",
            )
        if not 0 <= dropout < 1:
            self.refuse("dropout out of range", "0 <= dropout < 1", f"dropout = {dropout}", "give a smaller share")
