"""Every layer that can be accelerated, small, with a call that runs it over batch and time, and graphs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.graphs import union

gnn = pytest.importorskip("torch_geometric.nn")
recurrent, attention = tgt.load().nn.recurrent, tgt.load().nn.attention

B, T, N, C, F = 2, 6, 11, 3, 5
Graph = tuple[Tensor, Tensor | None]


def directed(seed: int = 0, count: int = 30) -> Graph:
    """Random weighted directed graph with self-loops and parallel edges, and a node that no edge touches."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(0, N - 2, (2, count), generator=generator)
    ring = torch.stack([torch.arange(N - 1), torch.arange(1, N) % (N - 1)])
    edges = torch.cat([random, random[:, :4], ring, torch.tensor([[2, 3], [2, 3]])], 1)
    return edges, torch.rand(edges.shape[1], generator=generator) + 0.1


def simple(seed: int = 0, count: int = 30) -> Graph:
    """The same with every edge once."""
    edges = directed(seed, count)[0].unique(dim=1)
    edges = edges[:, torch.randperm(edges.shape[1], generator=torch.Generator().manual_seed(seed))]
    return edges, torch.rand(edges.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.1


GRAPHS: dict[str, Callable[[], Graph]] = {
    "directed": directed,
    "crowded": lambda: directed(1, 120),
    "simple": simple,
    "no weights": lambda: (simple(2)[0], None),
    "no edges": lambda: (torch.empty(2, 0, dtype=torch.long), None),
}


@dataclass(frozen=True)
class Case:
    """A layer, how it is run on ``x`` of ``[b t n c]``, and the graphs that the original can take.

    ``double`` says whether the original runs in double precision; ``tolerance`` is wider where it is itself that far
    from double precision: one number that passes zero before a ``relu`` changes a gradient that much.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
    graphs: tuple[str, ...] = ("directed", "crowded", "simple", "no weights", "no edges")
    double: bool = True
    tolerance: float = 1e-5


def conv(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
    return layer(x, edges) if weight is None else layer(x, edges, weight)


def unweighted(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
    return layer(x, edges)


def rows(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
    folded = x.flatten(0, 2)
    if weight is None:
        return layer(folded, union(edges, edges[0], B * T, N)[0])
    return layer(folded, *union(edges, weight, B * T, N))


def one_graph_rows(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
    return torch.stack([layer(step, edges, weight) for step in x[0]])


def cell(num_states: int, fold: bool = False) -> Callable[..., Tensor]:
    def run(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
        steps = x.transpose(0, 1)  # [t b n c]
        graph: tuple[Tensor, Tensor | None] = (edges, weight)
        if fold:
            steps = steps.flatten(1, 2)
            graph = union(edges, edges[0] if weight is None else weight, B, N)
            graph = (graph[0], None) if weight is None else graph
        state: tuple[Tensor, ...] = (x.new_zeros(*steps.shape[1:-1], F),) * num_states
        for step in steps:
            after = layer(step, *graph, *state)
            state = after if isinstance(after, tuple) else (after,)
        return torch.cat(state)

    return run


def first_step(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
    after = layer(x[0, 0], edges, weight)
    return after[0] if isinstance(after, tuple) else after


def periods(fold: bool, state: bool = False) -> Callable[..., Tensor]:
    def run(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
        x = x[0].permute(1, 2, 0) if fold else x.permute(0, 2, 3, 1)  # [b n c t]
        before = x.mean((-1, -2), keepdim=True)[..., 0].expand(*x.shape[:-2], F) if state else None
        return layer(x, edges, weight, before)

    return run


def sequence(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
    return layer(x, edges, weight)


def each_step(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
    return layer(x.permute(0, 2, 3, 1), [edges] * x.shape[1])


def static(layer: nn.Module, x: Tensor, edges: Tensor, weight: Tensor | None) -> Tensor:
    return layer(x.permute(0, 2, 3, 1), edges)


LOOSE = 1e-3
EDGES = ("directed", "crowded", "simple", "no weights")
WEIGHTS = ("directed", "crowded", "simple")

CASES: dict[str, Case] = {
    "ChebConv": Case(lambda: gnn.ChebConv(C, F, 3), conv, EDGES),
    "ChebConv rw": Case(lambda: gnn.ChebConv(C, F, 2, normalization="rw", bias=False), conv, EDGES),
    "GCNConv": Case(lambda: gnn.GCNConv(C, F), conv),
    "GCNConv narrowing": Case(lambda: gnn.GCNConv(C, 2, improved=True, bias=False), conv),
    "GCNConv cached": Case(lambda: gnn.GCNConv(C, F, cached=True), conv),
    "GCNConv plain": Case(lambda: gnn.GCNConv(C, F, normalize=False), conv),
    "GCNConv no loops": Case(lambda: gnn.GCNConv(C, F, add_self_loops=False), conv),
    "GCNConv union": Case(lambda: gnn.GCNConv(C, F), rows),
    "GraphConv": Case(lambda: gnn.GraphConv(C, F), conv),
    "GraphConv mean": Case(lambda: gnn.GraphConv(C, F, aggr="mean"), conv),
    "SAGEConv": Case(lambda: gnn.SAGEConv(C, F), unweighted),
    "SAGEConv sum": Case(lambda: gnn.SAGEConv(C, F, aggr="sum", root_weight=False, normalize=True), unweighted),
    "SAGEConv project": Case(lambda: gnn.SAGEConv(C, F, project=True), unweighted),
    "GatedGraphConv": Case(lambda: gnn.GatedGraphConv(F, 2), rows),
    "DConv": Case(lambda: recurrent.dcrnn.DConv(C, F, 3), one_graph_rows, ("simple", "no weights"), double=False),
    "BatchedDConv": Case(lambda: recurrent.dcrnn.BatchedDConv(C, F, 4), rows, WEIGHTS, double=False),
    "DCRNN": Case(lambda: recurrent.DCRNN(C, F, 2), cell(1, fold=True), ("simple", "no weights"), double=False),
    "BatchedDCRNN": Case(lambda: recurrent.BatchedDCRNN(C, F, 2), sequence, WEIGHTS, double=False),
    "BatchedDCRNN K=1": Case(lambda: recurrent.BatchedDCRNN(C, F, 1), sequence, WEIGHTS, double=False),
    "BatchedDCRNN K=3": Case(lambda: recurrent.BatchedDCRNN(C, F, 3), sequence, WEIGHTS, double=False),
    "GConvGRU": Case(lambda: recurrent.GConvGRU(C, F, 3), cell(1), EDGES),
    "GConvGRU union": Case(lambda: recurrent.GConvGRU(C, F, 2, bias=False), cell(1, fold=True), EDGES),
    "GConvGRU first": Case(lambda: recurrent.GConvGRU(C, F, 2), first_step, EDGES, double=False),
    "GConvLSTM": Case(lambda: recurrent.GConvLSTM(C, F, 3), cell(2), EDGES),
    "GCLSTM": Case(lambda: recurrent.GCLSTM(C, F, 3), cell(2), EDGES),
    "TGCN": Case(lambda: recurrent.TGCN(C, F), cell(1, fold=True)),
    "TGCN first": Case(lambda: recurrent.TGCN(C, F, improved=True), first_step, double=False),
    "TGCN2": Case(lambda: recurrent.TGCN2(C, F, B), cell(1)),
    "TGCN2 cached": Case(lambda: recurrent.TGCN2(C, F, B, cached=True), cell(1)),
    "A3TGCN": Case(lambda: recurrent.A3TGCN(C, F, T), periods(fold=True), double=False),
    "A3TGCN state": Case(lambda: recurrent.A3TGCN(C, F, T), periods(fold=True, state=True)),
    "A3TGCN2": Case(lambda: recurrent.A3TGCN2(C, F, T, B), periods(fold=False), double=False),
    "A3TGCN2 state": Case(lambda: recurrent.A3TGCN2(C, F, T - 1, B), periods(fold=False, state=True)),
    "MPNNLSTM": Case(lambda: recurrent.MPNNLSTM(C, F, N, T, 0.0), rows, WEIGHTS, tolerance=LOOSE),
    "STConv": Case(lambda: attention.stgcn.STConv(N, C, F, 4, 3, 3), sequence, EDGES),
    "MSTGCN": Case(lambda: attention.mstgcn.MSTGCN(2, C, 3, F, F, 1, 4, T), each_step, WEIGHTS, tolerance=1e-3),
    "MSTGCN static": Case(lambda: attention.mstgcn.MSTGCN(1, C, 3, F, F, 1, 4, T), static, WEIGHTS, tolerance=LOOSE),
    "ASTGCN": Case(lambda: attention.astgcn.ASTGCN(2, C, 3, F, F, 1, 4, T, N), each_step, WEIGHTS, tolerance=1e-3),
    "ASTGCN sym": Case(lambda: attention.astgcn.ASTGCN(1, C, 2, F, F, 2, 4, T, N, "sym", False), static, EDGES),
}
