"""Layer classes of the user's, and merging into the layers that have a root weight."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hosts import EDGES, C, D, N, diffusion_call, relation_call, tgt_layer, unweighted_call
from peft import PeftModel, get_peft_model
from reference import pointwise_update
from test_fresh_import import assert_runs
from torch import Tensor, nn
from toys import Holder, assert_same, assert_unchanged, raised, snapshot

from stlora_peft import STLoraConfig, register_host_layer
from stlora_peft.tuner import hosts

gnn = pytest.importorskip("torch_geometric.nn")

OWN = """
import torch
from torch import nn
from torch_geometric.nn import MessagePassing

class Mean(MessagePassing):
    def __init__(self):
        super().__init__(aggr="mean")
        self.lin = nn.Linear(4, 5)

    def forward(self, x, edge_index):
        return self.propagate(edge_index, x=self.lin(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = Mean()

    def forward(self, x, edge_index):
        return self.conv(x, edge_index)
"""
WIDTHS = {"in_features": "lin.in_features", "out_features": "lin.out_features", "layout": "... (b n) c"}


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of one test are gone in the next."""
    monkeypatch.setattr(hosts, "_registered", {})


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the user's."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return importlib.import_module("own")


def adapted(own: ModuleType) -> PeftModel:
    options = {"num_nodes": N, "target_modules": ["conv"], "r": 2, "lora_alpha": 5, "init_weights": False}
    config = STLoraConfig(predictor=None, conditioning="gate", lora_dropout=0.0, **options)
    return get_peft_model(own.Net(), config).double()


def test_registered_layer_gets_the_update_beside_it(own: ModuleType) -> None:
    register_host_layer(own.Mean, **WIDTHS)
    model, x = adapted(own), torch.randn(2, 3, N, C, dtype=torch.float64)
    layer = model.get_base_model().conv
    update = pointwise_update(x, "gate", layer.factors("default"), 5 / 2)
    assert_same(model(x, EDGES), own.Net().double()(x, EDGES) + update)


def test_class_derived_from_a_registered_one_counts(own: ModuleType) -> None:
    register_host_layer(own.Mean, **WIDTHS)
    derived = type("Derived", (own.Mean,), {"__module__": "own"})
    model = get_peft_model(Holder(derived()), STLoraConfig(num_nodes=N, target_modules=["layer"], predictor=None))
    assert model.peft_config["default"].host_layers == {"own.Mean": WIDTHS}


def test_registered_layer_loads_in_a_process_that_registers_nothing(own: ModuleType, tmp_path: Path) -> None:
    register_host_layer(own.Mean, **WIDTHS)
    model = adapted(own).float()
    model.save_pretrained(str(tmp_path))
    x = torch.linspace(-1, 1, N * C).view(N, C)
    torch.save(model(x, EDGES).detach(), f"{tmp_path}/expected")
    assert_runs(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import own, stlora_peft, torch\n"
        "from peft import PeftModel\n"
        f"model = PeftModel.from_pretrained(own.Net(), {str(tmp_path)!r})\n"
        f"x, edges = torch.linspace(-1, 1, {N * C}).view({N}, {C}), torch.tensor({EDGES.tolist()})\n"
        f"assert torch.equal(model(x, edges), torch.load({str(tmp_path / 'expected')!r}))\n"
    )


def test_adapter_of_a_class_that_is_registered_otherwise_is_refused(own: ModuleType, tmp_path: Path) -> None:
    register_host_layer(own.Mean, **WIDTHS)
    adapted(own).save_pretrained(str(tmp_path))
    hosts._registered.clear()
    register_host_layer(own.Mean, **(WIDTHS | {"layout": None}))
    backbone = own.Net()
    before = snapshot(backbone)
    lines = raised(lambda: PeftModel.from_pretrained(backbone, str(tmp_path)))
    given = "HostLayer(in_features='lin.in_features', out_features='lin.out_features', layout={})"
    assert lines == {
        "where": "layer class 'own.Mean' cannot be registered",
        "expected": "a class that is not known yet, or the description that it has",
        "got": f"{given.format(repr('... (b n) c'))} for {given.format(None)}",
        "fix": "register each class once, with one description in every program that uses it",
    }
    assert_unchanged(backbone, before)


def test_registered_layer_that_returns_several_tensors_is_refused() -> None:
    class Cell(nn.Module):
        in_channels = out_channels = C

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    register_host_layer(Cell, layout="b n c")
    options = {"num_nodes": N, "target_modules": ["layer"], "predictor": None}
    model = get_peft_model(Holder(Cell()), STLoraConfig(**options))
    assert raised(lambda: model(torch.rand(2, N, C))) == {
        "where": "stlora layer 'layer' returns what no update can be added to",
        "expected": "one tensor",
        "got": "a tuple from Cell",
        "fix": "name layers inside it in target_modules instead",
    }


def test_registering_a_class_that_can_be_adapted_already_raises() -> None:
    lines = raised(lambda: register_host_layer(gnn.GCNConv))
    assert lines["where"] == "layer class 'torch_geometric.nn.conv.gcn_conv.GCNConv' cannot be registered"
    assert lines["got"].endswith("for a layer that can be adapted already")


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: gnn.SAGEConv(C, D), unweighted_call),
        (lambda: gnn.RGCNConv(C, D, 2), relation_call),
        (lambda: tgt_layer("recurrent.dcrnn.DConv")(C, D, 3), diffusion_call),
        (lambda: tgt_layer("recurrent.dcrnn.BatchedDConv")(C, D, 2), diffusion_call),
    ],
    ids=["sage", "rgcn", "dconv", "batched dconv"],
)
def test_shared_update_merges_into_the_root_weight_and_out_again(
    make: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    model = Holder(make())
    x = torch.randn(2 * N, C)
    before = call(model.layer, x)
    config = STLoraConfig(conditioning="shared", target_modules=["layer"], init_weights=False, lora_dropout=0.0)
    adapter = get_peft_model(model, config)
    layer = adapter.get_base_model().layer
    expected = call(layer, x)
    assert (expected - before).abs().max() > 1e-2
    adapter.merge_adapter()
    torch.testing.assert_close(call(layer.base_layer, x), expected, rtol=1e-4, atol=1e-5)
    adapter.unmerge_adapter()
    torch.testing.assert_close(call(layer.base_layer, x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("conv", "name"),
    [(gnn.SAGEConv(C, D, root_weight=False), "SAGEConv"), (gnn.RGCNConv(C, D, 2, root_weight=False), "RGCNConv")],
)
def test_merging_without_a_root_weight_is_refused(conv: nn.Module, name: str) -> None:
    adapter = get_peft_model(Holder(conv), STLoraConfig(conditioning="shared", target_modules=["layer"]))
    assert raised(adapter.merge_adapter)["got"] == f"{name}(root_weight=False) has no weight that equals the update"
