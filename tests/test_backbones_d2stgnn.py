"""D2STGNN: its size against the published one, what it hears and from when, other cities, compilers, refusals."""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from toys import assert_same, raised

from stlora_peft import STLoraConfig, find_layouts, rebuild
from stlora_peft.backbones.d2stgnn import D2STGNN
from stlora_peft.backbones.d2stgnn.diffusion import LocalisedConv
from stlora_peft.data.windows import time_encoding

B, N, T = 2, 6, 7
EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])  # a one-way chain that node 5 is not part of
FORK = torch.tensor([[0, 1, 2, 3], [2, 2, 1, 1]])  # distances count only where a node hears more than one other
WEIGHTS = torch.tensor([0.5, 2.0, 1.5, 1.0])
NARROW: dict[str, Any] = {"hidden_channels": 4, "forecast_channels": 6, "head_channels": 8, "gate_channels": 5}
SMALL = NARROW | {"emb_size": 3, "time_emb_size": 2, "num_layers": 2, "heads": 2, "steps_per_day": 24}
PUBLISHED: dict[str, Any] = {"in_channels": 5, "time_features": "week"}  # one value channel


def small(**options: Any) -> D2STGNN:
    """A narrow network in evaluation mode, in float64, whose nodes differ."""
    sizes = {"num_nodes": N, "in_channels": 1, "window": T, "horizon": 4, "time_features": "none"}
    model = D2STGNN(**(sizes | SMALL | options))
    for table in (model.source_vectors, model.target_vectors):
        nn.init.normal_(table.weight)
    return model.double().eval()


def readings(channels: int = 1) -> Tensor:
    return torch.randn(B, T, N, channels, dtype=torch.float64)


def matrices(model: D2STGNN, x: Tensor, edges: Tensor = EDGES) -> list[Tensor]:
    """What the graph of a network gave its layers."""
    seen: list[list[Tensor]] = []
    hook = model.dynamic_graph.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x, edges, WEIGHTS)
    hook.remove()
    assert len(seen) == 1  # once for all layers
    return seen[0]


# -- size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_nodes", "width", "count", "published"),
    [(207, 10, 390_010, 0.39e6), (307, 10, 392_010, 0.40e6), (307, 12, 396_772, 0.40e6)],
)
def test_default_arguments_have_the_published_number_of_parameters(
    num_nodes: int, width: int, count: int, published: float
) -> None:
    model = D2STGNN(num_nodes=num_nodes, emb_size=width, time_emb_size=width, **PUBLISHED)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == count
    assert abs(found / published - 1) < 0.021
    if (num_nodes, width) != (307, 10):  # the released configuration of PEMS04 has vectors of width 12
        assert round(found, -4) == published


@pytest.mark.parametrize("time_features", ["none", "day", "week"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_every_parameter_has_a_gradient(num_layers: int, time_features: Any) -> None:
    clock = time_encoding(T, 60, datetime(2024, 1, 7, 20), time_features).double()
    x = torch.cat([readings(), clock[None, :, None].expand(B, -1, N, -1)], 3)
    model = small(
        num_layers=num_layers, in_channels=x.shape[3], time_features=time_features, hidden_channels=8, head_channels=16
    )
    model(x, FORK).square().sum().backward()
    dead = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 1e-9]
    assert dead == []


# -- who hears whom ---------------------------------------------------------------------------------------------


def test_matrices_follow_the_edges_first_and_go_against_them_then() -> None:
    along, along_2, against, against_2, *fixed = matrices(small(), readings())
    assert along[0].nonzero().tolist() == [[1, 0], [2, 1], [3, 2], [4, 3]]  # a row holds what a node hears
    assert along_2[0].nonzero().tolist() == [[2, 0], [3, 1], [4, 2]]
    assert torch.equal(against.ne(0), along.mT.ne(0))
    assert torch.equal(against_2.ne(0), along_2.mT.ne(0))
    assert len(fixed) == 2
    assert all(torch.equal(matrix[0].ne(0), ~torch.eye(N).bool()) for matrix in fixed)


@pytest.mark.parametrize("along", [True, False])
def test_message_goes_from_source_to_target(along: bool) -> None:
    model = small()
    for layer in model.layers:  # only the matrices along, or against, the edges
        mixed = layer.diffusion.conv.mix.weight.data.unflatten(1, (7, -1))
        mixed[:, [3, 4, 5, 6] if along else [1, 2, 5, 6]] = 0
    x = readings()
    moved = x.clone()
    moved[:, :, 2] += 1
    changed = (model(moved, EDGES, WEIGHTS) - model(x, EDGES, WEIGHTS)).abs().amax((0, 1, 3)) > 1e-9
    assert changed.tolist() == [not along, not along, True, along, along, False]


def test_dynamic_matrices_follow_window_weights_and_the_time_of_its_last_step() -> None:
    model, x = small(), readings()
    along, against = matrices(model, x, FORK)[0], matrices(model, x, FORK)[2]
    assert (along[0, 2] - along[1, 2]).abs().max() > 1e-6
    assert (matrices(model, x + torch.randn_like(x), FORK)[0] - along).abs().max() > 1e-6
    for row, heard in ((along[:, 1], [2, 3]), (along[:, 2], [0, 1])):
        assert row.ne(0).nonzero()[:, 1].tolist() == heard * B
        assert_same(row.sum(1), torch.ones(B).double())
    model.time_vectors.tables[0].data[:-1] += 1
    assert torch.equal(matrices(model, x, FORK)[0], along)
    model.time_vectors.tables[0].data[-1] += 1
    assert (matrices(model, x, FORK)[0] - along).abs().max() > 1e-6
    assert against[:, 4:].abs().max() == 0  # nothing leads to or from these nodes


def test_distances_that_leave_a_neighbour_nothing_keep_its_row_and_gradients() -> None:
    model = small()
    model.dynamic_graph.distance.query.weight.data *= 1e6
    x = readings().requires_grad_()
    along = matrices(model, x)[0]
    assert_same(along[:, 1:5].sum(2), torch.ones(B, 4).double())
    model(x, EDGES, WEIGHTS).sum().backward()
    assert x.grad.isfinite().all()


def test_forecast_depends_on_edges_weights_and_both_tables_of_nodes() -> None:
    model, x = small(), readings()
    expected = model(x, EDGES, WEIGHTS)
    assert (model(x, EDGES[:, :3], WEIGHTS[:3]) - expected).abs().max() > 1e-6
    assert (model(x, FORK, WEIGHTS.flip(0)) - model(x, FORK, WEIGHTS)).abs().max() > 1e-6
    assert model(x, EDGES[:, :0]).isfinite().all()
    for table in (model.source_vectors, model.target_vectors):
        table.weight.data.add_(1)
        assert (model(x, EDGES, WEIGHTS) - expected).abs().max() > 1e-6
        table.weight.data.sub_(1)


# -- steps and times --------------------------------------------------------------------------------------------


def test_convolution_sees_no_later_step() -> None:
    conv, x = LocalisedConv(4, 3, 1, 0.1).double().eval(), torch.randn(B, N, T, 4).double()
    moved = x.clone()
    moved[:, :, 4] += 1
    everyone = [torch.ones(B, N, N).double()]
    changed = (conv(moved, everyone) - conv(x, everyone)).abs().amax((0, 1, 3))
    assert changed.gt(1e-9).tolist() == [False, False, True, True, True]  # states of steps 2 to 6


def test_horizon_that_is_no_multiple_of_the_gap_cuts_the_last_stride() -> None:
    whole, cut = small(horizon=6, out_channels=2, residual=False), small(horizon=4, out_channels=2, residual=False)
    cut.load_state_dict(whole.state_dict())
    x = readings()
    assert_same(cut(x, EDGES), whole(x, EDGES)[:, :4])
    assert (small(horizon=4, gap=4).num_strides, cut.num_strides, whole.num_strides) == (1, 2, 2)


def test_forecast_depends_on_hour_and_day_and_a_day_that_is_not_known_has_no_vector() -> None:
    model, x = small(in_channels=5, time_features="week"), readings()
    clock = time_encoding(200, 60, datetime(2024, 1, 7), "week").double()

    def at(step: int, known: bool = True) -> Tensor:
        encodings = clock[step : step + T] * torch.tensor([1, 1, known, known])
        return model(torch.cat([x, encodings[None, :, None].expand(B, -1, N, -1)], 3), EDGES, WEIGHTS)

    assert (at(6) - at(18)).abs().max() > 1e-6
    assert (at(6) - at(30)).abs().max() > 1e-6
    assert_same(at(6), at(6 + 168))
    assert_same(at(6, known=False), at(30, known=False))
    model.time_vectors.tables[0].data.zero_()
    assert_same(at(6), at(6, known=False))


def test_dropout_acts_in_training_only() -> None:
    model, x = small(dropout=0.5), readings()
    assert torch.equal(model(x, EDGES), model(x, EDGES))
    model.dynamic_graph.distance.norm.momentum = 0.0
    model.train()
    assert not torch.equal(model(x, EDGES), model(x, EDGES))


# -- other cities, adapters, compilers ------------------------------------------------------------------------------


def test_vectors_of_another_city_differ_from_node_to_node_and_keep_mean_and_spread() -> None:
    model = small()
    other = rebuild(model, 500)
    for name in ("source_vectors", "target_vectors"):
        old, new = model.get_submodule(name).weight, other.get_submodule(name).weight
        assert new.shape == (500, 3)
        assert (new.mean(0) - old.mean(0)).abs().max() < 0.2
        assert (new.std(0) / old.std(0, correction=0) - 1).abs().max() < 0.2
    assert not torch.equal(other.source_vectors.weight, other.target_vectors.weight)
    assert other(torch.randn(B, T, 500, 1).double(), EDGES, WEIGHTS).shape == (B, 4, 500, 1)


def test_layouts_of_the_targets_are_those_of_a_probing_forward() -> None:
    model, x = small(num_nodes=11, horizon=9), torch.randn(3, T, 11, 1).double()
    spec = model.stlora_spec
    found = find_layouts(model, x, EDGES, num_nodes=11, target_modules=list(spec.target_modules))
    for key, layout in found.items():
        assert [layout] == [known for name, known in spec.node_layout.items() if f".{key}".endswith(f".{name}")]


def test_adapter_has_every_target_of_every_layer() -> None:
    model = get_peft_model(small(), STLoraConfig(num_nodes=N))
    found = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "nall_B")}
    inside = ("decomposition.backcast", "diffusion.conv.transform", "diffusion.conv.mix", "diffusion.forecast")
    inside += ("inherent.cell", "inherent.forecast")
    inside += ("inherent.attention.query", "inherent.attention.value", "inherent.attention.out")
    assert found == {
        *(f"layers.{i}.{name}" for i in range(2) for name in inside),
        *(f"dynamic_graph.distance.{name}" for name in ("window_1", "window_2", "query", "key")),
        *("embedding", "decompositions.0.backcast", "regression_1", "regression_2"),
    }


def test_compiled_whole_gives_the_same_numbers() -> None:
    model, x = small(num_layers=1), readings()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_same(compiled(x, EDGES, WEIGHTS), model(x, EDGES, WEIGHTS))


def test_exports_with_a_free_batch() -> None:
    model = small(num_layers=1)
    shapes = ({0: torch.export.Dim("batch", min=2)}, None, None)
    program = torch.export.export(model, (readings(), EDGES, WEIGHTS), dynamic_shapes=shapes, strict=False)
    x = torch.cat([readings(), readings()])
    assert_same(program.module()(x, EDGES, WEIGHTS), model(x, EDGES, WEIGHTS))


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "where", "expected", "got", "fix"),
    [
        (
            {"window": 10},
            "window too short",
            "window >= 11: each of the 5 layers takes 2 steps off it",
            "window = 10",
            "give a longer window, fewer layers or a smaller temporal_kernel",
        ),
        (
            {"hidden_channels": 30},
            "hidden_channels out of range",
            "a multiple of heads = 4",
            "hidden_channels = 30",
            "give hidden_channels=32",
        ),
        ({"gap": 13}, "gap out of range", "gap <= horizon = 12", "gap = 13", "give gap=12 or less"),
        ({"dropout": 1.0}, "dropout out of range", "0 <= dropout < 1", "dropout = 1.0", "give a smaller share"),
        (
            {"time_features": "hour"},
            "time_features is unknown",
            "one of 'none', 'day', 'week'",
            "'hour'",
            "name the input's encodings",
        ),
        (
            {"in_channels": 4, "time_features": "week"},
            "too few input channels for time_features='week'",
            "in_channels >= 5: values, then time encodings",
            "in_channels = 4",
            "give the encodings as the last channels, or set time_features='none'",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    change: dict[str, Any], where: str, expected: str, got: str, fix: str
) -> None:
    lines = raised(lambda: D2STGNN(**({"num_nodes": N, "in_channels": 3} | change)))
    assert lines == {"where": f"backbone 'd2stgnn': {where}", "expected": expected, "got": got, "fix": fix}


@pytest.mark.parametrize(
    "key",
    ["gate_channels", "time_emb_size", "spatial_kernel", "temporal_kernel", "gap", "num_layers", "steps_per_day"],
)
def test_sizes_below_one_are_refused(key: str) -> None:
    lines = raised(lambda: D2STGNN(**{"num_nodes": N, "in_channels": 3, key: 0}))
    assert lines["where"] == f"backbone 'd2stgnn': {key} out of range"
    assert (lines["expected"], lines["got"]) == (f"{key} >= 1", f"{key} = 0")


def test_shortest_window_and_widest_gap_are_accepted() -> None:
    model = D2STGNN(num_nodes=N, in_channels=3, window=11, gap=12)
    assert model(torch.zeros(1, 11, N, 3), EDGES).shape == (1, 12, N, 1)
