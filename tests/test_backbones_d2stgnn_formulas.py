"""The blocks of D2STGNN, and the whole network, against their formulas as plain loops in float64."""

from __future__ import annotations

from datetime import datetime

import pytest
import torch
from d2stgnn_loops import (
    EDGES,
    WEIGHTS,
    B,
    D,
    F,
    N,
    T,
    convolved,
    diffused,
    gated,
    graphs,
    inherent,
    marked,
    peeled,
    position,
    powers_without_diagonal,
    randn,
    ready,
    relu,
    rest,
    road_matrices,
    same,
    weighted,
)

from stlora_peft.backbones.d2stgnn import D2STGNN
from stlora_peft.backbones.d2stgnn.decoupling import Decomposition, EstimationGate
from stlora_peft.backbones.d2stgnn.diffusion import DiffusionBlock, LocalisedConv
from stlora_peft.backbones.d2stgnn.dynamic_graph import DynamicGraph, adaptive, localised
from stlora_peft.backbones.d2stgnn.inherent import InherentBlock, positions
from stlora_peft.backbones.graphs import transition
from stlora_peft.data.windows import time_encoding

# -- graphs -----------------------------------------------------------------------------------------------------


def test_transition_matrices_of_the_road_graph_hear_along_and_against_the_edges() -> None:
    road = torch.zeros(N, N).double().index_put((EDGES[0], EDGES[1]), WEIGHTS)
    along, against = road_matrices()
    same(transition(road.T), along)
    same(transition(road), against)
    assert along[1].tolist() == [1, 0, 0, 0, 0]  # node 1 hears node 0, where its only edge begins
    assert along[3:].abs().sum() == against[3:].abs().sum() == 0


@pytest.mark.parametrize("order", [1, 2, 3])
def test_localised_matrices_equal_powers_without_their_diagonals(order: int) -> None:
    matrix = randn(N, N)
    for found, expected in zip(localised(matrix, order), powers_without_diagonal(matrix, order), strict=True):
        same(found, expected)
    assert len(localised(matrix, order)) == order


def test_adaptive_matrix_equals_the_softmax_over_the_nodes_that_are_heard() -> None:
    sources, targets = randn(N, 3), randn(N, 3)
    found = adaptive(sources, targets)
    for i in range(N):
        weights = torch.stack([torch.exp(relu(targets[i] @ sources[j])) for j in range(N)])
        same(found[i], weights / weights.sum())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dynamic_graph_equals_the_loops_over_pairs_of_nodes(order: int) -> None:
    module = ready(DynamicGraph(7, D, 2, 3, order, 0.1))
    road = torch.zeros(N, N).double().index_put((EDGES[0], EDGES[1]), WEIGHTS)
    windows, time, sources, targets = randn(B, N, 7), randn(B, 2), randn(N, 3), randn(N, 3)
    found = module(road, windows, time, sources, targets)
    for b in range(B):
        expected = graphs(module, windows[b], time[b], sources, targets)
        for matrix, reference in zip(found, expected, strict=True):
            same(matrix[b], reference)


# -- gate and decomposition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [T, T - 2])
def test_estimation_gate_equals_the_loop_over_nodes_and_steps(steps: int) -> None:
    gate = ready(EstimationGate(3, 4, 6))
    x, times, places = randn(B, N, steps, D), randn(B, T, 3), randn(N, 4)
    same(gate(x, times, places), torch.stack([gated(gate, x[b], times[b], places) for b in range(B)]))


def test_decomposition_equals_the_loop_over_nodes_and_steps() -> None:
    module = ready(Decomposition(D))
    x, states = randn(B, N, T, D), randn(B, N, T - 2, D)
    same(module(x, states), torch.stack([rest(module, x[b], states[b]) for b in range(B)]))


# -- diffusion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_localised_convolution_equals_the_product_with_repeated_matrices(kernel_size: int) -> None:
    conv = ready(LocalisedConv(D, kernel_size, 3, 0.1))
    x, matrices = randn(B, N, T, D), randn(3, B, N, N)
    found = conv(x, list(matrices))
    same(found, torch.stack([convolved(conv, x[b], list(matrices[:, b])) for b in range(B)]))


@pytest.mark.parametrize(("kernel_size", "strides"), [(1, 3), (2, 1), (3, 2), (3, 6)])
def test_diffusion_block_equals_the_states_fed_back_one_by_one(kernel_size: int, strides: int) -> None:
    block = ready(DiffusionBlock(D, F, strides, kernel_size, 2, 0.1))
    x, matrices = randn(B, N, T, D), randn(2, B, N, N)
    states, forecast = block(x, list(matrices))
    assert forecast.shape == (B, N, strides, F)
    for b in range(B):
        expected = diffused(block, x[b], list(matrices[:, b]))
        same(states[b], expected[0])
        same(forecast[b], expected[1])


# -- inherent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 4, 5])
def test_positions_equal_sines_and_cosines(width: int) -> None:
    same(positions(7, width, randn(1)), torch.stack([position(t, width) for t in range(7)]))


@pytest.mark.parametrize(("heads", "strides"), [(1, 1), (2, 3), (4, 2)])
def test_inherent_block_equals_the_loop_over_nodes_steps_and_heads(heads: int, strides: int) -> None:
    block, x = ready(InherentBlock(D, F, strides, heads, 0.1)), randn(B, N, T, D)
    answers, forecast = block(x, positions(T + 9, D, x))
    for b in range(B):
        expected = inherent(block, x[b])
        same(answers[b], expected[0])
        same(forecast[b], expected[1])


# -- the whole network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_whole_network_equals_the_loops(num_layers: int, residual: bool) -> None:
    sizes = {"hidden_channels": D, "forecast_channels": F, "head_channels": 6, "emb_size": 3, "time_emb_size": 2}
    model = ready(
        D2STGNN(
            num_nodes=N,
            in_channels=6,
            out_channels=2,
            window=T,
            horizon=5,  # two strides, of which the second is cut
            num_layers=num_layers,
            heads=2,
            time_features="week",
            steps_per_day=24,
            residual=residual,
            **sizes,
        )
    )
    clock = torch.stack([time_encoding(T, 60, datetime(2024, 1, day, 21), "week") for day in (7, 10)]).double()
    values = randn(B, T, N, 2)
    sources, targets = model.source_vectors.weight.data.normal_(), model.target_vectors.weight.data.normal_()
    found = model(torch.cat([values, clock[:, :, None].expand(-1, -1, N, -1)], 3), EDGES, WEIGHTS)
    for b in range(B):
        times, windows = marked(model.time_vectors, clock[b]), values[b].transpose(0, 1).flatten(1)
        matrices = graphs(model.dynamic_graph, windows, times[-1], sources, targets)
        series = torch.stack([torch.stack([weighted(model.embedding, v) for v in step]) for step in values[b]], 1)
        ahead = torch.zeros(N, 2, F).double()
        for i, layer in enumerate(model.layers):
            places = torch.cat([sources, targets], 1)
            series, states, forecast = peeled(layer, series, matrices, times, places)
            ahead = ahead + forecast
            series = rest(model.decompositions[i], series, states) if i < num_layers - 1 else series
        for h in range(5):
            for n in range(N):
                made = weighted(model.regression_1, relu(ahead[n, h // 3]))
                expected = weighted(model.regression_2, relu(made))[2 * (h % 3) : 2 * (h % 3) + 2]
                same(found[b, h, n], expected + values[b, -1, n] if residual else expected)
