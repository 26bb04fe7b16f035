"""DNNTSP: graph convolutions in each step, attention to earlier steps, and a gate to each node's own vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.nodes import NodeBound, NodeBoundForecaster, mean_entry
from stlora_peft.tuner.spec import BackboneSpec

if TYPE_CHECKING:  # torch-geometric-temporal ships no types: this is the part of it that is used here

    class _WeightedGCNBlock(nn.Module):
        def __init__(self, in_features: int, hidden_sizes: list[int], out_features: int) -> None:
            """Types of torch-geometric-temporal's WeightedGCNBlock."""

    class _MaskedSelfAttention(nn.Module):
        n_heads: int
        Wq: nn.Linear
        Wk: nn.Linear
        Wv: nn.Linear

        def __init__(self, input_dim: int, output_dim: int, n_heads: int) -> None:
            """Types of torch-geometric-temporal's MaskedSelfAttention."""

    class _Aggregate(nn.Module):
        Wq: nn.Linear

        def __init__(self, item_embed_dim: int) -> None:
            """Types of torch-geometric-temporal's AggregateTemporalNodeFeatures."""

    class _GlobalGatedUpdater(nn.Module):
        item_embedding: nn.Embedding
        alpha: nn.Parameter

        def __init__(self, items_total: int, item_embedding: nn.Embedding) -> None:
            """Types of torch-geometric-temporal's GlobalGatedUpdater."""
else:
    _upstream = tgt.load().nn.attention.dnntsp
    _WeightedGCNBlock, _MaskedSelfAttention = _upstream.WeightedGCNBlock, _upstream.MaskedSelfAttention
    _Aggregate, _GlobalGatedUpdater = _upstream.AggregateTemporalNodeFeatures, _upstream.GlobalGatedUpdater


class StepAttention(_MaskedSelfAttention):
    """torch-geometric-temporal's MaskedSelfAttention of each step to itself and the steps before it.

    Shapes:
        - **x:** :math:`(B N, T, C)`, ``[(b n) t c]``
        - **output:** :math:`(B N, T, C)`, the mean over the heads
    """

    def forward(self, x: Tensor) -> Tensor:
        """Attend along time."""
        query, key, value = (
            weight(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2) for weight in (self.Wq, self.Wk, self.Wv)
        )
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).mean(1)


class StepSum(_Aggregate):
    """Sum of the steps, each weighed by a score of itself.

    Shapes:
        - **x:** :math:`(B N, T, C)`, ``[(b n) t c]``
        - **output:** :math:`(B N, C)`
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.Wq = nn.Linear(channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh and sum the steps."""
        weighed: Tensor = (self.Wq(x) * x).sum(1)
        return weighed


class NodeGate(_GlobalGatedUpdater, NodeBound):
    """torch-geometric-temporal's GlobalGatedUpdater: a mean of the data and the node's own vector.

    In another city every node has the mean vector and the mean gate of the old nodes.

    Shapes:
        - **x:** :math:`(B, N, C)`, ``[b n c]``
        - **output:** :math:`(B, N, C)`
    """

    node_axes: ClassVar[Mapping[str, int] | None] = {"alpha": 0, "vectors": 0}

    def __init__(self, num_nodes: int, channels: int) -> None:
        super().__init__(num_nodes, nn.Embedding(num_nodes, channels))
        self.num_nodes = num_nodes
        self.vectors = self.item_embedding.weight
        del self.item_embedding

    def forward(self, x: Tensor) -> Tensor:
        """Mix what the data say of a node with what is known of it."""
        return (1 - self.alpha) * self.vectors + self.alpha * x

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """Mean gate and mean vector."""
        tensors = {"alpha": self.alpha, "vectors": self.vectors}
        return {name: mean_entry(value, 0, num_nodes, summed=False) for name, value in tensors.items()}


class DNNTSP(NodeBoundForecaster):
    r"""The layers of torch-geometric-temporal's DNNTSP, read as its paper has them, and a linear head.

    Built for sets of items that follow one another, with the items as nodes: here the nodes are sensors, and every
    node has features in every step. Two graph convolutions in each step, attention of each step to the steps before
    it, a weighted sum :math:`s` over the steps and a gate to a vector :math:`e_n` that the node has for itself:

    .. math::
        h = \mathrm{att}\bigl(\mathrm{GCN}(V x)\bigr), \qquad
        s_n = \sum_t (w^\top h_{n,t})\, h_{n,t}, \qquad
        \hat y_n = W \bigl((1 - \alpha_n)\, e_n + \alpha_n s_n\bigr) + b \; [\, + x_{T,n} \,]

    Args:
        num_nodes: Number of nodes :math:`N`, each with a vector :math:`e_n` and a gate :math:`\alpha_n`.
        in_channels: Channels of the input, values first.
        out_channels: Channels of the forecast.
        window: Number of input steps :math:`T`.
        horizon: Number of forecast steps :math:`H`.
        hidden_channels: Width of the layers.
        heads: Number of heads of the attention, each as wide as the layers.
        residual: Forecast the change since the last step of the window (the bracket above).

    Shapes:
        - **x:** :math:`(B, T, N, C_{in})`, ``[b t n c]``
        - **edge_index:** :math:`(2, E)`, **edge_weight:** :math:`(E)` *(optional)*
        - **output:** :math:`(B, H, N, C_{out})`, ``[b t n c]``

    Units:
        Dimensionless in and out: scaled values.

    Raises:
        ValueError: If a size is below 1, or if ``residual`` is asked for with fewer input than output channels.
        ImportError: On import of the module, if torch-geometric-temporal is not installed.

    Example:
        >>> import torch
        >>> model = DNNTSP(num_nodes=5, in_channels=3)
        >>> ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
        >>> model(torch.zeros(8, 12, 5, 3), ring, torch.ones(5)).shape  # [b t n c]
        torch.Size([8, 12, 5, 1])

    References:
        Yu et al. (DNNTSP), KDD 2020, arXiv:2006.11483. Differs: one graph for all steps, features that are measured
        instead of learned, a forecast instead of a set, the residual. Differs from torch-geometric-temporal 0.56.2,
        which attends from node to node, hiding those with a higher number, instead of from step to step, does not
        sum over the steps, and prints two shapes in each forward.
    """

    name = "dnntsp"
    stlora_spec = BackboneSpec(
        target_modules=(
            "encoder",
            "stacked_gcn.gcns.0",
            "stacked_gcn.gcns.1",
            "attention.Wq",
            "attention.Wk",
            "attention.Wv",
            "aggregate.Wq",
            "head",
        ),
        node_layout={
            "encoder": "b t n c",
            "stacked_gcn.gcns.0": "(b t) n c",
            "stacked_gcn.gcns.1": "(b t) n c",
            "attention.Wq": "(b n) t c",
            "attention.Wk": "(b n) t c",
            "attention.Wv": "(b n) t c",
            "aggregate.Wq": "(b n) t c",
            "head": "b n c",
        },
        node_bound=("gate",),
        head=("head",),
    )

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        out_channels: int = 1,
        window: int = 12,
        horizon: int = 12,
        hidden_channels: int = 32,
        heads: int = 4,
        residual: bool = True,
    ) -> None:
        super().__init__(
            window=window, horizon=horizon, in_channels=in_channels, out_channels=out_channels, residual=residual
        )
        sizes = {"num_nodes": num_nodes, "hidden_channels": hidden_channels, "heads": heads}
        self.check_positive(**sizes)
        self.hyperparameters |= sizes
        self.encoder = nn.Linear(in_channels, hidden_channels)
        self.stacked_gcn = _WeightedGCNBlock(hidden_channels, [hidden_channels], hidden_channels)
        self.attention = StepAttention(hidden_channels, hidden_channels, heads)
        self.aggregate = StepSum(hidden_channels)
        self.gate = NodeGate(num_nodes, hidden_channels)
        self.head = nn.Linear(hidden_channels, horizon * out_channels)

    def decode(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        """Convolve each step over the graph, attend along time, and sum each node's steps up."""
        steps = self.stacked_gcn(self.encoder(x).flatten(0, 1), edge_index, edge_weight)  # [(b t) n c]
        rows = steps.unflatten(0, x.shape[:2]).transpose(1, 2).flatten(0, 1)  # [(b n) t c]
        states = self.aggregate(self.attention(rows)).unflatten(0, (-1, x.shape[2]))  # [b n c]
        change: Tensor = self.head(self.gate(states))  # [b n (t c)]
        return change
