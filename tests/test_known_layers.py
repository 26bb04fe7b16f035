"""The table of layouts against what the classes really do with nodes."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn
from toys import graph

from stlora_peft.backbones import tgt
from stlora_peft.tuner.known_layers import KNOWN_LAYOUTS, known_layout
from stlora_peft.tuner.layout import parse_layout

gnn = pytest.importorskip("torch_geometric.nn")
N, B, T = 5, 2, 7
EDGES = graph(N)[0]
UNION = torch.cat([EDGES, EDGES + N], dim=1)


@pytest.fixture(scope="module")
def cells():
    return tgt.load().nn


def node_marks(*shape: int) -> Tensor:
    """A tensor ``[... n c]`` whose entries are the numbers of their nodes, times 10."""
    return (10.0 * torch.arange(N))[:, None].expand(*shape, N, 3).clone()


def recorded(module: nn.Module, path: str, *inputs: Tensor) -> Tensor:
    """What the layer at ``path`` is given."""
    layer, seen = module.get_submodule(path), []
    forward = layer.forward
    layer.forward = lambda x: (seen.append(x), forward(x))[1]
    module(*inputs)
    return seen[0]


def assert_nodes(x: Tensor, pattern: str, channels: slice = slice(None)) -> None:
    """Fail unless the pattern finds, at each node, only the number of that node."""
    layout = parse_layout(pattern)
    assert layout.fits(x.shape, N), f"{tuple(x.shape)} does not fit '{pattern}'"
    view, node, channel = layout.split(x, N)
    rows = view.movedim((node, channel), (0, 1))[:, channels].flatten(1)
    assert torch.equal(rows, (10.0 * torch.arange(N))[:, None].expand_as(rows))


def test_assert_nodes_with_another_axis_fails():
    x = node_marks(N)  # [b n c], as many samples as nodes
    assert_nodes(x, "b n c")
    with pytest.raises(AssertionError):
        assert_nodes(x, "n b c")
    with pytest.raises(AssertionError):
        assert_nodes(node_marks(B).flatten(0, 1), "(n b) c")


def test_every_entry_names_a_class_and_its_layers(cells):
    checked = set()
    for name, layouts in KNOWN_LAYOUTS.items():
        module, _, cls = name.rpartition(".")
        found = getattr(importlib.import_module(module), cls)
        assert issubclass(found, nn.Module)
        checked |= {f"{cls}.{attribute}" for attribute in layouts}
    assert checked == {
        *(f"TemporalConv.conv_{k}" for k in (1, 2, 3)),
        *(f"{cell}.linear_{gate}" for cell in ("TGCN", "TGCN2") for gate in "zrh"),
        "GCNConv.lin",
        "ChebConv.lins",
    }


@pytest.mark.parametrize("conv", ["conv_1", "conv_2", "conv_3"])
def test_temporal_conv(cells, conv):
    module = cells.TemporalConv(3, 4, 3)
    assert_nodes(recorded(module, conv, node_marks(B, T)), known_layout(module, conv))


@pytest.mark.parametrize("gate", ["linear_z", "linear_h"])
def test_tgcn_rows_of_a_union(cells, gate):
    module = cells.TGCN(3, 3)
    x = node_marks(B).flatten(0, 1)
    seen = recorded(module, gate, x, UNION, None, x)
    if gate == "linear_h":  # the reset gate scales the hidden half
        seen = torch.cat([seen[:, :3], (seen[:, 3:] > 0) * x], dim=1)
    assert_nodes(seen, known_layout(module, gate), slice(3, None))


def test_tgcn2_batch(cells):
    module = cells.TGCN2(3, 3, batch_size=B)
    x = node_marks(B)
    assert_nodes(recorded(module, "linear_z", x, EDGES, None, x), known_layout(module, "linear_z"), slice(3, None))


@pytest.mark.parametrize("make", [lambda: gnn.GCNConv(3, 4), lambda: gnn.ChebConv(3, 4, K=3)], ids=["gcn", "cheb"])
@pytest.mark.parametrize("folded", [True, False])
def test_graph_convolutions(make, folded):
    module = make()
    path = "lin" if isinstance(module, gnn.GCNConv) else "lins.0"
    x = node_marks(B).flatten(0, 1) if folded else node_marks(B, T)
    assert_nodes(recorded(module, path, x, UNION if folded else EDGES), known_layout(module, path))


def test_subclasses_and_nested_layers_are_found():
    class Own(gnn.ChebConv):
        pass

    outer = nn.Module()
    outer.cell = nn.ModuleList([Own(3, 4, K=3)])
    assert known_layout(outer, "cell.0.lins.2") == "... (b n) c"


@pytest.mark.parametrize("key", ["plain", "stack.0", "stack"])
def test_layers_of_unknown_classes_have_none(key):
    outer = nn.Module()
    outer.plain = nn.Linear(2, 2)
    outer.stack = nn.Sequential(nn.Linear(2, 2))
    assert known_layout(outer, key) is None
