"""The diffusion convolution of DCRNN: the paper's formula, torch-geometric-temporal's numbers, and the warning."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from stlora_peft.backbones import tgt
from stlora_peft.backbones.recurrent.diffusion import BatchedDCRNNForecaster, DCRNNForecaster
from stlora_peft.backbones.recurrent.diffusion_conv import DiffusionConv, exact_norms, upstream_norms

dcrnn: Any = tgt.load().nn.recurrent.dcrnn
N = 6
RING = torch.stack([torch.arange(N), (torch.arange(N) + 1) % N])
PAIRS = torch.cat([RING, RING.flip(0)], 1)
SORTED = PAIRS[:, (PAIRS[0] * N + PAIRS[1]).argsort()]  # symmetric, in the order of its sources
CHORDS = torch.tensor([[0, 2, 5, 3], [3, 4, 1, 0]])
GRAPHS: dict[str, tuple[Tensor, Tensor]] = {
    "symmetric": (SORTED, torch.ones(2 * N)),
    "weighted": (SORTED, torch.linspace(0.5, 2, 2 * N)),
    "shuffled": (SORTED[:, torch.randperm(2 * N, generator=torch.Generator().manual_seed(0))], torch.ones(2 * N)),
    "directed": (torch.cat([RING, CHORDS], 1), torch.linspace(0.5, 2, N + 4)),
}
SOURCE = torch.tensor([[0, 1, 2, 1], [1, 2, 1, 3]]), torch.tensor([0.5, 1.0, 2.0, 1.0])
"""Edges that leave node 0, which none enters; node 3 is left by none; nodes 4 and 5 have no edge."""
graphs = pytest.mark.parametrize("graph", GRAPHS)
both = pytest.mark.parametrize("forecaster", [DCRNNForecaster, BatchedDCRNNForecaster])


def paper(conv: DiffusionConv, x: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of (D_O^-1 W)^k x Theta_k,1 + (D_I^-1 W^T)^k x Theta_k,2, node by node."""
    W = torch.zeros(len(x), len(x), dtype=x.dtype)
    for (i, j), weight in zip(edges.t().tolist(), weights, strict=True):
        W[i, j] += weight
    out = conv.bias.expand(len(x), -1).clone()
    for direction, adjacency in enumerate((W, W.t())):
        walk = x
        for k in range(conv.weight.shape[1]):
            out += walk @ conv.weight[direction, k]
            step = torch.zeros_like(walk)
            for i in range(len(x)):
                for j in range(len(x)):
                    if adjacency[i, j] != 0:
                        step[i] += adjacency[i, j] / adjacency[i].sum() * walk[j]
            walk = step
    return out


def build(forecaster: Any, **options: Any) -> Any:
    sizes = {"in_channels": 2, "out_channels": 1, "window": 3, "horizon": 2, "hidden_channels": 4}
    return forecaster(**{**sizes, **options})


# the convolution


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("graph", [*GRAPHS, "source", "parallel", "none"])
def test_exact_diffusion_equals_the_formula_node_by_node(graph: str, K: int) -> None:
    edges, weights = {
        **GRAPHS,
        "source": SOURCE,
        "parallel": (RING.repeat(1, 2), torch.linspace(0, 1, 2 * N)),  # one of them of weight zero
        "none": (torch.zeros(2, 0, dtype=torch.long), torch.zeros(0)),
    }[graph]
    conv, weights = DiffusionConv(2, 3, K, exact=True).double(), weights.double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(N, 2, dtype=torch.float64)
    torch.testing.assert_close(
        conv(x, edges, exact_norms(edges, weights, N)), paper(conv, x, edges, weights), rtol=0, atol=1e-12
    )


@graphs
@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("original", ["DConv", "BatchedDConv"])
def test_upstream_diffusion_equals_the_original(graph: str, K: int, original: str) -> None:
    edges, weights = GRAPHS[graph]
    conv, theirs, x = DiffusionConv(2, 3, K, exact=False), getattr(dcrnn, original)(2, 3, K), torch.randn(N, 2)
    torch.nn.init.normal_(conv.bias)
    theirs.load_state_dict(conv.state_dict())
    ours = conv(x, edges, upstream_norms(edges, weights, N))
    torch.testing.assert_close(ours, theirs(x, edges, weights), rtol=0, atol=1e-5)


def test_upstream_diffusion_of_parallel_edges_equals_the_batched_original() -> None:
    edges, weights = RING.repeat(1, 2), torch.linspace(0, 1, 2 * N)
    conv, theirs, x = DiffusionConv(2, 3, 2, exact=False), dcrnn.BatchedDConv(2, 3, 2), torch.randn(N, 2)
    theirs.load_state_dict(conv.state_dict())
    ours = conv(x, edges, upstream_norms(edges, weights, N))
    torch.testing.assert_close(ours, theirs(x, edges, weights), rtol=0, atol=1e-6)


def test_norms_of_a_symmetric_sorted_graph_without_weights_agree() -> None:
    edges, weights = GRAPHS["symmetric"]
    torch.testing.assert_close(upstream_norms(edges, weights, N), exact_norms(edges, weights, N))


def test_exact_norms_let_gradients_through_to_the_weights() -> None:
    edges, weights = SOURCE
    weights = weights.clone().requires_grad_()
    exact_norms(edges, weights, N).square().sum().backward()
    assert weights.grad.isfinite().all()
    assert weights.grad.abs().sum() > 0


# the forecasters


@both
def test_a_node_that_no_edge_enters_is_finite_with_exact_diffusion_only(forecaster: Any) -> None:
    x = torch.randn(2, 3, N, 2)
    exact = build(forecaster, exact_diffusion=True)
    forecast = exact(x, *SOURCE)
    forecast.square().sum().backward()
    assert forecast.isfinite().all()
    assert all(p.grad.isfinite().all() for p in exact.parameters())
    with pytest.warns(UserWarning, match="1 of them infinite"):
        assert not build(forecaster)(x, *SOURCE).isfinite().all()


@both
@pytest.mark.filterwarnings("ignore:backbone")
def test_the_order_of_the_edges_matters_without_exact_diffusion_only(forecaster: Any) -> None:
    x, (edges, weights) = torch.randn(2, 3, N, 2), GRAPHS["directed"]
    for exact in (False, True):
        model = build(forecaster, exact_diffusion=exact)
        moved = (model(x, edges, weights) - model(x, edges.flip(1), weights.flip(0))).abs().max()
        assert moved < 1e-6 if exact else moved > 1e-3


@both
def test_a_graph_with_wrong_numbers_is_warned_of_once(forecaster: Any) -> None:
    model, x = build(forecaster), torch.zeros(1, 3, N, 2)
    expected = (
        f"backbone '{model.name}': torch-geometric-temporal's diffusion is wrong on this graph.\n"
        "  expected: each edge weighted by its share in the degree of its source, and in that of its target\n"
        "  got:      other weights for 2 and 3 of 4 edges, 1 of them infinite\n"
        "  to fix:   build it with exact_diffusion=True and train it so; weights trained without it need the numbers "
        "as they are, which are finite if every node that edges leave has one that enters, e.g. a self-loop"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(expected)}$"):
        model(x, *SOURCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, *SOURCE)


@both
@pytest.mark.parametrize(
    ("graph", "options"), [("symmetric", {}), ("directed", {"exact_diffusion": True}), ("directed", {"K": 1})]
)
def test_a_graph_with_right_numbers_is_passed_over(forecaster: Any, graph: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(forecaster, **options)(torch.zeros(1, 3, N, 2), *GRAPHS[graph])


def test_a_city_with_the_same_edges_and_more_nodes_gets_its_own_numbers() -> None:
    model, (edges, weights) = build(BatchedDCRNNForecaster), GRAPHS["symmetric"]
    x = torch.randn(2, 3, N + 3, 2)
    alone = model(x[:1], edges, weights)
    model(x[:, :, :N], edges, weights)
    torch.testing.assert_close(model(x, edges, weights)[:1], alone, rtol=0, atol=1e-6)


def test_the_originals_numbers_go_stale_in_a_city_with_the_same_edges_and_more_nodes() -> None:
    cell, (edges, weights) = dcrnn.BatchedDCRNN(2, 4, 2), GRAPHS["symmetric"]
    x = torch.randn(2, 3, N + 3, 2)
    fresh = cell(x, edges, weights)
    cell(x[:1, :, :N], edges, weights)  # another batch, so that the cache is rebuilt
    cell(x[:, :, :N], edges, weights)
    assert (cell(x, edges, weights) - fresh).abs().max() > 1e-2
