"""Axis patterns: what can be read, where the axes are, and what an error says."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import adapted, graph, raised

from stlora_peft.tuner.layout import check_layout, check_union, infer_layout, layout_readings, parse_layout

EXPECTED = "axis names with one 'n' (nodes) and one 'c' (channels), e.g. 'b t n c' or '(b n) t c'"
FIX = "say where the axes of the layer's input are, e.g. node_layout={'encoder': 'b t n c'}"


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("b t c", "no node axis 'n'"),
        ("b t n", "no channel axis 'c'"),
        ("", "no node axis 'n'"),
        ("...", "no node axis 'n'"),
        ("b n n c", "an axis name that is repeated"),
        ("(b n) n c", "an axis name that is repeated"),
        ("b n (t c)", "a folded channel axis"),
        ("(b n t) c", "a node axis in the middle of a fold"),
        ("b n ... c", "text that is no axis pattern"),
        ("b n c ...", "text that is no axis pattern"),
        ("b (n c", "text that is no axis pattern"),
        ("b n) c", "text that is no axis pattern"),
        ("(b (t n)) c", "text that is no axis pattern"),
        ("b 3 n c", "text that is no axis pattern"),
        ("b-t n c", "text that is no axis pattern"),
        ("() n c", "text that is no axis pattern"),
    ],
)
def test_parse_of_a_wrong_pattern_says_what_is_wrong(pattern, problem):
    lines = raised(lambda: parse_layout(pattern))
    assert lines == {
        "where": f"node layout '{pattern}' cannot be read",
        "expected": EXPECTED,
        "got": problem,
        "fix": FIX,
    }


@pytest.mark.parametrize(
    ("pattern", "ndim", "node", "channel", "folded"),
    [
        ("b t n c", 4, 2, 3, False),
        ("b c n t", 4, 2, 1, False),
        ("b c t n", 4, 3, 1, False),
        ("n c", 2, 0, 1, False),
        ("(b n) t c", 3, 0, 2, True),
        ("t (b n) c", 3, 1, 2, True),
        ("(n b) c", 2, 0, 1, True),
        ("(b t n) c", 2, 0, 1, True),
        ("(n) c", 2, 0, 1, False),
        ("... n c", 2, 0, 1, False),
        ("... n c", 5, 3, 4, False),
        ("... (b n) c", 4, 2, 3, True),
        ("...n c", 3, 1, 2, False),
    ],
)
def test_parse_finds_the_axes(pattern, ndim, node, channel, folded):
    layout = parse_layout(pattern)
    assert (layout.node_axis(ndim), layout.channel_axis(ndim), layout.folded) == (node, channel, folded)


@pytest.mark.parametrize(
    ("pattern", "shape", "fits"),
    [
        ("b t n c", (2, 3, 5, 4), True),
        ("b t n c", (2, 3, 10, 4), False),
        ("b t n c", (2, 5, 4), False),
        ("b n c", (2, 3, 5, 4), False),
        ("... n c", (2, 3, 5, 4), True),
        ("... n c", (5,), False),
        ("(b n) c", (15, 4), True),
        ("(b n) c", (5, 4), True),
        ("(b n) c", (14, 4), False),
        ("(b n) c", (0, 4), False),
    ],
)
def test_fits_counts_axes_and_nodes(pattern, shape, fits):
    assert parse_layout(pattern).fits(shape, 5) is fits


FOLDS = [
    "b t n c",
    "b c n t",
    "(b n) t c",
    "(n b) t c",
    "t (b n) c",
    "(b t n) c",
    "(n t b) c",
    "b c (t n)",
    "(n) b t c",
]


@given(
    pattern=st.sampled_from(FOLDS),
    b=st.integers(1, 3),
    t=st.integers(1, 4),
    n=st.integers(1, 5),
    c=st.integers(1, 3),
)
def test_split_puts_every_reading_at_its_node_and_flatten_undoes_it(pattern, b, t, n, c):
    marks = torch.arange(n)[None, None, :, None] * 100 + torch.arange(c)
    x = rearrange(marks.expand(b, t, n, c), f"b t n c -> {pattern}")
    layout = parse_layout(pattern)
    assert layout.fits(x.shape, n)
    view, node, channel = layout.split(x, n)
    assert view.shape[node] == n
    assert view.shape[channel] == c
    rows = view.movedim((node, channel), (-2, -1))
    assert torch.equal(rows, marks[0, 0].expand(rows.shape))
    axis = layout.node_axis(x.ndim)
    assert torch.equal(view.flatten(axis, axis + 1) if layout.folded else view, x)


@given(st.text(alphabet="bntc( ).3_", max_size=12))
def test_parse_of_any_text_gives_a_layout_or_our_error(text):
    try:
        layout = parse_layout(text)
    except ValueError:
        assert raised(lambda: parse_layout(text))["where"] == f"node layout '{text}' cannot be read"
    else:
        assert all(layout.groups)
        assert layout.groups.count(("c",)) == 1
        assert sum("n" in group for group in layout.groups) == 1


@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple),
    num_nodes=st.integers(1, 6),
)
def test_readings_fit_the_shape_that_they_were_read_off(shape, num_nodes):
    channel = len(shape) - 1
    for pattern in layout_readings(shape, num_nodes, channel, range(channel)):
        layout = parse_layout(pattern)
        assert layout.fits(shape, num_nodes)
        assert layout.channel_axis(len(shape)) == channel


# -- reading a layout off a shape ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "channel", "axes", "pattern"),
    [
        ((2, 3, 5, 4), 3, (0, 1, 2), "b t n c"),
        ((5, 4), 1, (0,), "n c"),
        ((2, 4, 5, 3), 1, (0, 2), "b c n t"),
        ((2, 4, 3, 5), 1, (0, 3), "b c t n"),
        ((5, 4, 7), 1, (0,), "n c b"),
    ],
)
def test_infer_with_one_reading_gives_it(shape, channel, axes, pattern):
    assert infer_layout(shape, 5, channel, axes, "layer 'x'").pattern == pattern


@pytest.mark.parametrize(
    ("shape", "readings"),
    [
        ((5, 3, 5, 4), "'n b t c' or 'b t n c'"),
        ((10, 4), "'(b n) c' or '(n b) c'"),
        ((10, 5, 4), "'b n c' or '(b n) t c' or '(n b) t c'"),
    ],
)
def test_infer_with_several_readings_shows_shape_and_readings(shape, readings):
    lines = raised(lambda: infer_layout(shape, 5, len(shape) - 1, range(len(shape) - 1), "layer 'x'"))
    assert lines["where"] == "layer 'x': the node axis cannot be found"
    assert lines["expected"] == "exactly one axis of N=5 nodes"
    assert lines["got"] == f"an input of shape {shape}, which reads as {readings}"
    assert lines["fix"] == (
        "say which is true in STLoraConfig(node_layout={<layer name>: <pattern>}), or let find_layouts find it "
        "with sizes that cannot be confused"
    )


def test_infer_without_a_reading_blames_the_number_of_nodes():
    lines = raised(lambda: infer_layout((2, 3, 6, 4), 5, 3, (0, 1, 2), "layer 'x'"))
    assert lines["got"] == "an input of shape (2, 3, 6, 4), which has no axis of that size"
    assert (
        lines["fix"] == "build the adapter with this city's number of nodes, or say in node_layout where the nodes are"
    )


# -- wrong sizes --------------------------------------------------------------------------------------------


def test_wrong_number_of_nodes_names_layer_axis_and_fix():
    model = adapted(nn.Linear(4, 6), 5, node_layout={"layer": "b t n c"})
    lines = raised(lambda: model(torch.zeros(64, 12, 7, 4).double()))
    assert lines == {
        "where": "stlora adapter 'default' on 'layer': wrong number of nodes",
        "expected": "N=5 on axis 'n' of layout 'b t n c'",
        "got": "N=7 from an input of shape (64, 12, 7, 4)",
        "fix": "build the adapter with num_nodes=7 for this city, activate the adapter that belongs to it, "
        "or correct node_layout if the nodes are on another axis",
    }


def test_wrong_number_of_folded_rows_asks_for_a_multiple():
    model = adapted(nn.Linear(4, 6), 5, node_layout={"layer": "(b n) c"})
    lines = raised(lambda: model(torch.zeros(12, 4).double()))
    assert lines == {
        "where": "stlora adapter 'default' on 'layer': wrong number of nodes",
        "expected": "a multiple of N=5 rows on axis 'n' of layout '(b n) c'",
        "got": "12 rows from an input of shape (12, 4)",
        "fix": "build the adapter with this city's num_nodes, activate the adapter that belongs to it, "
        "or correct node_layout if the nodes are on another axis",
    }


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 2, 5, 4)])
def test_wrong_number_of_axes_shows_layout_and_shape(shape):
    lines = raised(lambda: check_layout(parse_layout("b t n c"), shape, 5, "layer 'x'"))
    assert lines == {
        "where": "layer 'x': wrong number of axes",
        "expected": "an input laid out as 'b t n c'",
        "got": f"an input of shape {shape}",
        "fix": "pass node_layout={<layer name>: <pattern>} in STLoraConfig with the axes of this input",
    }


def test_first_forward_pins_the_layout():
    model = adapted(nn.Linear(4, 6), 5)
    model(torch.zeros(2, 3, 5, 4).double())
    assert model.base_model.model.layer.layout["default"].pattern == "b t n c"
    lines = raised(lambda: model(torch.zeros(2, 5, 3, 4).double()))  # would fit 'b n t c'
    assert lines["where"] == "stlora adapter 'default' on 'layer': wrong number of nodes"
    assert lines["got"] == "N=3 from an input of shape (2, 5, 3, 4)"
    model(torch.zeros(5, 5, 5, 4).double())  # ambiguous alone, not any more


def test_failed_first_forward_pins_nothing():
    model = adapted(nn.Linear(4, 6), 5)
    raised(lambda: model(torch.zeros(5, 3, 5, 4).double()))
    assert model.base_model.model.layer.layout == {}
    model(torch.zeros(2, 3, 5, 4).double())


def test_two_folds_of_the_same_rows_differ():
    x = torch.randn(10, 4, dtype=torch.float64)
    outs = [adapted(nn.Linear(4, 6), 5, node_layout={"layer": pattern})(x) for pattern in ("(b n) c", "(n b) c")]
    assert (outs[0] - outs[1]).abs().max() > 0.1


# -- unions of graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 3), (1, 8, 3), (2, 3, 8, 3)])
@pytest.mark.parametrize("conv", ["GCNConv", "ChebConv"])
def test_rows_of_one_larger_graph_are_not_taken_for_a_batch(conv, shape):
    gnn = pytest.importorskip("torch_geometric.nn")
    model = adapted(gnn.GCNConv(3, 6) if conv == "GCNConv" else gnn.ChebConv(3, 6, K=2), 4)
    edge_index, _ = graph(8)
    lines = raised(lambda: model(torch.zeros(shape).double(), edge_index))
    assert lines == {
        "where": "stlora adapter 'default' on 'layer': wrong number of nodes",
        "expected": "N=4 rows, or a batch of separate graphs of 4 nodes each",
        "got": "8 rows with edges from one graph of 4 nodes to another",
        "fix": "build the adapter with num_nodes=8, or activate the adapter that belongs to this city",
    }


def test_rows_of_a_union_of_equal_graphs_pass():
    edge_index, _ = graph(4)
    union = torch.cat([edge_index, edge_index + 4], dim=1)
    check_union(union, 8, 4, parse_layout("(b n) c"), "layer 'x'")
    check_union(edge_index, 4, 4, parse_layout("(b n) c"), "layer 'x'")
    interleaved = torch.cat([edge_index * 2, edge_index * 2 + 1], dim=1)
    check_union(interleaved, 8, 4, parse_layout("(n b) c"), "layer 'x'")
    assert raised(lambda: check_union(interleaved, 8, 4, parse_layout("(b n) c"), "layer 'x'"))["where"]


def test_shared_adapter_needs_no_nodes_on_a_graph():
    gnn = pytest.importorskip("torch_geometric.nn")
    edge_index, _ = graph(8)
    model = adapted(gnn.GCNConv(3, 6), None, conditioning="shared")
    assert model(torch.zeros(8, 3).double(), edge_index).shape == (8, 6)
