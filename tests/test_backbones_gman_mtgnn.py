"""GMAN and MTGNN against formulas and torch-geometric-temporal, with what is mended there."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any

import pytest
import torch
from torch import Tensor

from stlora_peft.backbones import tgt
from stlora_peft.backbones.attention import gman, mtgnn
from stlora_peft.backbones.clock import time_rows
from stlora_peft.data.windows import time_encoding

UPSTREAM: Any = tgt.load().nn.attention
N, B, T = 6, 2, 5
EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 0]])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# -- GMAN ---------------------------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention between the rows of each head, ``[rows width]``."""
    parts = []
    for q, k, v in zip(*(part.chunk(heads, 1) for part in (query, key, value)), strict=True):
        parts.append((q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("over", ["nodes", "steps"])
def test_gman_attention_has_the_heads_asked_for(over: str) -> None:
    network = gman.Network(1, 2, 4, 1, 1, T, T + 3).double().eval()
    block = network._st_att_block1[0]
    attention = block._spatial_attention if over == "nodes" else block._temporal_attention
    h, e = randn(B, T, N, 8), randn(B, T, N, 8)
    query, key, value = (getattr(attention, f"_fully_connected_{p}")(torch.cat([h, e], -1)) for p in "qkv")
    expected = torch.empty_like(h)
    for b in range(B):
        rows = range(T) if over == "nodes" else range(N)
        for r in rows:
            at = (b, r) if over == "nodes" else (b, slice(None), r)
            expected[at] = attend(query[at], key[at], value[at], heads=2)
    same(attention(h, e), attention._fully_connected(expected))
    name = "SpatialAttention" if over == "nodes" else "TemporalAttention"
    theirs = getattr(UPSTREAM.gman, name)(2, 4, 0.1, *([] if over == "nodes" else [False])).double().eval()
    theirs.load_state_dict(attention.state_dict())
    assert (theirs(h, e) - attention(h, e)).abs().max() > 1e-4  # four heads of two
    theirs._K = 4  # by which it divides the width
    same(theirs(h, e), attention(h, e))


@pytest.mark.parametrize(("kind", "minutes"), [("day", 60), ("week", 60), ("week", 120)])
def test_time_rows_mark_the_hours_and_days_of_window_and_horizon(kind: Any, minutes: int) -> None:
    start = datetime(2024, 1, 7, 20)  # a Sunday
    clock = time_encoding(12, minutes, start, kind)
    rows = time_rows(clock[None, :3], 9, 24)
    hours = [20 + minutes // 60 * step for step in range(12)]
    assert rows[0, :, -24:].argmax(1).tolist() == [hour % 24 for hour in hours]
    assert rows.sum(2).eq(1 if kind == "day" else 2).all()
    if kind == "week":
        assert rows[0, :, :7].argmax(1).tolist() == [(6 + hour // 24) % 7 for hour in hours]


def test_time_rows_mark_no_day_of_the_week_where_none_is_known() -> None:
    rows = time_rows(time_encoding(4, 60, None, "week")[None], 2, 24)
    assert rows[..., :7].sum() == 0
    assert rows[0, :, 7:].argmax(1).tolist() == [0, 1, 2, 3, 4, 5]


def test_time_rows_of_a_single_step_go_on_slot_by_slot_and_without_encodings_count() -> None:
    assert time_rows(torch.tensor([[[1.0, 0.0]]]), 2, 24).argmax(2).tolist() == [[6, 7, 8]]
    assert torch.equal(time_rows(torch.zeros(2, 3, 0), 2, 24), torch.eye(5).expand(2, 5, 5))


def test_gman_forecast_depends_on_the_time_of_day_and_not_on_the_edges() -> None:
    model = gman.GMAN(num_nodes=N, in_channels=5, window=T, time_features="week", steps_per_day=24).eval()
    clock = time_encoding(40, 60, datetime(2024, 1, 7), "week")
    x = torch.randn(1, T, N, 1)
    morning, evening = (torch.cat([x, clock[at : at + T, None].expand(1, T, N, 4)], -1) for at in (6, 18))
    assert (model(morning, EDGES) - model(evening, EDGES)).abs().max() > 1e-4
    assert torch.equal(model(morning, EDGES), model(morning, EDGES[:, :0]))


def test_gman_time_features_that_do_not_fit_are_refused() -> None:
    unknown = "backbone 'gman': time_features is unknown.\n  expected: one of 'none', 'day', 'week'"
    with pytest.raises(ValueError, match=re.escape(unknown)):
        gman.GMAN(num_nodes=N, in_channels=5, time_features="hour")
    few = "backbone 'gman': too few input channels for time_features='week'.\n  expected: in_channels >= 5: values"
    with pytest.raises(ValueError, match=re.escape(few)):
        gman.GMAN(num_nodes=N, in_channels=4, time_features="week")
    assert gman.GMAN(num_nodes=N, in_channels=1, time_features="none").values == 1


# -- MTGNN --------------------------------------------------------------------------------------------------


def test_learned_graph_equals_torch_geometric_temporal_where_no_scores_tie() -> None:
    ours, theirs = mtgnn.LearnedGraph(N, 3, 4, 0.3), UPSTREAM.GraphConstructor(N, 3, 4, 0.3)
    theirs.load_state_dict(ours.state_dict())
    same(ours(torch.zeros(N, N)), theirs(torch.arange(N)), 0)


def test_learned_graph_of_saturated_scores_follows_the_nodes() -> None:
    graph, order = mtgnn.LearnedGraph(207, 20, 40), torch.randperm(207)
    edges = graph(torch.zeros(207, 207))
    theirs = UPSTREAM.GraphConstructor(207, 20, 40, 3.0)
    theirs.load_state_dict(graph.state_dict())
    assert (theirs(order) - theirs(torch.arange(207))[order][:, order]).abs().max() == 1  # an edge or none
    for table in (graph._embedding1, graph._embedding2):
        table.weight.data = table.weight.data[order]
    moved = graph(torch.zeros(207, 207))
    assert ((moved - edges[order][:, order]).abs() > 1e-4).sum() == 0


def test_learned_graph_of_fewer_nodes_than_neighbours_and_in_float64() -> None:
    for size in (1, 3):
        edges = mtgnn.LearnedGraph(size, 20, 4).double()(torch.zeros(size, size))
        assert edges.shape == (size, size)
        assert edges.dtype == torch.float64
    with pytest.raises(RuntimeError, match="out of range"):
        UPSTREAM.GraphConstructor(3, 20, 4, 3.0)(torch.arange(3))


def test_learned_graph_of_another_city_has_edges_and_gradients() -> None:
    graph = mtgnn.LearnedGraph(N, 3, 4)
    graph._embedding1, graph._embedding2 = graph._embedding1.resized(9), graph._embedding2.resized(9)
    graph(torch.zeros(9, 9)).sum().backward()
    assert graph._embedding1.weight.grad.abs().sum() > 0
    assert not torch.equal(graph._embedding1.weight[:, 0], graph._embedding2.weight[:, 0])


def test_mtgnn_on_the_road_graph_hears_along_and_against_it_and_fits_any_number_of_nodes() -> None:
    model = mtgnn.MTGNN(num_nodes=N, in_channels=1, window=T, learned_graph=False, num_layers=1, depth=1).eval()
    x, chain = torch.randn(1, T, 9, 1), torch.tensor([[0, 1, 2], [1, 2, 3]])
    layer, seen = model.network._mtgnn_layers[0], []
    for part in (layer._mixprop_conv1, layer._mixprop_conv2):
        part.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    assert model(x, chain, torch.tensor([1.0, 2.0, 3.0])).shape == (1, 12, 9, 1)
    assert seen[0].nonzero().tolist() == [[1, 0], [2, 1], [3, 2]]  # a row holds what a node hears
    assert seen[0][seen[0] > 0].tolist() == [1, 2, 3]
    assert torch.equal(seen[1], seen[0].T)


@pytest.mark.parametrize(
    ("change", "text"),
    [({"hidden_channels": 6}, "give hidden_channels=8"), ({"dropout": 1.0}, "expected: 0 <= dropout < 1")],
)
def test_mtgnn_arguments_out_of_range_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=rf"^backbone 'mtgnn': {next(iter(change))} out of range(.|\n)*{text}"):
        mtgnn.MTGNN(num_nodes=N, in_channels=1, **change)
