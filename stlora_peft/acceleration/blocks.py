"""torch-geometric-temporal's blocks of convolutions over the graph and along time, all steps at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from stlora_peft.acceleration.convolutions import FastChebConv
from stlora_peft.acceleration.fast import Fast, bare, base_layers, base_of, one_graph, ordinary
from stlora_peft.backbones import stconv, tgt
from stlora_peft.backbones.chebyshev import CachedChebConv
from stlora_peft.backbones.graphs import check_graph
from stlora_peft.backbones.propagation import Propagation
from stlora_peft.tuner.functional import convolve
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.siblings import sibling_updates

if TYPE_CHECKING:  # neither package ships types: this is the part of them that is used here

    class _Block(nn.Module):
        def forward(self, *args: Any) -> Tensor: ...

        def __getattr__(self, name: str) -> Any: ...

    class _TemporalConv(_Block): ...

    class _MSTGCNBlock(_Block): ...

    class _ASTGCNBlock(_Block): ...

    class _ChebConvAttention(_Block): ...
else:
    _nn = tgt.load().nn
    _TemporalConv = _nn.attention.stgcn.TemporalConv
    _MSTGCNBlock = _nn.attention.mstgcn.MSTGCNBlock
    _ASTGCNBlock, _ChebConvAttention = _nn.attention.astgcn.ASTGCNBlock, _nn.attention.astgcn.ChebConvAttention


class FastTemporalConv(Fast, _TemporalConv):
    """``TemporalConv``: its three convolutions are one, and the updates of their adapters too."""

    plain = _TemporalConv

    def forward(self, X: Tensor) -> Tensor:
        """Convolve along time, ``[b t n c]``."""
        layers = (self.conv_1, self.conv_2, self.conv_3)
        convs = None if torch.compiler.is_compiling() else base_layers(layers, nn.Conv2d)
        if convs is None or any(_settings(conv) != _settings(convs[0]) for conv in convs):
            return super().forward(X)
        first, x = convs[0], X.contiguous().permute(0, 3, 2, 1)
        weight = torch.cat([conv.weight for conv in convs])
        bias = None if first.bias is None else torch.cat([conv.bias for conv in convs])
        sums = convolve(x, weight, bias, first.stride, first.dilation)
        update = sibling_updates(layers, x)
        if update is not None:
            sums = sums + update.to(sums.dtype)  # in place on a view, its backward pass would copy all of it
        value, gate, rest = sums.permute(0, 3, 2, 1).chunk(3, -1)
        return (value * gate.sigmoid() + rest).relu()


class FastSTConv(Fast, stconv.STConv):
    """``STConv`` as :class:`stlora_peft.backbones.stconv.STConv` computes it: one call over batch and time."""

    plain = tgt.load().nn.STConv
    is_cell = True

    def forward(self, X: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Run the block over all samples and steps."""
        known = X.ndim == 4 and _takes_any_axes(self._graph_conv)
        block: Any = stconv.STConv if known else self.plain
        out: Tensor = block.forward(self, X, edge_index, edge_weight)
        return out


class FastMSTGCNBlock(Fast, _MSTGCNBlock):
    """``MSTGCNBlock``, given the same graph for each step: one call, and the eigenvalue of the graph once.

    Given one graph that is not in a list, the original mixes samples, nodes and steps, and so does this.
    """

    plain = _MSTGCNBlock
    is_cell = True

    def forward(self, X: Tensor, edge_index: Any) -> Tensor:
        """Run the block, ``[b n c t]``."""
        graph = _graph_of_all_steps(X, edge_index) if isinstance(edge_index, list) else None
        if graph is None or not _takes_any_axes(self._cheb_conv):
            return super().forward(X, edge_index)
        largest = self.kept((graph, X.shape[1]), largest_eigenvalue)
        hidden = self._cheb_conv(X.permute(0, 3, 1, 2), graph, lambda_max=largest).relu()  # [b t n c]
        hidden = self._time_conv(hidden.permute(0, 3, 2, 1)) + self._residual_conv(X.permute(0, 2, 1, 3))
        out: Tensor = self._layer_norm(hidden.relu().permute(0, 3, 2, 1))
        return out.permute(0, 2, 3, 1)


class FastChebConvAttention(Fast, _ChebConvAttention):
    """``ChebConvAttention`` with the graph as a matrix, which the attention is one already."""

    plain = _ChebConvAttention

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        spatial_attention: Tensor,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        lambda_max: Any = None,
    ) -> Tensor:
        """Convolve the features of the nodes over the graph, weighed by the attention."""
        graph = (edge_index, edge_weight, batch, lambda_max)
        if x.ndim != 3 or not self.knows(x, *graph):
            return super().forward(x, edge_index, spatial_attention, *graph[1:])
        return self.convolve(x[..., None], spatial_attention, *graph)[:, :, 0]

    def knows(self, x: Any, *graph: Any) -> bool:
        """Whether matrices can stand for these edges."""
        eigenvalue = graph[-1] is not None or self._normalization == "sym"
        return eigenvalue and one_graph(x, *graph) and ordinary(self)

    def convolve(self, x: Tensor, attention: Tensor, *graph: Any) -> Tensor:
        """Convolve all steps of ``x``, ``[b n c t]``, to ``[b n t c]``."""
        matrix, propagation = self.kept((*graph, self._normalization, x.shape[1], x.dtype), self.matrices)
        rows = x.permute(0, 1, 3, 2).flatten(2)  # [b n (t c)]
        terms = [attention.diagonal(dim1=1, dim2=2)[..., None] * rows]
        for k in range(1, self._weight.shape[0]):
            if k == 1:
                terms.append((matrix * attention) @ terms[0])
            else:
                terms.append(2.0 * propagation.terms(terms[-1], 2)[1] - terms[-2])
        features = torch.cat([term.unflatten(2, (x.shape[3], -1)) for term in terms], -1)
        out: Tensor = features @ self._weight.flatten(0, 1)
        return out if self._bias is None else out + self._bias

    def matrices(
        self,
        edge_index: Tensor,
        edge_weight: Tensor | None,
        batch: Tensor | None,
        lambda_max: Any,
        normalization: str | None,
        num_nodes: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Propagation]:
        """Matrix of the graph with all its zeros, for the product with an attention, and without them."""
        check_graph(edge_index, edge_weight, num_nodes)
        largest = torch.as_tensor(2.0 if lambda_max is None else lambda_max, dtype=dtype, device=edge_index.device)
        edges, norm = self.__norm__(
            edge_index, num_nodes, edge_weight, normalization, largest, dtype=dtype, batch=batch
        )
        matrix = norm.new_zeros(num_nodes, num_nodes).index_put_((edges[0], edges[1]), norm, accumulate=True)
        return matrix, Propagation.build(edges.flip(0), norm, num_nodes)


class FastASTGCNBlock(Fast, _ASTGCNBlock):
    """``ASTGCNBlock``, given one graph for all steps: one convolution, and the eigenvalue of the graph once."""

    plain = _ASTGCNBlock
    is_cell = True

    def forward(self, X: Tensor, edge_index: Any) -> Tensor:
        """Run the block, ``[b n c t]``."""
        graph, conv = _graph_of_all_steps(X, edge_index), self._chebconv_attention
        if graph is None or not bare([conv], FastChebConvAttention):
            return super().forward(X, edge_index)
        largest = None if self._normalization == "sym" else self.kept((graph, X.shape[1]), largest_eigenvalue)
        if not conv.knows(X, graph, None, None, largest):
            return super().forward(X, edge_index)
        steps = X.flatten(1, 2) @ self._temporal_attention(X)
        attention = self._spatial_attention(steps.view_as(X))
        hidden = conv.convolve(X, attention, graph, None, None, largest).relu()  # [b n t c]
        hidden = self._time_convolution(hidden.permute(0, 3, 1, 2)) + self._residual_convolution(X.transpose(1, 2))
        out: Tensor = self._layer_norm(hidden.relu().permute(0, 3, 2, 1))
        return out.permute(0, 2, 3, 1)


def largest_eigenvalue(edge_index: Tensor, num_nodes: int) -> float:
    """Largest eigenvalue of the Laplacian of a graph, as PyG searches it."""
    from torch_geometric.data import Data
    from torch_geometric.transforms import LaplacianLambdaMax

    found: float = LaplacianLambdaMax()(Data(edge_index=edge_index, edge_attr=None, num_nodes=num_nodes)).lambda_max
    return found


def _graph_of_all_steps(X: Tensor, edge_index: Any) -> Tensor | None:
    """The one graph of all steps of ``X``, or None where there are several."""
    graphs = edge_index if isinstance(edge_index, list) else [edge_index]
    if X.ndim != 4 or not graphs or not one_graph(X, graphs[0]):
        return None
    if isinstance(edge_index, list) and len(graphs) != X.shape[3]:
        return None
    first = cast(Tensor, graphs[0])
    same = all(graph is first or (isinstance(graph, Tensor) and torch.equal(graph, first)) for graph in graphs)
    return first if same else None


def _settings(conv: nn.Conv2d) -> tuple[Any, ...]:
    """What convolutions must share to be computed as one, or something unlike any other's."""
    plain = not any(conv._reversed_padding_repeated_twice) and conv.groups == 1
    return conv.weight.shape, conv.stride, conv.dilation, conv.bias is None, plain or conv


def _takes_any_axes(layer: nn.Module) -> bool:
    """Whether a Chebyshev convolution, with an adapter or without, can be called once over batch and time."""
    if isinstance(layer, STLoraLayer):
        free = all(layout.ellipsis for layout in layer.layout.values())
        return free and bare([layer], type(layer)) and bare([base_of(layer)], FastChebConv, CachedChebConv)
    return bare([layer], FastChebConv, CachedChebConv)
