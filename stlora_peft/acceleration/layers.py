"""Change the class of layers in place, and back."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from stlora_peft.acceleration.fast import Fast
from stlora_peft.backbones.graphs import check_graph
from stlora_peft.errors import message
from stlora_peft.tuner.bare_layers import STLoraGCLSTM

_PYG = "torch_geometric.nn.conv"
_TGT = "torch_geometric_temporal.nn"
_logger = logging.getLogger(__name__)

# By name, so that neither package is imported for it: file of this room and class in it.
FAST: Final[Mapping[str, tuple[str, str]]] = {
    f"{_PYG}.cheb_conv.ChebConv": ("convolutions", "FastChebConv"),
    f"{_PYG}.gcn_conv.GCNConv": ("convolutions", "FastGCNConv"),
    f"{_PYG}.graph_conv.GraphConv": ("convolutions", "FastGraphConv"),
    f"{_PYG}.sage_conv.SAGEConv": ("convolutions", "FastSAGEConv"),
    f"{_PYG}.gated_graph_conv.GatedGraphConv": ("convolutions", "FastGatedGraphConv"),
    f"{_TGT}.recurrent.gconv_gru.GConvGRU": ("chebyshev_cells", "FastGConvGRU"),
    f"{_TGT}.recurrent.gconv_lstm.GConvLSTM": ("chebyshev_cells", "FastGConvLSTM"),
    f"{_TGT}.recurrent.gc_lstm.GCLSTM": ("chebyshev_cells", "FastGCLSTM"),
    f"{_TGT}.recurrent.dcrnn.DConv": ("diffusion", "FastDConv"),
    f"{_TGT}.recurrent.dcrnn.BatchedDConv": ("diffusion", "FastBatchedDConv"),
    f"{_TGT}.recurrent.dcrnn.DCRNN": ("diffusion", "FastDCRNN"),
    f"{_TGT}.recurrent.dcrnn.BatchedDCRNN": ("diffusion", "FastBatchedDCRNN"),
    f"{_TGT}.recurrent.temporalgcn.TGCN": ("temporal", "FastTGCN"),
    f"{_TGT}.recurrent.temporalgcn.TGCN2": ("temporal", "FastTGCN2"),
    f"{_TGT}.recurrent.attentiontemporalgcn.A3TGCN": ("temporal", "FastA3TGCN"),
    f"{_TGT}.recurrent.attentiontemporalgcn.A3TGCN2": ("temporal", "FastA3TGCN2"),
    f"{_TGT}.attention.stgcn.STConv": ("blocks", "FastSTConv"),
    f"{_TGT}.attention.stgcn.TemporalConv": ("blocks", "FastTemporalConv"),
    f"{_TGT}.attention.mstgcn.MSTGCNBlock": ("blocks", "FastMSTGCNBlock"),
    f"{_TGT}.attention.astgcn.ASTGCNBlock": ("blocks", "FastASTGCNBlock"),
    f"{_TGT}.attention.astgcn.ChebConvAttention": ("blocks", "FastChebConvAttention"),
    "stlora_peft.backbones.recurrent.diffusion_conv.DiffusionConv": ("diffusion", "FastDiffusionConv"),
}


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` changed.

    Args:
        backbone: The network.
        replaced: Name of each layer that was changed, and the name of its class.
    """

    backbone: nn.Module
    replaced: Mapping[str, str]

    def undo(self) -> None:
        """Give every layer its own class back; see :func:`decelerate`."""
        decelerate(self.backbone)

    def __str__(self) -> str:
        """One line for each class."""
        kinds = list(self.replaced.values())
        lines = (f"{kind}: {kinds.count(kind)}" for kind in sorted(set(kinds)))
        return "\n".join(lines) or "nothing to accelerate"


def accelerate(
    backbone: nn.Module,
    edge_index: Tensor | None = None,
    edge_weight: Tensor | None = None,
    *,
    cells: bool = True,
) -> Acceleration:
    """Make the graph layers of a network fast, in place, without a change of its numbers beyond rounding.

    The layers of PyG and torch-geometric-temporal normalise their graph anew in every call and gather a row of
    features for every edge. Those that are known here keep the matrix of the last graph instead and multiply with
    it; a graph of other values is noticed and its matrix computed. Layers change their class, not their parameters:
    state dict, ``isinstance`` and adapters, put on before or after, stay as they are. Copies and pickles of the
    network are fast too, without what was kept. Calling it twice does no more than calling it once.

    Args:
        backbone: The network, with or without adapters.
        edge_index: Graph that it is going to see, source above target, to be checked now; optional.
        edge_weight: Weights of the edges; optional.
        cells: Replace also what computes several layers together only as long as none of them has an adapter
            (``TGCN``, ``A3TGCN``, ``DCRNN`` and their relatives, and blocks), so that an untrained adapter changes the
            last digits of a forecast.

    Returns:
        What was replaced, with a method ``undo``.

    Raises:
        ValueError: If the graph that is given is none.

    Example:
        >>> from torch_geometric.nn import GCNConv
        >>> print(accelerate(nn.Sequential(GCNConv(2, 4), nn.ReLU())))
        GCNConv: 1
    """
    if edge_index is not None:
        _check(edge_index, edge_weight)
    replaced = {}
    for name, layer in _layers(backbone):
        fast = _fast(layer)
        if fast is not None and (cells or not fast.is_cell):
            replaced[name] = type(layer).__name__
            fast.replace(layer)
    result = Acceleration(backbone, replaced)
    _logger.info("accelerated %d layers of %s: %s", len(replaced), type(backbone).__name__, result)
    return result


def decelerate(backbone: nn.Module) -> None:
    """Give every layer that :func:`accelerate` changed its own class back, in place.

    Args:
        backbone: The network, or a copy of it.

    Example:
        >>> from torch_geometric.nn import GCNConv
        >>> layer = GCNConv(2, 4)
        >>> _ = accelerate(layer)
        >>> decelerate(layer)
        >>> type(layer) is GCNConv
        True
    """
    for _, layer in _layers(backbone):
        if isinstance(layer, Fast):
            layer.restore()


def _layers(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All layers with their names, among them the cells that an adapter took the place of."""
    for name, layer in backbone.named_modules():
        yield name, layer
        if isinstance(layer, STLoraGCLSTM):
            yield name, layer.cell


def _fast(layer: nn.Module) -> type[Fast] | None:
    """The fast class of a layer, or None. Classes derived from a known one may differ from it in anything."""
    kind = type(layer)
    file, name = FAST.get(f"{kind.__module__}.{kind.__qualname__}", (None, ""))
    if file is None or "forward" in vars(layer):
        return None
    found: type[Fast] = getattr(importlib.import_module(f"stlora_peft.acceleration.{file}"), name)
    return found


def _check(edge_index: Tensor, edge_weight: Tensor | None) -> None:
    """Refuse what is no graph."""
    try:
        size = int(edge_index.max()) + 1 if edge_index.numel() else 0
    except (AttributeError, TypeError):
        raise ValueError(
            message(
                "accelerate: the graph cannot be read",
                expected="edge_index, a tensor of shape (2, E)",
                got=f"a {type(edge_index).__name__}",
                fix="give the graph as the network takes it, or leave it out",
            )
        ) from None
    check_graph(edge_index, edge_weight, size)
