"""A model cut to some of its nodes is the model of a city of these nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from toys import CONDITIONINGS, graph, randomised, small_backbone, windows

from stlora_peft import STLoraConfig, accelerate, node_subset
from stlora_peft.tuner.subset import node_tensors

N, IDS = 11, torch.tensor([7, 2, 9, 0, 4])
BOUND = ("agcrn", "dnntsp", "gman", "gwnet", "mtgnn", "staeformer", "d2stgnn")


def city(name: str, num_nodes: int, **options: Any) -> PeftModel:
    options = {"lora_dropout": 0.0, "emb_size": 3, "emb_noise": 0.0, "r": 2} | options
    model = get_peft_model(small_backbone(name, num_nodes).double(), STLoraConfig(num_nodes=num_nodes, **options))
    randomised(model)
    with torch.no_grad():
        for key, value in model.state_dict().items():  # statistics and tables differ from node to node
            if "nall_node_bound" in key and value.is_floating_point():
                value.add_(torch.rand_like(value))
    return model.double()


def rows_of(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Tensors with a node axis by their name in the state dict."""
    names = {id(value): name for name, value in [*model.named_parameters(), *model.named_buffers()]}
    return {names[id(tensor.value)]: (tensor.value, tensor.axis) for tensor in node_tensors(model)}


def of_nodes(model: PeftModel, ids: Tensor, name: str, **options: Any) -> PeftModel:
    """A model that was built for these nodes only, with their rows."""
    small, rows = city(name, len(ids), **options), rows_of(model)
    state = {
        key: value.index_select(rows[key][1], ids) if key in rows else value
        for key, value in model.state_dict().items()
    }
    own = small.state_dict()
    base = ".base_layer."  # the backbone's own normalisation of N nodes, which the adapter's copy stands for
    small.load_state_dict(
        {key: own[key] if base in key and own[key].shape != value.shape else value for key, value in state.items()}
    )
    return small


def forecast(model: nn.Module, ids: Tensor, seed: int = 0) -> Tensor:
    edge_index, edge_weight = graph(len(ids))
    out: Tensor = model(windows(N, seed=seed).double()[:, :, ids], edge_index, edge_weight)
    return out


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("name", ["lstm", "stgcn"])
def test_subset_forecasts_and_learns_as_the_city_of_these_nodes(name: str, conditioning: str) -> None:
    model = city(name, N, conditioning=conditioning).train()
    small = of_nodes(model, IDS, name, conditioning=conditioning).train()
    with node_subset(model, IDS):
        found = forecast(model, IDS)
    expected = forecast(small, IDS)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    rows, wanted = rows_of(model), dict(small.named_parameters())
    others = torch.tensor([n for n in range(N) if n not in IDS])
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if key not in rows:
            torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-12, atol=1e-12)
            continue
        grad, axis = parameter.grad, rows[key][1]
        torch.testing.assert_close(grad.index_select(axis, IDS), wanted[key].grad, rtol=1e-12, atol=1e-12)
        assert not grad.index_select(axis, others).any()


@pytest.mark.parametrize("name", BOUND)
def test_subset_cuts_what_a_backbone_has_for_each_node(name: str) -> None:
    model = city(name, N).eval()
    with node_subset(model, IDS):
        found = forecast(model, IDS)
    torch.testing.assert_close(found, forecast(of_nodes(model, IDS, name).eval(), IDS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "refused"), [("aagcn", "block1.gcn1"), ("astgcn", "_temporal_attention")])
def test_subset_refuses_numbers_of_pairs_of_nodes(name: str, refused: str) -> None:
    model = city(name, N)
    with pytest.raises(ValueError, match="cannot be cut to some of the nodes") as error, node_subset(model, IDS):
        pass
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert refused in lines[0]
    assert "node_axes" in lines[1]
    assert "pairs of nodes" in lines[2]
    assert "only meet along edges" in lines[3]


def test_subset_writes_running_statistics_of_the_core_back() -> None:
    model = city("stgcn", N).train()
    small = of_nodes(model, IDS, "stgcn").train()
    rows = rows_of(model)
    before = {key: value.clone() for key, (value, _) in rows.items() if "running" in key}
    with node_subset(model, IDS, num_core=3):
        forecast(model, IDS)
    forecast(small, IDS)
    core, wanted = IDS[:3], small.state_dict()
    assert len(before) == 4
    for key, old in before.items():
        new = rows[key][0]
        assert torch.equal(new[core], wanted[key][:3])
        assert not torch.equal(new[core], old[core])
        others = [n for n in range(N) if n not in core]
        assert torch.equal(new[others], old[others])


def test_subset_of_a_subset_counts_the_outer_nodes() -> None:
    model = city("stgcn", N).train()
    inner = torch.tensor([3, 0, 2])
    twin = of_nodes(model, IDS[inner], "stgcn").train()
    with node_subset(model, IDS), node_subset(model, inner):
        found = forecast(model, IDS[inner])
    assert torch.equal(found, forecast(twin, IDS[inner]))
    found.sum().backward()
    gate = next(value for key, (value, _) in rows_of(model).items() if "stlora_nodes" in key)
    assert gate.grad[IDS[inner]].any(1).all()
    statistics = {key: value for key, (value, _) in rows_of(model).items() if "running_mean" in key}
    for key, value in statistics.items():
        assert torch.equal(value[IDS[inner]], twin.state_dict()[key])


def state(model: nn.Module) -> tuple[Any, ...]:
    sizes = [(getattr(m, "num_nodes", None), getattr(m, "num_features", None)) for m in model.modules()]
    return {key: (id(value), value.shape) for key, value in model.named_parameters()}, sizes


def broken(found: object) -> None:
    raise RuntimeError(f"broken {found is not False}")


def test_everything_is_put_back_after_an_error() -> None:
    model = city("stgcn", N)
    before = state(model)
    with pytest.raises(RuntimeError, match="broken True"), node_subset(model, IDS):
        broken(state(model) != before)
    assert state(model) == before
    config = model.base_model.model.stlora_predictor.nall_predictor["default"].config
    assert config is model.peft_config["default"]


def test_saved_numbers_of_an_error_are_not_written() -> None:
    model = city("stgcn", N).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="broken"), node_subset(model, IDS):
        broken(forecast(model, IDS))
    for key, value in model.state_dict().items():
        assert "num_batches" in key or torch.equal(value, before[key])


def test_subset_of_a_plain_backbone_cuts_its_own_normalisation() -> None:
    backbone = small_backbone("stgcn", N).double().eval()
    small = small_backbone("stgcn", len(IDS)).double().eval()
    state = backbone.state_dict()
    small.load_state_dict({k: v[IDS] if v.shape[:1] == (N,) else v for k, v in state.items()})
    with node_subset(backbone, IDS):
        found = forecast(backbone, IDS)
    assert torch.equal(found, forecast(small, IDS))


def test_subset_of_another_tuner_cuts_the_copies_that_it_trains() -> None:
    backbone = small_backbone("stgcn", N).double().eval()
    with node_subset(backbone, IDS):
        expected = forecast(backbone, IDS)
    config = LoraConfig(target_modules=["hidden"], modules_to_save=["block1._batch_norm", "block2._batch_norm"])
    model = get_peft_model(backbone, config).eval()
    with node_subset(model, IDS):
        torch.testing.assert_close(forecast(model, IDS), expected, rtol=1e-12, atol=1e-12)


def test_subset_cuts_the_active_adapter_only() -> None:
    model = city("lstm", N)
    model.add_adapter("other", STLoraConfig(num_nodes=3))
    with node_subset(model, IDS):
        forecast(model, IDS)
    model.double().set_adapter("other")
    with node_subset(model, torch.tensor([2, 0])):
        forecast(model, torch.tensor([2, 0]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="the nodes of the model cannot be told") as error, node_subset(model, IDS):
        pass
    assert "N=3" in str(error.value).splitlines()[2]
    assert "N=11" in str(error.value).splitlines()[2]


@pytest.mark.parametrize(
    ("ids", "core", "lines"),
    [
        (torch.tensor([0, N]), None, ("from 0 to 10, for N=11 nodes", "from 0 to 11")),
        (torch.tensor([-1, 1]), None, ("from 0 to 10", "from -1 to 1")),
        (torch.tensor([1, 4, 1]), None, ("every node once", "node 1 2 times")),
        (torch.tensor([1.0]), None, ("int64", "float32")),
        (torch.zeros(0, dtype=torch.long), None, ("at least one", "shape (0,)")),
        ([1, 2], None, ("a tensor", "list")),
        (torch.tensor([1, 4]), 3, ("num_core from 1 to 2", "num_core=3")),
    ],
)
def test_wrong_nodes_are_refused(ids: Any, core: int | None, lines: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="cannot be taken from the model") as error:
        node_subset(city("lstm", N), ids, num_core=core).__enter__()
    text = str(error.value).splitlines()
    assert len(text) == 4
    assert lines[0] in text[1]
    assert lines[1] in text[2]
    assert "subset of a subset" in text[3]


def test_sparse_gradients_equal_the_dense_ones_and_name_few_rows() -> None:
    dense, sparse = city("stgcn", N, conditioning="gate"), city("stgcn", N, conditioning="gate")
    for model, is_sparse in ((dense, False), (sparse, True)):
        with node_subset(model, IDS, num_core=2, sparse=is_sparse):
            forecast(model, IDS)[:, :, :2].square().sum().backward()
    rows = rows_of(sparse)
    for (key, found), wanted in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        if not found.requires_grad:
            continue
        assert found.grad.is_sparse == (key in rows)
        assert torch.equal(found.grad.to_dense() if key in rows else found.grad, wanted.grad)
        if "stlora_predictor" in key and key in rows:  # only the core's forecasts count
            assert found.grad.coalesce().indices()[0].tolist() == sorted(IDS[:2].tolist())


def test_two_backward_passes_in_one_block_add_up() -> None:
    model = city("lstm", N)
    with node_subset(model, IDS):
        for seed in (1, 2):
            forecast(model, IDS, seed).sum().backward()
    table = model.base_model.model.stlora_nodes.nall_emb["default"]
    twice = table.grad.clone()
    table.grad = None
    for seed in (1, 2):
        with node_subset(model, IDS):
            forecast(model, IDS, seed).sum().backward()
    torch.testing.assert_close(table.grad, twice)


def test_accelerated_layers_notice_the_other_graph_and_keep_one() -> None:
    plain, fast = city("gconvgru", N).eval(), city("gconvgru", N).eval()
    accelerate(fast)
    parts = [IDS, torch.tensor([1, 3, 5, 6, 8, 10]), torch.arange(N), IDS]
    with torch.no_grad():
        for ids in parts:
            with node_subset(plain, ids), node_subset(fast, ids):
                torch.testing.assert_close(forecast(fast, ids), forecast(plain, ids), rtol=1e-9, atol=1e-9)
    caches = [module._cache for module in fast.modules() if hasattr(module, "_cache")]
    assert caches
    assert all(len(cache) <= 1 for cache in caches)
