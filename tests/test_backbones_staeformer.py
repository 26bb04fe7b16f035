"""STAEformer against the paper's formulas, written as loops, and what it knows of times, steps and nodes."""

from __future__ import annotations

import copy
import math
from datetime import datetime, timedelta
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from toys import assert_same, raised

from stlora_peft import STLoraConfig, rebuild
from stlora_peft.backbones import build_backbone
from stlora_peft.backbones.staeformer import AdaptiveEmbedding, SelfAttentionLayer, STAEformer, attend
from stlora_peft.data.windows import time_encoding

B, T, N, H, S = 2, 5, 4, 3, 24  # S: slots of a day
EDGES = torch.tensor([[0, 1, 2], [1, 2, 3]])
START = datetime(2024, 1, 6, 20)  # a Saturday
DEFAULTS: dict[str, Any] = {"num_nodes": N, "in_channels": 5, "time_features": "week"}
NARROW: dict[str, Any] = {"hidden_channels": 4, "emb_size": 6, "heads": 2, "feed_forward_channels": 7}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def small(**options: Any) -> STAEformer:
    """A narrow network in float64, every parameter far from its special values."""
    sizes = DEFAULTS | NARROW | {"window": T, "horizon": H, "steps_per_day": S, "num_layers": 2}
    model = STAEformer(**(sizes | options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def readings(starts: tuple[datetime, ...] = (START, START + timedelta(hours=30)), values: int = 1) -> Tensor:
    """Random values and the clock of windows that start at these hours, ``[b t n c]``."""
    clock = torch.stack([time_encoding(T, 60, start, "week") for start in starts]).double()
    return torch.cat([randn(len(starts), T, N, values), clock[:, :, None].expand(-1, -1, N, -1)], 3)


# -- the formulas, one entry at a time --------------------------------------------------------------------------


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.stack([sum(w * v for w, v in zip(row, x, strict=True)) for row in layer.weight]) + layer.bias


def normalised(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - sum(x) / len(x)
    return norm.weight * centred / torch.sqrt(sum(centred**2) / len(x) + norm.eps) + norm.bias


def attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Softmax of the scaled products of every two rows, head by head."""
    size, out = queries.shape[1] // heads, torch.zeros_like(queries)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i, query in enumerate(queries):
            scores = [torch.exp((query[part] * key[part]).sum() / math.sqrt(size)) for key in keys]
            for score, value in zip(scores, values, strict=True):
                out[i, part] += score / sum(scores) * value[part]
    return out


def transformer_layer(layer: SelfAttentionLayer, rows: Tensor, heads: int) -> Tensor:
    own = layer.attention
    queries, keys, values = (torch.stack([linear(m, x) for x in rows]) for m in (own.query, own.key, own.value))
    out = []
    for x, heard in zip(rows, attention(queries, keys, values, heads), strict=True):
        h = normalised(layer.norm_1, x + linear(own.output, heard))
        inner = linear(layer.feed_forward[0], h).clamp(min=0)
        out.append(normalised(layer.norm_2, h + linear(layer.feed_forward[2], inner)))
    return torch.stack(out)


def embedded(model: STAEformer, x: Tensor, starts: tuple[datetime, ...]) -> Tensor:
    """The input of the first layer, the times read off a calendar."""
    samples = []
    for b, start in enumerate(starts):
        steps = []
        for t in range(T):
            now = start + timedelta(hours=t)
            time = [model.times["day_of_week"].weight[now.weekday()], model.times["time_of_day"].weight[now.hour]]
            steps.append(
                torch.stack(
                    [
                        torch.cat(
                            [linear(model.input_embedding, x[b, t, n]), *time, model.adaptive_embedding.weight[t, n]]
                        )
                        for n in range(N)
                    ]
                )
            )
        samples.append(torch.stack(steps))
    return torch.stack(samples)


@torch.no_grad()
def forecast(model: STAEformer, x: Tensor, starts: tuple[datetime, ...], heads: int = 2) -> Tensor:
    hidden, out = embedded(model, x, starts), torch.zeros(len(x), H, N, model.out_channels, dtype=x.dtype)
    for b in range(len(x)):
        for layer in model.step_layers:
            for n in range(N):
                hidden[b, :, n] = transformer_layer(layer, hidden[b, :, n].clone(), heads)
        for layer in model.node_layers:
            for t in range(T):
                hidden[b, t] = transformer_layer(layer, hidden[b, t].clone(), heads)
        for n in range(N):
            change = linear(model.head, torch.cat([hidden[b, t, n] for t in range(T)]))
            for h in range(H):
                for c in range(model.out_channels):
                    out[b, h, n, c] = change[h * model.out_channels + c] + model.residual * x[b, -1, n, c]
    return out


@pytest.mark.parametrize("along", ["steps", "nodes"])
def test_attend_equals_loops_over_heads_and_entries(along: Any) -> None:
    query, key, value = randn(B, T, N, 6), randn(B, T, N, 6), randn(B, T, N, 6)
    expected = torch.zeros_like(query)
    for b in range(B):
        for row in range(N if along == "steps" else T):
            at = (b, slice(None), row) if along == "steps" else (b, row)
            expected[at] = attention(query[at], key[at], value[at], 3)
    assert_same(attend(query, key, value, 3, along), expected)


@pytest.mark.parametrize("along", ["steps", "nodes"])
@torch.no_grad()
def test_layer_equals_loops_and_mixes_one_axis_only(along: Any) -> None:
    layer, x = SelfAttentionLayer(6, 3, 8, 0.1, along).double().eval(), randn(B, T, N, 6)
    expected = torch.zeros_like(x)
    for b in range(B):
        for row in range(N if along == "steps" else T):
            at = (b, slice(None), row) if along == "steps" else (b, row)
            expected[at] = transformer_layer(layer, x[at], 3)
    assert_same(layer(x), expected)
    moved = x.clone()
    moved[0, 1, 2] += 1
    changed = (layer(moved) - layer(x)).abs().amax(3) > 1e-9
    heard = torch.zeros(B, T, N, dtype=torch.bool)
    heard[(0, slice(None), 2) if along == "steps" else (0, 1)] = True
    assert torch.equal(changed, heard)


def test_dropout_takes_both_summands_of_a_layer_and_not_the_state() -> None:
    layer, x = SelfAttentionLayer(6, 3, 8, 1.0, "nodes").double().train(), randn(B, T, N, 6)
    assert torch.equal(layer(x), layer.norm_2(layer.norm_1(x)))


@torch.no_grad()
def test_embedding_equals_loops_over_a_calendar() -> None:
    starts = (START, START + timedelta(hours=30))
    model, x = small(), readings(starts)
    assert (starts[0] + timedelta(hours=T - 1)).weekday() != starts[0].weekday()  # midnight is inside
    assert_same(model.embed(x), embedded(model, x, starts))


@pytest.mark.parametrize(("channels", "residual"), [(1, True), (2, True), (2, False)])
@torch.no_grad()
def test_forecast_equals_loops(channels: int, residual: bool) -> None:
    starts = (START, START + timedelta(hours=30))
    model = small(in_channels=4 + channels, out_channels=channels, residual=residual)
    x = readings(starts, channels)
    assert_same(model(x, EDGES), forecast(model, x, starts))


# -- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_nodes", "table"), [(170, 163_200), (307, 294_720), (325, 312_000), (883, 847_680)])
def test_parameters_are_those_of_the_paper_but_for_two_more_time_channels(num_nodes: int, table: int) -> None:
    model = STAEformer(**(DEFAULTS | {"num_nodes": num_nodes}))
    own = sum(parameter.numel() for parameter in model.adaptive_embedding.parameters())
    shared = sum(parameter.numel() for parameter in model.parameters()) - own
    assert own == table
    assert shared == 1_060_260 + 2 * 24


def test_defaults_are_the_widths_of_the_paper() -> None:
    model = STAEformer(**DEFAULTS)
    assert model.embed(torch.zeros(1, 12, N, 5)).shape == (1, 12, N, 152)
    assert model.times["time_of_day"].weight.shape == (288, 24)
    assert model.times["day_of_week"].weight.shape == (7, 24)
    assert len(model.step_layers) == len(model.node_layers) == 3
    assert {layer.attention.heads for layer in (*model.step_layers, *model.node_layers)} == {4}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}


@pytest.mark.parametrize(("kind", "tables"), [("none", []), ("day", ["time_of_day"])])
def test_times_that_the_input_does_not_tell_have_no_embedding(kind: str, tables: list[str]) -> None:
    model = small(time_features=kind, in_channels=3)
    assert list(model.times) == tables
    assert model.embed(randn(B, T, N, 3)).shape == (B, T, N, 4 * (1 + len(tables)) + 6)
    assert model(randn(B, T, N, 3), EDGES).shape == (B, H, N, 1)


# -- times, steps and nodes -------------------------------------------------------------------------------------


def test_day_of_the_week_that_is_not_known_has_the_embedding_zero() -> None:
    model, x = small(), readings()
    x[..., 3:] = 0
    assert model.embed(x)[..., 4:8].count_nonzero() == 0
    assert model.embed(x)[..., 8:12].count_nonzero() > 0


@pytest.mark.parametrize("hours", [5, 24])
def test_another_time_is_another_forecast(hours: int) -> None:
    model, x = small(), readings((START,))
    with torch.no_grad():
        model.input_embedding.weight[:, 1:] = 0  # the time only by its tables
    later = torch.cat([x[..., :1], readings((START + timedelta(hours=hours),))[..., 1:]], 3)
    assert (model(later, EDGES) - model(x, EDGES)).abs().max() > 1e-3


def test_edges_have_no_effect() -> None:
    model, x = small(), readings()
    assert torch.equal(model(x, EDGES, randn(3)), model(x, EDGES[:, :0]))


def test_swapping_two_nodes_with_their_vectors_swaps_their_forecasts_and_without_them_does_not() -> None:
    model, x, order = small(), readings(), torch.tensor([0, 3, 2, 1])
    expected = model(x, EDGES)[:, :, order]
    assert (model(x[:, :, order], EDGES) - expected).abs().max() > 1e-3
    with torch.no_grad():
        model.adaptive_embedding.weight.copy_(model.adaptive_embedding.weight[:, order])
    assert_same(model(x[:, :, order], EDGES), expected)


def test_vectors_of_another_city_are_the_mean_over_the_nodes_step_by_step() -> None:
    table = AdaptiveEmbedding(T, N, 3).double()
    new = table.resized(6)
    assert (new.num_nodes, table.num_nodes) == (6, N)
    for t in range(T):
        for n in range(6):
            assert_same(new.weight[t, n], sum(table.weight[t]) / N)
    assert torch.equal(table.resized(N).weight, table.weight)


def test_equal_vectors_of_another_city_part_with_the_first_step() -> None:
    model = rebuild(small(), 6)
    x = torch.cat([readings(), readings()[:, :, :2]], 2)
    assert model.adaptive_embedding.weight.std(1).max() < 1e-15
    model(x, EDGES).abs().sum().backward()
    gradient = model.adaptive_embedding.weight.grad
    assert (gradient.abs().amax(2) > 1e-6).all()
    for n in range(1, 6):
        assert (gradient[:, n] - gradient[:, 0]).abs().max() > 1e-6


def test_forecast_hears_every_step_and_every_node() -> None:
    model, x = small(), readings().requires_grad_()
    model(x, EDGES)[0, 0, 0].sum().backward()
    assert (x.grad[0].abs().amax(2) > 0).all()
    assert x.grad[1].count_nonzero() == 0


def test_calls_leave_nothing_behind_and_dropout_acts_in_training_only() -> None:
    model, x = small(dropout=0.5), readings()
    first, before = model(x, EDGES), copy.deepcopy(model.state_dict())
    assert not torch.equal(model.train()(x, EDGES), first)
    assert torch.equal(model.eval()(x, EDGES), first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- adapters and compilers -------------------------------------------------------------------------------------


def test_adapter_has_the_queries_values_feed_forwards_and_the_head_of_every_layer() -> None:
    model = get_peft_model(small(), STLoraConfig(num_nodes=6))
    found = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "nall_B")}
    inside = ("attention.query", "attention.value", "feed_forward.0", "feed_forward.2")
    layers = [f"{stack}.{i}" for stack in ("step_layers", "node_layers") for i in range(2)]
    assert found == {"head", *(f"{layer}.{name}" for layer in layers for name in inside)}


@pytest.mark.parametrize("layer", ["attention.key", "attention.output", "input_embedding"])
def test_the_other_linear_maps_can_be_adapted_too(layer: str) -> None:
    config = STLoraConfig(num_nodes=N, target_modules=[layer], node_layout={layer: "b t n c"}, init_weights=False)
    backbone, x = small(), readings()
    expected = backbone(x, EDGES)
    assert (get_peft_model(backbone, config).eval()(x, EDGES) - expected).abs().max() > 1e-4


def test_compiled_whole_gives_the_same_numbers() -> None:
    model, x = small(num_layers=1), readings()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_same(compiled(x, EDGES), model(x, EDGES))


def test_exports_with_a_free_batch() -> None:
    model = small(num_layers=1)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(model, (readings(), EDGES), dynamic_shapes=(batch, None), strict=False)
    x = readings(tuple(START + timedelta(hours=7 * i) for i in range(4)))
    assert_same(program.module()(x, EDGES), model(x, EDGES))


# -- refusals ---------------------------------------------------------------------------------------------------


def test_time_features_that_are_unknown_are_refused() -> None:
    assert raised(lambda: build_backbone("staeformer", **(DEFAULTS | {"time_features": "hour"}))) == {
        "where": "backbone 'staeformer': time_features is unknown",
        "expected": "one of 'none', 'day', 'week'",
        "got": "'hour'",
        "fix": "name the input's encodings",
    }


@pytest.mark.parametrize(("residual", "least"), [(True, 6), (False, 5)])
def test_time_features_that_leave_too_few_values_are_refused(residual: bool, least: int) -> None:
    options = DEFAULTS | {"out_channels": 2, "residual": residual}
    assert raised(lambda: STAEformer(**(options | {"in_channels": 4}))) == {
        "where": "backbone 'staeformer': too few input channels for time_features='week'",
        "expected": f"in_channels >= {least}: values, then time encodings",
        "got": "in_channels = 4",
        "fix": "give the encodings as the last channels, or set time_features='none'",
    }
    assert STAEformer(**(options | {"in_channels": least})).values == least - 4


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    assert raised(lambda: STAEformer(**DEFAULTS, heads=5)) == {
        "where": "backbone 'staeformer': heads out of range",
        "expected": "a divisor of 152, the widths of all embeddings together",
        "got": "heads = 5",
        "fix": "give another number of heads, hidden_channels or emb_size",
    }


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_that_is_no_share_is_refused(dropout: float) -> None:
    assert raised(lambda: STAEformer(**DEFAULTS, dropout=dropout)) == {
        "where": "backbone 'staeformer': dropout out of range",
        "expected": "0 <= dropout < 1",
        "got": f"dropout = {dropout}",
        "fix": "give a smaller share",
    }


@pytest.mark.parametrize(
    "key",
    ["num_nodes", "hidden_channels", "emb_size", "num_layers", "heads", "feed_forward_channels", "steps_per_day"],
)
def test_size_below_one_is_refused(key: str) -> None:
    assert raised(lambda: STAEformer(**(DEFAULTS | {key: 0}))) == {
        "where": f"backbone 'staeformer': {key} out of range",
        "expected": f"{key} >= 1",
        "got": f"{key} = 0",
        "fix": f"give a larger {key}",
    }


def test_other_nodes_than_those_of_the_adaptive_embedding_are_refused() -> None:
    model = small()
    assert raised(lambda: model(readings()[:, :, :3], EDGES)) == {
        "where": "backbone 'staeformer': wrong number of nodes",
        "expected": "N=4 on axis 'n' of 'b t n c', the number of nodes that 'adaptive_embedding' was built for",
        "got": "N=3 from an input of shape (2, 5, 3, 5)",
        "fix": "adapt it to the new city with STLoraConfig(num_nodes=3), or build it with num_nodes=3",
    }
