"""Graph convolutions with a node-conditioned update on their root term."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.layout import check_union


class STLoraGraphConv(STLoraLayer):
    r"""A graph convolution with the update on its root term.

    .. math:: y_i = \mathrm{conv}(x, E)_i + \tfrac{\alpha}{r} B A_i x_i

    The update conditions on the receiving node and reads that node's own input; of a pair of source and target
    features it reads the target's. ``GCNConv`` and ``ChebConvAttention`` have no root weight of their own (the latter
    scales it by the attention), so the update adds one. Nodes are on axis -2, or, as PyG batches graphs, rows of a
    union of equal graphs (``row % N``).
    """

    default_layout: str | None = "... (b n) c"

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        return (_target(base_layer.in_channels),), _target(base_layer.out_channels)

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        """Lazy layers have no size yet."""
        return "it is lazy: run the backbone once before adapting it" if cls._sizes(base_layer)[0] == (-1,) else None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the convolution and add the updates; edges and the rest pass through."""
        edges = args[0] if args else kwargs.get("edge_index")
        self.check_graph(x, edges)
        return super().forward(x, *args, **kwargs)

    def check_graph(self, x: Any, edges: Any) -> None:
        """Refuse folded rows that are not a union of equal graphs of the active adapters' nodes.

        Raises:
            ValueError: If an edge joins two graphs.
        """
        if not self.disable_adapters and isinstance(edges, Tensor) and edges.dtype == torch.long:
            self._check_union(x, edges)

    def _root(self, x: Any) -> Tensor:
        """Features of the receiving nodes."""
        root = x[-1] if isinstance(x, (tuple, list)) else x
        if root is None:
            raise ValueError(
                message(
                    f"stlora layer '{self.name}' cannot read its input",
                    expected="features of the receiving nodes",
                    got="a pair whose second part is None",
                    fix="give features of these nodes too, or leave the layer out with exclude_modules",
                )
            )
        return cast(Tensor, root)

    def _check_union(self, x: Any, edge_index: Tensor) -> None:
        for name in self.active_adapters:
            if self.conditioning.get(name, "shared") == "shared":
                continue
            layout, num_nodes, shape = self.layout.get(name), self.num_nodes[name], self._root(x).shape
            if layout is not None and layout.fits(shape, num_nodes):
                edges = edge_index
                if layout.node_fastest and isinstance(x, (tuple, list)):
                    edges = _renumbered(edges, x[0].shape[-2] * num_nodes // shape[-2], num_nodes)
                where = f"stlora adapter '{name}' on '{self.name}'"
                check_union(edges, shape[-2], num_nodes, layout, where)


class STLoraChebConv(STLoraGraphConv):
    """``ChebConv``: the update is one of the order-0 weight ``lins[0]``, and a shared one merges into it."""

    mergeable = True

    def _root_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, cast(Any, self.get_base_layer()).lins[0].weight)


class STLoraSAGEConv(STLoraGraphConv):
    """``SAGEConv``: the update is one of the root weight ``lin_r``, and a shared one merges into it where there is."""

    mergeable = True

    def merge_refusal(self, adapter_name: str) -> str | None:
        """As of any layer, and without a root weight there is nothing to merge into."""
        if not self.get_base_layer().root_weight:
            return "SAGEConv(root_weight=False) has no weight that equals the update"
        return super().merge_refusal(adapter_name)

    def _root_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, cast(Any, self.get_base_layer()).lin_r.weight)


class STLoraRGCNConv(STLoraGraphConv):
    """``RGCNConv`` and ``FastRGCNConv``: the update is one of ``root``, and a shared one merges into it."""

    mergeable = True

    def merge_refusal(self, adapter_name: str) -> str | None:
        """As of any layer, and without a root weight there is nothing to merge into."""
        if self.get_base_layer().root is None:
            return "RGCNConv(root_weight=False) has no weight that equals the update"
        return super().merge_refusal(adapter_name)

    def _root_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.get_base_layer().root)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Dense update, input above output as ``root`` has it."""
        return super().get_delta_weight(adapter_name).mT


class STLoraDiffusionConv(STLoraGraphConv):
    """``DConv`` and ``BatchedDConv``: the update is one of the order-0 weight ``weight[0, 0]``."""

    mergeable = True

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Dense update of the whole weight: zero but for order 0 of the first direction."""
        delta = super().get_delta_weight(adapter_name)
        whole = torch.zeros_like(self._root_weight(), dtype=delta.dtype)
        whole[0, 0] = delta.mT
        return whole


class STLoraGatedGraphConv(STLoraGraphConv):
    """``GatedGraphConv``: the update reads the input as the layer does, padded with zeros to its own width."""

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        width = _target(base_layer.out_channels)
        return (width,), width

    def _root(self, x: Any) -> Tensor:
        return F.pad(x, (0, self.out_features - x.shape[-1]))


class STLoraAttentionConv(STLoraGraphConv):
    """``ChebConvAttention`` of torch-geometric-temporal, which keeps its widths to itself."""

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        conv = cast(Any, base_layer)
        return (int(conv._in_channels),), int(conv._out_channels)


class STLoraAdaptiveConv(STLoraGraphConv):
    r"""``AVWGCN`` of torch-geometric-temporal, whose weight depends on the node already.

    It is :math:`W_i = e_i \cdot \mathrm{pool}` for the node's vector :math:`e_i`, of which the pool is frozen and the
    vector trained as node-bound. The update adds a root term that is no product with :math:`e_i`.
    """

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        _, _, in_features, out_features = cast(Tensor, base_layer.weights_pool).shape
        return (int(in_features),), int(out_features)


def _renumbered(edge_index: Tensor, num_sources: int, num_nodes: int) -> Tensor:
    """Edges between two types of nodes, the sources of each graph numbered as if there were ``num_nodes`` of them."""
    return torch.stack([edge_index[0] // max(num_sources, 1) * num_nodes, edge_index[1]])


def _target(channels: Any) -> int:
    """Width of the target features, where a layer has one for the source too."""
    return int(channels[-1] if isinstance(channels, (tuple, list)) else channels)
