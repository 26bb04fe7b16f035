"""PyG's layers, with types of the part that is used here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:  # PyG ships no types

    class Linear(nn.Module):
        """Types of PyG's Linear."""

        weight: nn.Parameter
        bias: nn.Parameter | None

        def __call__(self, x: Tensor) -> Tensor:
            """Types of a call."""

    class MessagePassing(nn.Module):
        """Types of PyG's MessagePassing."""

        aggr: str
        flow: str

        def forward(self, *args: Any, **kwargs: Any) -> Tensor: ...

    class ChebConv(MessagePassing):
        """Types of PyG's ChebConv."""

        lins: nn.ModuleList
        bias: nn.Parameter | None
        normalization: str | None

    class GCNConv(MessagePassing):
        """Types of PyG's GCNConv."""

        in_channels: int
        out_channels: int
        improved: bool
        cached: bool
        add_self_loops: bool
        normalize: bool
        lin: Linear
        bias: nn.Parameter | None
        _cached_edge_index: tuple[Tensor, Tensor] | None

    class GraphConv(MessagePassing):
        """Types of PyG's GraphConv."""

        lin_rel: Linear
        lin_root: Linear

    class SAGEConv(MessagePassing):
        """Types of PyG's SAGEConv."""

        lin_l: Linear
        lin_r: Linear
        lin: Linear
        project: bool
        normalize: bool
        root_weight: bool

    class GatedGraphConv(MessagePassing):
        """Types of PyG's GatedGraphConv."""

        out_channels: int
        weight: nn.Parameter
        rnn: nn.GRUCell

    def gcn_norm(*args: Any) -> tuple[Tensor, Tensor]:
        """Types of PyG's normalisation."""
else:
    from torch_geometric.nn import ChebConv, GatedGraphConv, GCNConv, GraphConv, Linear, SAGEConv
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

__all__ = ["ChebConv", "GCNConv", "GatedGraphConv", "GraphConv", "Linear", "SAGEConv", "gcn_norm"]
