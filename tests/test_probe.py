"""Layouts that two probing forwards find."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from toys import assert_unchanged, graph, raised, small_backbone, snapshot, windows

from stlora_peft import find_layouts

B, T, N, C = 2, 6, 5, 3


class Rearranged(nn.Module):
    """Lays the window out as ``pattern`` and runs a layer on it."""

    def __init__(self, layer: nn.Module, pattern: str) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": layer})
        self.unused = nn.Linear(2, 2)
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        out = self.encoder["layer"](rearrange(x, f"b t n c -> {self.pattern}"))
        return out[0] if isinstance(out, tuple) else out


def window() -> Tensor:
    return torch.randn(B, T, N, C)


LAYERS = [
    (lambda: nn.Linear(C, 4), "b t n c"),
    (lambda: nn.Linear(C, 4), "(b n) t c"),
    (lambda: nn.Linear(C, 4), "(n b) t c"),
    (lambda: nn.Linear(C, 4), "t (b n) c"),
    (lambda: nn.LSTM(C, 4, batch_first=True), "(b n) t c"),
    (lambda: nn.GRU(C, 4), "t (b n) c"),
    (lambda: nn.GRU(C, 4), "t (n b) c"),
    (lambda: nn.Conv2d(C, 4, (1, 3)), "b c n t"),
    (lambda: nn.Conv2d(C, 4, (3, 1)), "b c t n"),
    (lambda: nn.Conv1d(C, 4, 3), "(b n) c t"),
]


@pytest.mark.parametrize(("make", "pattern"), LAYERS, ids=lambda value: value if isinstance(value, str) else "")
def test_find_layouts_reads_the_pattern_that_was_used(make, pattern):
    found = find_layouts(Rearranged(make(), pattern), window(), num_nodes=N, target_modules=["layer"])
    assert list(found) == ["encoder.layer"]
    assert found["encoder.layer"].translate(str.maketrans("bt", "xx")).replace("u", "x") == pattern.translate(
        str.maketrans("bt", "xx")
    )


def test_find_layouts_of_the_backbones_equal_their_own():
    backbone = small_backbone("stgcn", N)
    names = ["conv_1", "_graph_conv", "head.hidden"]
    found = find_layouts(backbone, windows(N), graph(N)[0], num_nodes=N, target_modules=names)
    assert found == {
        "block1._temporal_conv1.conv_1": "b c n t",
        "block1._temporal_conv2.conv_1": "b c n t",
        "block2._temporal_conv1.conv_1": "b c n t",
        "block2._temporal_conv2.conv_1": "b c n t",
        "block1._graph_conv": "b t n c",
        "block2._graph_conv": "b t n c",
        "head.hidden": "b n c",
    }


def test_find_layouts_sees_layers_whose_forward_is_called_directly():
    gnn = pytest.importorskip("torch_geometric.nn")

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = gnn.ChebConv(C, 4, K=4)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.conv(x, edge_index)

    names = [f"lins.{k}" for k in range(4)]
    found = find_layouts(Holder(), window(), graph(N)[0], num_nodes=N, target_modules=names)
    assert found == {f"conv.lins.{k}": "b t n c" for k in range(4)}


@pytest.mark.parametrize("mode", [True, False])
def test_find_layouts_leaves_the_backbone_as_it_was(mode):
    backbone = Rearranged(nn.Sequential(nn.Linear(C, 4), nn.BatchNorm2d(T), nn.Dropout()), "b t n c").train(mode)
    backbone.encoder["layer"][2].eval()
    before, attributes = snapshot(backbone), {m: dict(vars(m)) for m in backbone.modules()}
    x = window()
    kept = x.clone()
    assert find_layouts(backbone, x, num_nodes=N, target_modules=["layer.0"])
    assert_unchanged(backbone, before)
    assert torch.equal(x, kept)
    assert [m.training for m in backbone.modules()] == [values["training"] for values in attributes.values()]
    assert all(vars(m).keys() == values.keys() for m, values in attributes.items())


def test_find_layouts_after_a_failing_forward_leaves_the_backbone_as_it_was():
    backbone = Rearranged(nn.Linear(C + 1, 4), "b t n c").train()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        find_layouts(backbone, window(), num_nodes=N, target_modules=["layer"])
    assert backbone.training
    assert "forward" not in vars(backbone.encoder["layer"])


def test_find_layouts_keeps_a_forward_that_the_user_put_on_a_layer():
    backbone = Rearranged(nn.Linear(C, 4), "b t n c")
    layer = backbone.encoder["layer"]
    layer.forward = own = lambda x: nn.functional.linear(x, layer.weight)
    find_layouts(backbone, window(), num_nodes=N, target_modules=["layer"])
    assert layer.forward is own


def test_find_layouts_takes_the_samples_of_another_axis():
    backbone = Rearranged(nn.Linear(C, 4), "(b n) t c")
    x = window()

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = backbone

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1))

    found = find_layouts(Transposed(), x.transpose(0, 1), num_nodes=N, target_modules=["layer"], batch_axis=1)
    assert found["inner.encoder.layer"].startswith("(b n)")


def test_find_layouts_takes_a_window_of_whole_numbers():
    class Counts(Rearranged):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    counts = torch.randint(0, 9, (B, T, N, C))
    assert find_layouts(Counts(nn.Linear(C, 4), "(b n) t c"), counts, num_nodes=N, target_modules=["layer"]) == {
        "encoder.layer": "(b n) t c"
    }


def test_find_layouts_of_an_unreached_layer_raises():
    backbone = Rearranged(nn.Linear(C, 4), "b t n c")
    lines = raised(lambda: find_layouts(backbone, window(), num_nodes=N, target_modules=["unused"]))
    assert lines == {
        "where": "layer 'unused' is not reached by the probing forward",
        "expected": "a layer that the backbone calls",
        "got": "no call",
        "fix": "leave it out of target_modules: an adapter on it would have no effect",
    }


def test_find_layouts_of_a_name_that_is_not_there_raises():
    backbone = Rearranged(nn.Linear(C, 4), "b t n c")
    lines = raised(lambda: find_layouts(backbone, window(), num_nodes=N, target_modules=["layer", "decoder"]))
    assert lines["where"] == "no layer is called 'decoder'"


@pytest.mark.parametrize(("pattern", "shape"), [("(b t n) c", (B, T, N, C)), ("b t n c", (N, T, N, C))])
def test_find_layouts_never_guesses(pattern, shape):
    backbone = Rearranged(nn.Linear(C, 4), pattern)
    lines = raised(lambda: find_layouts(backbone, torch.randn(shape), num_nodes=N, target_modules=["layer"]))
    assert lines["where"] == "layer 'encoder.layer': the node axis cannot be found"
    assert " or " in lines["got"]
