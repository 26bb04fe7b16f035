"""ASTGCN, MSTGCN, AAGCN and DNNTSP against formulas and torch-geometric-temporal, with what is mended there."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stlora_peft.backbones import tgt
from stlora_peft.backbones.attention import aagcn, astgcn, dnntsp, mstgcn
from stlora_peft.backbones.graphs import dense_graph

UPSTREAM: Any = tgt.load().nn.attention
N, B, T = 6, 2, 5
EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 0]])  # directed; nodes 4 and 5 are isolated
WEIGHTS = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
CYCLE = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# -- ASTGCN -------------------------------------------------------------------------------------------------


def laplacian_by_loops() -> Tensor:
    """Scaled symmetric Laplacian less the identity, ``-D^(-1/2) A D^(-1/2)``, source above target."""
    matrix, degree = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for (s, _), w in zip(EDGES.T.tolist(), WEIGHTS, strict=True):
        degree[s] += w
    for (s, t), w in zip(EDGES.T.tolist(), WEIGHTS, strict=True):
        matrix[s, t] -= w / (degree[s] * degree[t]).sqrt()
    return matrix


def test_chebconv_attention_equals_its_formula() -> None:
    conv = astgcn.ChebConvAttention(3, 2, K=4).double()
    x, attention = randn(B, T, N, 3), torch.rand(B, N, N, dtype=torch.float64).softmax(1)
    first = laplacian_by_loops()
    terms = [torch.eye(N, dtype=torch.float64), first]
    terms += [2 * first @ terms[1] - terms[0]]
    terms += [2 * first @ terms[2] - terms[1]]
    expected = torch.zeros(B, T, N, 2, dtype=torch.float64) + conv._bias
    for b in range(B):
        for i in range(N):
            for k, term in enumerate(terms):
                heard = sum(term[j, i] * attention[b, j, i] * x[b, :, j] for j in range(N))
                expected[b, :, i] += heard @ conv._weight[k]
    same(conv(x, EDGES, attention, WEIGHTS), expected)


def test_astgcn_block_without_neighbours_equals_torch_geometric_temporal() -> None:
    ours = astgcn.Block(3, 4, 1, 2, N, T).double()
    theirs = UPSTREAM.astgcn.ASTGCNBlock(3, 1, 4, 4, 2, N, T, "sym").double()
    theirs.load_state_dict(ours.state_dict())
    x = randn(B, T, N, 3)
    expected = theirs(x.permute(0, 2, 3, 1), EDGES)  # [b n c t]
    same(ours(x, EDGES, None), expected.permute(0, 3, 1, 2))


def impulse(conv: nn.Module, attention: float, *axes: int) -> Tensor:
    """What each node of a cycle hears when node 0 alone says one, with a single weight of one at order 1."""
    conv._weight.data = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    conv._bias.data.zero_()
    x = torch.eye(4)[0].view(*axes, 4, 1)
    return conv(x, CYCLE, torch.full((1, 4, 4), attention)).detach().flatten()


def test_chebconv_attention_hears_along_the_edges_and_weighs_once() -> None:
    assert impulse(astgcn.ChebConvAttention(1, 1, 2), 0.1, 1, 1).tolist() == pytest.approx([0, -0.1, 0, 0])
    theirs = UPSTREAM.astgcn.ChebConvAttention(1, 1, 2, "sym")
    assert impulse(theirs, 0.1, 1).tolist() == pytest.approx([0, 0, 0, -0.01])  # against the edges, and twice


@pytest.mark.parametrize("model", [astgcn.ASTGCN, mstgcn.MSTGCN])
def test_time_stride_that_does_not_divide_the_window_fits(model: Any) -> None:
    nodes = {"num_nodes": N} if model is astgcn.ASTGCN else {}
    small = model(in_channels=1, window=13, hidden_channels=4, time_stride=2, **nodes)
    assert small(torch.zeros(1, 13, N, 1), EDGES).shape == (1, 12, N, 1)
    theirs = UPSTREAM.ASTGCN(2, 1, 2, 4, 4, 2, 12, 13, N, "sym")
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        theirs(torch.zeros(1, N, 1, 13), EDGES)


# -- MSTGCN -------------------------------------------------------------------------------------------------


def test_mstgcn_blocks_equal_torch_geometric_temporal_given_a_graph_for_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = mstgcn.Block(3, 4, 3, 2).double(), UPSTREAM.mstgcn.MSTGCNBlock(3, 3, 4, 4, 2).double()
    theirs.load_state_dict(ours.state_dict())
    theirs._cheb_conv.normalization = "sym"
    two = type("Two", (), {"__call__": lambda self, data: setattr(data, "lambda_max", 2.0) or data})
    monkeypatch.setattr(UPSTREAM.mstgcn, "LaplacianLambdaMax", two)
    x = randn(B, T, N, 3)
    series = x.permute(0, 2, 3, 1)  # [b n c t]
    expected = ours(x, EDGES, None).permute(0, 2, 3, 1)
    same(theirs(series, [EDGES] * T), expected)
    theirs_static = UPSTREAM.mstgcn.MSTGCNBlock(3, 3, 4, 4, 1).double()
    theirs_static._cheb_conv.normalization = "sym"
    mixed = theirs_static(series, EDGES) - theirs_static(series, [EDGES] * T)
    assert mixed.abs().max() > 0.1  # samples, nodes and steps


def test_mstgcn_without_edges_is_finite_where_torch_geometric_temporal_fails() -> None:
    empty = EDGES[:, :0]
    assert mstgcn.MSTGCN(in_channels=1)(torch.zeros(1, 12, N, 1), empty).isfinite().all()
    theirs = UPSTREAM.MSTGCN(1, 1, 2, 4, 4, 1, 12, 12)
    with pytest.raises(Exception, match="ARPACK error -9"):
        theirs(torch.zeros(1, N, 1, 12), [empty] * 12)


# -- AAGCN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "nodes"), [(3, 5), (8, 6)])
def test_aagcn_unit_equals_torch_geometric_temporal_on_the_same_graph(width: int, nodes: int) -> None:
    graphs, ours = randn(3, nodes, nodes), aagcn.GraphUnit(width, 8, nodes).double()
    nn.init.normal_(ours.alpha)
    nn.init.normal_(ours.shift.weight)
    nn.init.normal_(ours.bn.weight)
    theirs = UPSTREAM.tsagcn.UnitGCN(width, 8, (graphs + ours.shift.weight).detach()).double()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "shift.weight"}, strict=False)
    x = randn(B, width, T, nodes)
    same(ours(x, graphs), theirs(x))


def test_aagcn_graphs_are_those_of_torch_geometric_temporal_also_where_the_last_node_is_isolated() -> None:
    model, seen = aagcn.AAGCN(num_nodes=4, in_channels=1, window=T, hidden_channels=4), []
    model.block1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(torch.zeros(1, T, 4, 1), CYCLE[:, :3])
    expected = UPSTREAM.GraphAAGCN(CYCLE[:, :3], 4).A
    assert torch.equal(seen[0], expected)
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        UPSTREAM.GraphAAGCN(CYCLE[:, :2], 4)
    model(torch.zeros(1, T, 4, 1), CYCLE[:, :2])
    assert seen[1][:, 3].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(AttributeError, match="Can't pickle local object"):
        pickle.dumps(UPSTREAM.AAGCN(4, 4, CYCLE, 4))


def test_aagcn_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_channels >= 4"):
        aagcn.AAGCN(num_nodes=N, in_channels=1, hidden_channels=3)


# -- DNNTSP -------------------------------------------------------------------------------------------------


def test_dnntsp_equals_its_formula() -> None:
    model = dnntsp.DNNTSP(num_nodes=N, in_channels=3, window=T, horizon=4, hidden_channels=4, heads=2).double().eval()
    x = randn(B, T, N, 3)
    steps = torch.stack([model.stacked_gcn(model.encoder(x[:, t]), EDGES, WEIGHTS) for t in range(T)], 1)
    expected = torch.empty(B, 4, N, 1, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            rows, states = steps[b, :, n], torch.zeros(T, 4, dtype=torch.float64)
            weights = (model.attention.Wq, model.attention.Wk, model.attention.Wv)
            for q, k, v in zip(*(weight(rows).chunk(2, 1) for weight in weights), strict=True):
                for t in range(T):
                    scores = (k[: t + 1] @ q[t] / 2).softmax(0)
                    states[t] += scores @ v[: t + 1] / 2
            summed = sum((model.aggregate.Wq(state) * state for state in states), torch.zeros(4))
            gate = model.gate.alpha[n]
            vector = (1 - gate) * model.gate.vectors[n] + gate * summed
            expected[b, :, n, 0] = x[b, -1, n, 0] + model.head(vector)
    same(model(x, EDGES, WEIGHTS), expected)


def test_dnntsp_isolated_node_moves_no_other_and_nothing_is_printed() -> None:
    model = dnntsp.DNNTSP(num_nodes=N, in_channels=1, window=T, hidden_channels=4).eval()
    theirs, printed = UPSTREAM.DNNTSP(N, 4, 2).eval(), io.StringIO()
    x, rows = torch.randn(1, T, N, 1), torch.randn(N, 4)
    changed, moved_rows = x.clone(), copy.deepcopy(rows)
    changed[:, :, 4] += 1
    moved_rows[4] += 1
    moved = (model(x, EDGES) - model(changed, EDGES)).abs().amax((0, 1, 3)) > 1e-6
    assert moved.tolist() == [n == 4 for n in range(N)]
    with contextlib.redirect_stdout(printed):
        moved = (theirs(rows, EDGES) - theirs(moved_rows, EDGES)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [n >= 4 for n in range(N)]  # the nodes with a higher number too
    assert printed.getvalue().count("torch.Size") == 4


def test_dense_graph_sums_parallel_edges() -> None:
    edges = torch.tensor([[0, 0, 1], [1, 1, 2]])
    expected = [[0.0, 5.0, 0.0], [0.0, 0.0, 4.0], [0.0, 0.0, 0.0]]
    assert dense_graph(edges, torch.tensor([2.0, 3.0, 4.0]), torch.zeros(1, 1, 3, 1)).tolist() == expected
