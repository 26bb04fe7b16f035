"""Graph WaveNet against its formulas as plain loops, its size against the published one, and what it hears."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import raised

from stlora_peft import rebuild
from stlora_peft.backbones import gwnet
from stlora_peft.backbones.gwnet import GraphWaveNet

N, B, T, C = 5, 2, 6, 3
EDGES = torch.tensor([[0, 0, 1, 2, 2], [1, 2, 2, 0, 2]])  # one way but for 0 and 2; nothing leads to or from 3 and 4
WEIGHTS = torch.tensor([0.5, 2.0, 1.5, 0.25, 1.0], dtype=torch.float64)
SMALL: dict[str, Any] = {"hidden_channels": 3, "skip_channels": 4, "end_channels": 5, "emb_size": 2}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def small(**options: Any) -> GraphWaveNet:
    """A narrow network in evaluation mode and float64 whose normalisation has statistics of its own."""
    model = GraphWaveNet(**({"num_nodes": N, "in_channels": 2, "window": T, "horizon": 3} | SMALL | options))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data.add_(torch.rand_like(value))
    return model.double().eval()


# -- the formulas as loops, [b c t n] ------------------------------------------------------------------------


def linear(conv: nn.Conv2d, x: list[Tensor]) -> Tensor:
    """Sum over the steps that the kernel touches, ``x`` one vector for each."""
    out = conv.bias.clone()
    for k, value in enumerate(x):
        out += conv.weight[:, :, k, 0] @ value
    return out


def gated(layer: gwnet.GatedConv, x: Tensor) -> tuple[Tensor, Tensor]:
    (size, _), (dilation, _) = layer.filter_conv.kernel_size, layer.filter_conv.dilation
    cut = (size - 1) * dilation
    z = x.new_zeros(x.shape[0], layer.filter_conv.out_channels, x.shape[2] - cut, x.shape[3])
    read = x.new_zeros(x.shape[0], layer.skip_conv.out_channels, 1, x.shape[3])
    for b in range(x.shape[0]):
        for n in range(x.shape[3]):
            for t in range(cut, x.shape[2]):
                past = [x[b, :, t - (size - 1 - k) * dilation, n] for k in range(size)]
                z[b, :, t - cut, n] = linear(layer.filter_conv, past).tanh() * linear(layer.gate_conv, past).sigmoid()
            read[b, :, 0, n] = linear(layer.skip_conv, [z[b, :, -1, n]])
    return z, read


def road_matrices(num_nodes: int) -> list[Tensor]:
    """What each node hears along the edges and against them, as a mean."""
    along, against = torch.zeros(2, num_nodes, num_nodes, dtype=torch.float64)
    for source, target, weight in zip(*EDGES.tolist(), WEIGHTS.tolist(), strict=True):
        along[target, source] += weight
        against[source, target] += weight
    for matrix in (along, against):
        for n in range(num_nodes):
            if matrix[n].sum() > 0:
                matrix[n] /= matrix[n].sum()
    return [along, against]


def learned_matrix(first: Tensor, second: Tensor) -> Tensor:
    first, second = first.detach(), second.detach()
    matrix = first.new_zeros(len(first), len(second))
    for i in range(len(first)):
        powers = [math.exp(max(0.0, float(first[i] @ second[j]))) for j in range(len(second))]
        for j, power in enumerate(powers):
            matrix[i, j] = power / sum(powers)
    return matrix


def diffused(conv: gwnet.DiffusionConv, x: Tensor, matrices: list[Tensor]) -> Tensor:
    weights = conv.mix.weight[:, :, 0, 0].split(x.shape[1], 1)
    out = x.new_zeros(x.shape[0], conv.mix.out_channels, *x.shape[2:])
    for b in range(x.shape[0]):
        for t in range(x.shape[2]):
            rows = x[b, :, t].T  # [n c]
            total = rows @ weights[0].T + conv.mix.bias
            for m, matrix in enumerate(matrices):
                for k in range(1, conv.order + 1):
                    hop = torch.linalg.matrix_power(matrix, k) @ rows
                    total = total + hop @ weights[m * conv.order + k].T
            out[b, :, t] = total.T
    return out


def normed(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        scale = norm.weight[c] / (norm.running_var[c] + norm.eps).sqrt()
        out[:, c] = (x[:, c] - norm.running_mean[c]) * scale + norm.bias[c]
    return out


def forecast(model: GraphWaveNet, x: Tensor, matrices: list[Tensor]) -> Tensor:
    """The whole network, ``[b t n c]`` in and out, without the residual of the forecasters."""
    steps = max(model.receptive_field, x.shape[1])
    hidden = x.new_zeros(x.shape[0], model.start_conv.out_channels, steps, x.shape[2])
    for b in range(x.shape[0]):
        for n in range(x.shape[2]):
            for t in range(steps):
                at = t - (steps - x.shape[1])
                value = x[b, at, n] if at >= 0 else torch.zeros_like(x[b, 0, n])
                hidden[b, :, t, n] = linear(model.start_conv, [value])
    skip: Any = 0
    for i, layer in enumerate(model.gated_convs):
        z, read = gated(layer, hidden)
        skip = skip + read
        if i < len(model.graph_layers):
            graph, kept = model.graph_layers[i], hidden[:, :, hidden.shape[2] - z.shape[2] :]
            hidden = normed(graph.norm, diffused(graph.graph_conv, z, matrices) + kept)
    out = x.new_zeros(x.shape[0], model.horizon, x.shape[2], model.out_channels)
    for b in range(x.shape[0]):
        for n in range(x.shape[2]):
            end = linear(model.end_conv_1, [skip[b, :, 0, n].relu()]).relu()
            out[b, :, n] = linear(model.end_conv_2, [end]).view(model.horizon, model.out_channels)
    return out


# -- blocks and network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_gated_conv_equals_its_formula(kernel_size: int, dilation: int) -> None:
    layer, x = gwnet.GatedConv(C, 4, kernel_size, dilation).double(), randn(B, C, T, N)
    for found, expected in zip(layer(x), gated(layer, x), strict=True):
        same(found, expected)


@pytest.mark.parametrize(("num_matrices", "order"), [(1, 1), (3, 2), (2, 3)])
def test_diffusion_conv_equals_its_formula(num_matrices: int, order: int) -> None:
    conv, x = gwnet.DiffusionConv(C, num_matrices, order).double(), randn(B, C, T, N)
    matrices = [randn(N, N) for _ in range(num_matrices)]
    same(conv(x, matrices), diffused(conv, x, matrices))


def test_transitions_equal_their_formulas_and_are_zero_at_an_isolated_node() -> None:
    module = gwnet.AdaptiveTransitions(N, 3).double()
    road = torch.zeros(N, N, dtype=torch.float64)
    road[EDGES[0], EDGES[1]] = WEIGHTS
    expected = [*road_matrices(N), learned_matrix(module.embedding_1.weight, module.embedding_2.weight)]
    for found, matrix in zip(module(road), expected, strict=True):
        same(found, matrix)
    assert module(road)[0][3:].abs().sum() == module(road)[1][3:].abs().sum() == 0
    for found, matrix in zip(gwnet.RoadTransitions()(road), expected[:2], strict=True):
        same(found, matrix)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 2, "num_layers": 2},  # sees seven steps, one of them padding
        {"num_blocks": 1, "num_layers": 2, "kernel_size": 3, "order": 1, "out_channels": 2},
        {"num_blocks": 1, "num_layers": 1},  # sees two of the six steps, and no graph
    ],
)
def test_network_equals_its_formula(adaptive: bool, options: dict[str, Any]) -> None:
    model, x = small(adaptive=adaptive, residual=False, **options), randn(B, T, N, 2)
    matrices = road_matrices(N)
    if adaptive:
        matrices.append(learned_matrix(*(getattr(model.transitions, f"embedding_{i}").weight for i in (1, 2))))
    same(model(x, EDGES, WEIGHTS), forecast(model, x, matrices))


def test_defaults_see_thirteen_steps_by_eight_layers_of_dilation_one_and_two() -> None:
    model = GraphWaveNet(num_nodes=N, in_channels=2)
    assert model.receptive_field == 13
    assert [layer.filter_conv.dilation for layer in model.gated_convs] == [(1, 1), (2, 1)] * 4
    assert {layer.dropout.p for layer in model.graph_layers} == {0.3}


@pytest.mark.parametrize(("num_nodes", "published"), [(207, 309_400), (307, 311_400)])
def test_parameters_are_the_published_ones_without_those_that_nothing_reads(num_nodes: int, published: int) -> None:
    """METR-LA, and PEMS04 with its hundred nodes more; both are the 0.31 M of the published tables."""
    never_called = 8 * (32 * 32 + 32)  # convolutions of width one, in the place of the diffusion where there is none
    after_the_last_layer = (7 * 32 * 32 + 32) + 2 * 32
    model = GraphWaveNet(num_nodes=num_nodes, in_channels=2)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == published - never_called - after_the_last_layer
    assert 0.94 < found / published < 0.96


def test_every_parameter_gets_a_gradient() -> None:
    model = small().train()
    model(randn(B, T, N, 2), EDGES, WEIGHTS).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# -- what it hears ----------------------------------------------------------------------------------------------


def heard(model: GraphWaveNet, x: Tensor, edges: Tensor, node: int) -> list[int]:
    """Nodes whose forecast changes with the readings of ``node``."""
    moved = x.clone()
    moved[:, :, node] += 1
    difference = (model(moved, edges) - model(x, edges)).abs().amax((0, 1, 3))
    return (difference > 1e-9).nonzero().flatten().tolist()


def test_messages_go_along_the_edges_and_against_them_by_different_weights() -> None:
    model = small(adaptive=False, num_blocks=1, num_layers=2, order=1, residual=False)  # one graph convolution
    x, chain = randn(1, T, N, 2), torch.tensor([[0, 1, 2], [1, 2, 3]])
    assert heard(model, x, chain, 1) == [0, 1, 2]
    weight = model.graph_layers[0].graph_conv.mix.weight.data
    against = weight[:, 6:].clone()
    weight[:, 6:] = 0
    assert heard(model, x, chain, 1) == [1, 2]
    weight[:, 6:], weight[:, 3:6] = against, 0
    assert heard(model, x, chain, 1) == [0, 1]


def test_an_order_of_two_reaches_two_edges_far() -> None:
    model = small(adaptive=False, num_blocks=1, num_layers=2, residual=False)
    x, chain = randn(1, T, N, 2), torch.tensor([[0, 1, 2], [1, 2, 3]])
    assert heard(model, x, chain, 0) == [0, 1, 2]


def test_learned_graph_joins_all_nodes_without_any_edge_and_follows_the_tables() -> None:
    model, x, none = small(), randn(1, T, N, 2), EDGES[:, :0]
    assert heard(model, x, none, 3) == [0, 1, 2, 3, 4]
    before = model(x, none)
    assert before.isfinite().all()
    for table in (model.transitions.embedding_1, model.transitions.embedding_2):
        kept = table.weight.data.clone()
        table.weight.data[2] += 1
        assert (model(x, none) - before).abs().max() > 1e-6
        table.weight.data = kept


def test_adaptive_off_binds_nothing_to_the_nodes() -> None:
    model = small(adaptive=False)
    assert model(randn(1, T, N + 3, 2), EDGES, WEIGHTS).shape == (1, 3, N + 3, 1)
    difference = raised(lambda: small()(randn(1, T, N + 3, 2), EDGES, WEIGHTS))
    assert difference["where"] == "backbone 'gwnet': wrong number of nodes"
    assert difference["expected"].startswith("N=5 on axis 'n' of 'b t n c'")


def test_another_city_gets_a_graph_that_is_not_uniform_and_has_gradients() -> None:
    city = rebuild(small(), 8)
    graph = city.transitions(torch.zeros(8, 8, dtype=torch.float64))[2]
    assert (graph - 1 / 8).abs().max() > 0.05
    graph[0, 1].backward()
    assert city.transitions.embedding_1.weight.grad.abs().sum() > 0


def test_gated_conv_is_causal() -> None:
    layer, x = gwnet.GatedConv(C, 4, 2, 2).double(), randn(1, C, T, N)
    z, _ = layer(x)
    later = x.clone()
    later[:, :, 4:] += 1
    changed = (layer(later)[0] - z).abs().amax((0, 1, 3)) > 0
    assert changed.tolist() == [False, False, True, True]  # steps 2 to 5


def test_steps_before_the_receptive_field_have_no_effect() -> None:
    model = small(num_blocks=1, num_layers=2)  # sees four of six steps
    x = randn(1, T, N, 2).requires_grad_()
    model(x, EDGES, WEIGHTS).sum().backward()
    assert (x.grad.abs().sum((0, 2, 3)) > 0).tolist() == [False, False, True, True, True, True]


def test_dropout_acts_in_training_only() -> None:
    model, x = small(dropout=0.5), randn(B, T, N, 2)
    assert torch.equal(model(x, EDGES), model(x, EDGES))
    for norm in (layer.norm for layer in model.graph_layers):
        norm.momentum = 0.0
    model.train()
    assert not torch.equal(model(x, EDGES), model(x, EDGES))


# -- compilers and refusals -------------------------------------------------------------------------------------


def test_compiled_whole_gives_the_same_numbers() -> None:
    model, x = small(num_blocks=1), randn(B, T, N, 2)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    same(compiled(x, EDGES, WEIGHTS), model(x, EDGES, WEIGHTS))


def test_exports_with_a_free_batch() -> None:
    model, inputs = small(num_blocks=1), (randn(B, T, N, 2), EDGES, WEIGHTS)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(model, inputs, dynamic_shapes=(batch, None, None), strict=False)
    x = randn(4, T, N, 2)
    same(program.module()(x, EDGES, WEIGHTS), model(x, EDGES, WEIGHTS))


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_that_is_no_share_is_refused(dropout: float) -> None:
    assert raised(lambda: GraphWaveNet(num_nodes=N, in_channels=2, dropout=dropout)) == {
        "where": "backbone 'gwnet': dropout out of range",
        "expected": "0 <= dropout < 1",
        "got": f"dropout = {dropout}",
        "fix": "give a smaller share",
    }


@pytest.mark.parametrize("key", ["num_nodes", "num_layers", "kernel_size", "order"])
def test_size_below_one_is_refused(key: str) -> None:
    assert raised(lambda: GraphWaveNet(**({"num_nodes": N, "in_channels": 2} | {key: 0}))) == {
        "where": f"backbone 'gwnet': {key} out of range",
        "expected": f"{key} >= 1",
        "got": f"{key} = 0",
        "fix": f"give a larger {key}",
    }
