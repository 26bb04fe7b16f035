"""Layers and layouts that cannot be adapted, and what the error says."""

from __future__ import annotations

import pytest
import torch
from hosts import C, D, N
from peft import get_peft_model
from torch import nn
from toys import Holder, adapted, raised

from stlora_peft import STLoraConfig

gnn = pytest.importorskip("torch_geometric.nn")


@pytest.mark.parametrize(
    ("layer", "got"),
    [
        (nn.Conv2d(4, 4, (1, 3), groups=2), "torch.nn.modules.conv.Conv2d; it is a grouped convolution (groups=2)"),
        (nn.Conv2d(4, 4, 3), "torch.nn.modules.conv.Conv2d; its kernel (3, 3) spans two axes"),
        (nn.Conv3d(4, 4, 1), "torch.nn.modules.conv.Conv3d"),
        (nn.Embedding(4, 4), "torch.nn.modules.sparse.Embedding"),
        (nn.LazyLinear(4), "torch.nn.modules.linear.LazyLinear; it is lazy and has no size yet"),
        (gnn.Linear(-1, 4), "torch_geometric.nn.dense.linear.Linear; it is lazy and has no size yet"),
        (gnn.GCNConv(-1, 4), "torch_geometric.nn.conv.gcn_conv.GCNConv; it is lazy"),
        (nn.RNN(4, 4), "torch.nn.modules.rnn.RNN"),
        (gnn.SAGEConv(-1, 4), "torch_geometric.nn.conv.sage_conv.SAGEConv; it is lazy"),
        (gnn.SAGEConv((-1, -1), 4), "torch_geometric.nn.conv.sage_conv.SAGEConv; it is lazy"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_unsupported_layer_is_refused_with_its_class_and_what_works(layer, got):
    holder = Holder(layer)
    lines = raised(lambda: get_peft_model(holder, STLoraConfig(num_nodes=N, target_modules=["layer"])))
    assert lines["where"] == "layer 'layer' cannot be adapted"
    assert lines["expected"].startswith("one of torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.LSTM")
    assert "torch_geometric.nn.ChebConv" in lines["expected"]
    assert lines["got"].startswith(got)
    assert "exclude_modules" in lines["fix"]
    assert holder.layer is layer


def test_attention_out_projection_is_refused_because_it_is_never_called():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(4, 2)
    lines = raised(lambda: get_peft_model(model, STLoraConfig(num_nodes=N, target_modules=["out_proj"])))
    assert lines["where"] == "layer 'attention.out_proj' cannot be adapted"
    assert "reads its weight without calling it" in lines["got"]


def test_transformer_encoder_layer_is_refused_because_its_fast_path_skips_adapters():
    model = nn.Module()
    model.encoder = nn.TransformerEncoderLayer(4, 2, 4)
    lines = raised(lambda: get_peft_model(model, STLoraConfig(num_nodes=N, target_modules=["linear1"])))
    assert lines["where"] == "layer 'encoder.linear1' cannot be adapted"
    assert "TransformerEncoderLayer reads its weights without calling it" in lines["got"]


def test_layers_inside_each_other_are_refused():
    holder = Holder(gnn.ChebConv(C, D, K=3))
    lines = raised(lambda: get_peft_model(holder, STLoraConfig(num_nodes=N, target_modules=["layer", "lins.1"])))
    assert lines == {
        "where": "layer 'layer.lins.1' is a part of layer 'layer'",
        "expected": "layers that are not inside each other",
        "got": "both in target_modules",
        "fix": "leave one of them out, or name it in exclude_modules",
    }
    assert type(holder.layer) is gnn.ChebConv


@pytest.mark.parametrize(
    ("host", "layout", "shape"),
    [
        (nn.Conv2d(C, D, (1, 3)), "b c t n", (2, C, 5, 5)),  # the kernel would run along the nodes
        (nn.Conv2d(C, D, (3, 1)), "b c n t", (2, C, 5, 5)),
        (nn.Conv2d(C, D, 1, stride=(2, 1)), "b c n t", (2, C, 5, 5)),
        (nn.Conv2d(C, D, 1, padding=(1, 0)), "b c n t", (2, C, 5, 5)),
        (nn.Conv2d(5, D, 1), "b n t c", (2, 5, 5, 4)),
        (nn.Linear(C, D), "b c n t", (2, C, 5, 4)),
        (nn.LSTM(C, D, batch_first=True), "b n c", (2, 5, C)),
        (nn.LSTM(C, D), "n t c", (5, 5, C)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_layout_that_the_layer_cannot_have_raises_with_layout_and_axes(host, layout, shape):
    model = adapted(host, 5, node_layout={"layer": layout})
    lines = raised(lambda: model(torch.zeros(shape).double()))
    assert lines["where"] == "stlora adapter 'default' on 'layer': the layout does not fit this layer"
    assert f"layout '{layout}'" in lines["got"]
    assert "node_layout" in lines["fix"]


def test_convolution_that_cached_another_citys_graph_is_refused_before_anything_changes():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = gnn.GCNConv(3, 4, cached=True)

        def forward(self, x, edge_index):
            return self.conv(x, edge_index)

    backbone = Backbone()
    backbone(torch.rand(5, 3), torch.tensor([[0, 1], [1, 0]]))
    with pytest.raises(ValueError, match="keeps the graph") as error:
        get_peft_model(backbone, STLoraConfig(num_nodes=7, target_modules=["conv"], predictor=None))
    assert str(error.value).split("\n") == [
        "layer 'conv' keeps the graph of the city that it was last run in.",
        "  expected: a graph convolution with cached=False, or one that has not been run",
        "  got:      GCNConv(cached=True) with a cached graph",
        "  to fix:   set cached=False on it and _cached_edge_index=None: with several cities a cache is stale",
    ]
    assert type(backbone.conv) is gnn.GCNConv
