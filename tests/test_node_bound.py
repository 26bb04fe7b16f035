"""Modules with one entry for each node: resized, rebuilt, re-estimated, and kept with their city."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from node_bound_toys import Normalised, city_batches, city_model, used
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import Holder, assert_same, call, graph, raised, small_backbone

from stlora_peft import STLoraConfig, rebuild
from stlora_peft.tuner.node_bound import NodeBoundLayer, bound_size, resize

NORMS = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}


# -- resize -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NORMS)
def test_resize_to_the_same_number_is_an_exact_copy(kind):
    norm = used(NORMS[kind](5, eps=1e-3, momentum=0.3))
    new = resize(norm, 5, "norm")
    assert new is not norm
    assert type(new) is type(norm)
    assert (new.num_features, new.eps, new.momentum) == (5, 1e-3, 0.3)
    for name, value in norm.state_dict().items():
        assert torch.equal(new.state_dict()[name], value)
        assert new.state_dict()[name].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("num_nodes", [1, 3, 8])
@pytest.mark.parametrize("kind", NORMS)
def test_resize_takes_mean_rows_and_the_variance_of_the_mixture(kind, num_nodes):
    norm = used(NORMS[kind](5, eps=1e-3, momentum=0.3))
    before = copy.deepcopy(norm.state_dict())
    new = resize(norm, num_nodes, "norm")
    assert (new.num_features, new.eps, new.momentum) == (num_nodes, 1e-3, 0.3)
    for name in ("weight", "bias", "running_mean"):
        expected = reference.resized_rows(before[name].numpy(), num_nodes)
        np.testing.assert_allclose(new.state_dict()[name].numpy(), expected, rtol=1e-14)
    variance = reference.mixture_variance(before["running_mean"].numpy(), before["running_var"].numpy())
    np.testing.assert_allclose(new.running_var.numpy(), np.full(num_nodes, variance), rtol=1e-13)
    assert int(new.num_batches_tracked) == 7
    assert isinstance(new.weight, nn.Parameter)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])


def test_resize_rows_are_tensors_of_their_own():
    new = resize(used(nn.BatchNorm2d(5)), 3, "norm")
    with torch.no_grad():
        new.weight[0] += 1.0
        new.running_mean[0] += 1.0
    assert new.weight[1] != new.weight[0]
    assert new.running_mean[1] != new.running_mean[0]


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_resize_of_a_norm_without_weights_or_statistics(options):
    new = resize(nn.BatchNorm2d(5, **options), 3, "norm").train()
    assert new(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_resize_of_a_table_takes_the_mean_row():
    table = nn.Embedding(5, 4).double()
    new = resize(table, 7, "table")
    np.testing.assert_allclose(
        new.weight.detach(), reference.resized_rows(table.weight.detach().numpy(), 7), rtol=1e-14
    )
    assert new.num_embeddings == 7
    assert new(torch.tensor(6)).shape == (4,)


def test_bound_size_of_another_module_raises():
    assert bound_size(nn.Embedding(4, 2), "table") == 4
    assert raised(lambda: bound_size(nn.LayerNorm(4), "block.norm")) == {
        "where": "node-bound module 'block.norm' cannot be rebuilt for another city",
        "expected": "nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Embedding, or a module with num_nodes and "
        "resized(num_nodes)",
        "got": "LayerNorm",
        "fix": "leave it out of node_bound, or train it whole with modules_to_save if the number of nodes stays",
    }


def test_module_says_itself_what_it_becomes_in_another_city():
    class Table(nn.Module):
        def __init__(self, num_nodes: int) -> None:
            super().__init__()
            self.num_nodes, self.rows = num_nodes, nn.Parameter(torch.ones(num_nodes))

        def resized(self, num_nodes: int) -> nn.Module:
            return Table(num_nodes)

    assert bound_size(Table(3), "table") == 3
    assert resize(Table(3), 5, "table").rows.shape == (5,)


# -- rebuild ------------------------------------------------------------------------------------------------


def test_rebuild_fits_the_new_city_and_leaves_the_source_untouched():
    source = small_backbone("stgcn", 5).eval()
    before = copy.deepcopy(source.state_dict())
    new = rebuild(source, 8)
    assert call(new, 8).shape == (2, 4, 8, 1)
    assert new.hyperparameters["num_nodes"] == 8
    assert source.hyperparameters["num_nodes"] == 5
    with torch.no_grad():
        for value in new.state_dict().values():
            value.add_(1)
    for name, value in source.state_dict().items():
        assert torch.equal(value, before[name])
    assert call(source, 5).shape == (2, 4, 5, 1)


def test_rebuild_for_the_same_number_gives_the_same_forecasts():
    source = small_backbone("stgcn", 5).eval()
    assert torch.equal(call(rebuild(source, 5), 5), call(source, 5))


@pytest.mark.parametrize("name", ["lstm", "stgcn"])
def test_rebuild_changes_nothing_but_node_bound_modules(name):
    source = small_backbone(name, 5)
    new = rebuild(source, 8)
    for key, value in source.state_dict().items():
        if "_batch_norm" not in key:
            assert torch.equal(new.state_dict()[key], value)
    assert new.state_dict().keys() == source.state_dict().keys()


def test_rebuild_with_names_rebuilds_those():
    new = rebuild(Normalised(5), 7, node_bound=["norm"])
    assert (new.norm.num_features, new.channels.num_features) == (7, 4)


def test_rebuild_with_an_unknown_name_raises():
    assert raised(lambda: rebuild(Normalised(5), 7, node_bound=["normal"])) == {
        "where": "node-bound module 'normal' is not in the backbone",
        "expected": "the full name of a module",
        "got": "'normal'",
        "fix": "take the name from backbone.named_modules()",
    }


def test_rebuild_forgets_the_old_graph_of_a_cached_convolution():
    gnn = pytest.importorskip("torch_geometric.nn")
    source = Holder(gnn.GCNConv(3, 4, cached=True))
    source(torch.randn(5, 3), graph(5)[0])
    source.layer._cached_adj_t = torch.ones(5, 5)  # where torch_sparse is installed
    x, plain = torch.randn(8, 3), Holder(gnn.GCNConv(3, 4))
    plain.load_state_dict(source.state_dict())
    new = rebuild(source, 8)
    assert new.layer._cached_adj_t is None
    assert_same(new(x, graph(8)[0]), plain(x, graph(8)[0]))
    assert source.layer._cached_edge_index is not None


# -- inside a model -----------------------------------------------------------------------------------------


def test_disabled_adapter_on_another_number_of_nodes_raises_and_says_what_to_do():
    model = get_peft_model(small_backbone("stgcn", 5), STLoraConfig(num_nodes=8)).eval()
    call(model, 8)

    def forecast() -> None:
        with model.disable_adapter():
            call(model, 8)

    assert raised(forecast) == {
        "where": "node-bound module 'block1._batch_norm': wrong number of nodes",
        "expected": "N=5 on axis 1",
        "got": "N=8 from an input of shape (2, 8, 5, 4)",
        "fix": "activate the adapter of this city; without one, rebuild(backbone, num_nodes) makes the backbone "
        "fit it",
    }


def test_disabled_adapter_gives_the_old_citys_forecast():
    source = small_backbone("stgcn", 5).eval().requires_grad_(False)
    expected = call(source, 5)
    model = get_peft_model(source, STLoraConfig(num_nodes=8)).eval()
    with model.disable_adapter():
        assert torch.equal(call(model, 5), expected)


def test_two_active_adapters_of_one_norm_are_refused():
    model = city_model(7)
    model.add_adapter("second", STLoraConfig(num_nodes=7, target_modules=["lin"], predictor=None, node_bound=["norm"]))
    model.base_model.set_adapter(["default", "second"])
    assert raised(lambda: model(city_batches()[0]["x"])) == {
        "where": "node-bound module 'norm' belongs to one city",
        "expected": "one active adapter",
        "got": "the active adapters ['default', 'second']",
        "fix": "call set_adapter('default')",
    }


def test_each_adapter_uses_its_own_copy():
    model = city_model(7)
    model.add_adapter("second", STLoraConfig(num_nodes=9, target_modules=["lin"], predictor=None, node_bound=["norm"]))
    model.eval()
    assert model(torch.zeros(2, 6, 7, 3).double()).shape == (2, 6, 7, 4)
    model.set_adapter("second")
    assert model(torch.zeros(2, 6, 9, 3).double()).shape == (2, 6, 9, 4)


def test_training_moves_the_copys_statistics_and_no_others():
    model = city_model(7).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(city_batches()[0]["x"])
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    copies = "base_model.model.norm.nall_node_bound.default."
    assert moved == {copies + name for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_frozen_copy_is_not_trained_whatever_is_switched(tmp_path):
    torch.manual_seed(0)
    backbone = Normalised(5)
    torch.manual_seed(0)  # the same weights again
    model = city_model(7, freeze_node_bound=True)
    second = {"target_modules": ["lin"], "predictor": None, "node_bound": ["norm"]}
    model.add_adapter("second", STLoraConfig(num_nodes=9, **second))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone, tmp_path, is_trainable=True)
    for switched in (model, loaded):
        for name in ("second", "default") if switched is model else ("default",):
            switched.set_adapter(name)
            assert _trained_copies(switched) == ({"second"} if name == "second" else set())
        switched.set_requires_grad(["default"], True)
        assert not _trained_copies(switched)
    weight = loaded.base_model.model.norm.current().weight.clone()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded.train()(city_batches()[0]["x"]).square().sum().backward()
    optimizer.step()
    assert torch.equal(loaded.base_model.model.norm.current().weight, weight)
    assert loaded.base_model.model.norm.current().num_batches_tracked == 8  # statistics are no parameters


def _trained_copies(model: PeftModel) -> set[str]:
    named = [name.split("nall_node_bound.") for name, p in model.named_parameters() if p.requires_grad]
    return {parts[1].split(".")[0] for parts in named if len(parts) > 1}


def test_table_that_is_read_without_a_call_is_the_active_citys():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.table = nn.Linear(3, 4), nn.Embedding(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) + self.table.weight

    config = STLoraConfig(num_nodes=7, target_modules=["lin"], predictor=None, node_bound=["table"])
    model = get_peft_model(Table(), config)
    assert model(torch.zeros(2, 6, 7, 3)).shape == (2, 6, 7, 4)
    assert model.base_model.model.table.num_embeddings == 7
    with model.disable_adapter():
        assert model(torch.zeros(2, 6, 5, 3)).shape == (2, 6, 5, 4)
    model(torch.zeros(2, 6, 7, 3)).sum().backward()
    assert model.base_model.model.table.current().weight.grad is not None


def test_config_with_an_unknown_node_bound_name_raises_before_anything_is_touched():
    backbone = Normalised(5)
    config = STLoraConfig(num_nodes=7, target_modules=["lin"], predictor=None, node_bound=["norm", "typo"])
    lines = raised(lambda: get_peft_model(backbone, config))
    assert lines["where"] == "node-bound module 'typo' is not in the backbone"
    assert not any(isinstance(module, NodeBoundLayer) for module in backbone.modules())
    assert type(backbone.lin) is nn.Linear


def test_node_bound_of_a_shared_adapter_needs_the_number_of_nodes():
    config = STLoraConfig(conditioning="shared", target_modules=["lin"], node_bound=["norm"])
    lines = raised(lambda: get_peft_model(Normalised(5), config))
    assert lines["where"] == "stlora adapter 'default': the number of nodes is not known"
    assert lines["expected"] == "STLoraConfig(num_nodes=<N>)"


def test_backbone_that_trains_too_leaves_out_what_the_adapters_copies_replace():
    backbone = small_backbone("gwnet")
    model = get_peft_model(backbone, STLoraConfig(num_nodes=7, freeze_backbone=False))
    call(model, 7).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if "embedding" in name and "base_layer.weight" in name]
    copies = [name for name in trained if "nall_node_bound" in name]
    assert len(copies) == 2
    assert all(model.get_parameter(name).grad is not None for name in copies)
    assert all("base_model.model.start_conv" not in name or name in trained for name, _ in model.named_parameters())
