"""The fast STConv and ChebConv against the originals, and the STGCN built from them."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stlora_peft.backbones import STGCN, tgt
from stlora_peft.backbones.chebyshev import CachedChebConv
from stlora_peft.backbones.propagation import Propagation, PropagationCache, dense_is_faster
from stlora_peft.backbones.stconv import STConv

Original = tgt.load().nn.STConv
ChebConv = type(Original(2, 1, 1, 1, 1, 1)._graph_conv)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
N = 11


def random_graph(edges: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Directed graph with self-loops and parallel edges, whose last two nodes are isolated."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(0, N - 2, (2, edges), generator=generator)
    return edge_index, torch.rand(edges, generator=generator) + 0.1


def symmetric_graph() -> tuple[Tensor, Tensor]:
    edge_index, edge_weight = random_graph(15)
    return torch.cat([edge_index, edge_index.flip(0)], 1), edge_weight.repeat(2)


GRAPHS: dict[str, tuple[Tensor, Tensor]] = {
    "sparse directed": random_graph(25),
    "crowded directed": random_graph(150),
    "symmetric": symmetric_graph(),
    "no edges": (torch.empty(2, 0, dtype=torch.long), torch.empty(0)),
}
graphs = pytest.mark.parametrize("graph", GRAPHS)


def same_weights(fast: nn.Module, original: nn.Module) -> None:
    fast.load_state_dict(original.state_dict())


def gradients(model: nn.Module, x: Tensor, *graph: Any, **more: Any) -> tuple[Tensor, ...]:
    """Output, and gradients of a fixed random projection of it for the input and every parameter."""
    x = x.clone().requires_grad_()
    y = model(x, *graph, **more)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) / y.numel()
    return y, *torch.autograd.grad((y * weight).sum(), [x, *model.parameters()], allow_unused=True)


def assert_same(fast: tuple[Tensor | None, ...], original: tuple[Tensor | None, ...], atol: float) -> None:
    for ours, theirs in zip(fast, original, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, equal_nan=True)


# STConv


def test_stconv_has_the_state_dict_of_the_original() -> None:
    fast, original = STConv(N, 2, 4, 3, 3, 3).state_dict(), Original(N, 2, 4, 3, 3, 3).state_dict()
    assert {key: value.shape for key, value in fast.items()} == {key: value.shape for key, value in original.items()}
    assert list(fast) == list(original)


@graphs
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("normalization", "order", "weighted"), [("sym", 3, True), ("rw", 4, True), ("sym", 1, False)]
)
def test_stconv_equals_the_original_forward_backward_and_in_statistics(
    graph: str, dtype: torch.dtype, normalization: str, order: int, weighted: bool
) -> None:
    arguments = (N, 2, 6, 5, 3, order, normalization)
    fast, original = STConv(*arguments).to(dtype), Original(*arguments).to(dtype)
    same_weights(fast, original)
    edge_index, edge_weight = GRAPHS[graph]
    edges = (edge_index, edge_weight.to(dtype)) if weighted else (edge_index,)
    x = torch.randn(3, 8, N, 2, dtype=dtype)
    for _ in range(2):  # the second time with a cached matrix
        assert_same(gradients(fast, x, *edges), gradients(original, x, *edges), TOLERANCE[dtype])
    assert_same(tuple(fast.buffers()), tuple(original.buffers()), TOLERANCE[dtype])


@pytest.mark.parametrize("steps", [5, 6])
def test_gradients_of_the_normalisation_are_right_also_where_one_step_is_left(steps: int) -> None:
    block = STConv(5, 2, 3, 4, kernel_size=3, K=2).double().eval()
    ring = torch.stack([torch.arange(5), torch.arange(1, 6) % 5])
    x = torch.randn(2, steps, 5, 2, dtype=torch.float64)
    weight = torch.randn(2, steps - 4, 4, 5, dtype=torch.float64).transpose(2, 3)  # the gradient's order in memory

    def run(scale: Tensor) -> Tensor:
        norm = {"_batch_norm.weight": scale}
        return (torch.func.functional_call(block, norm, (x, ring)) * weight.contiguous()).sum()

    assert torch.autograd.gradcheck(run, torch.randn(5, dtype=torch.float64, requires_grad=True))


def test_stconv_at_the_size_of_a_city_equals_the_original() -> None:
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(0, 207, (2, 1612), generator=generator)
    fast, original = STConv(207, 3, 32, 32, 3, 3), Original(207, 3, 32, 32, 3, 3)
    same_weights(fast, original)
    x, edge_weight = torch.randn(4, 12, 207, 3), torch.rand(1612)
    assert_same(gradients(fast, x, edge_index, edge_weight), gradients(original, x, edge_index, edge_weight), 2e-6)


# CachedChebConv


def cheb_pair(order: int = 3, normalization: str | None = "sym", bias: bool = True) -> tuple[nn.Module, nn.Module]:
    fast, original = (kind(3, 4, order, normalization, bias).double() for kind in (CachedChebConv, ChebConv))
    if bias:
        nn.init.normal_(original.bias)
    same_weights(fast, original)
    return fast, original


def cheb_by_loops(conv: nn.Module, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
    """Chebyshev convolution with the symmetric Laplacian from its definition, one node and term at a time."""
    degree = torch.zeros(N, dtype=torch.float64)
    edges = [(int(s), int(t), w) for (s, t), w in zip(edge_index.T, edge_weight.double(), strict=True) if s != t]
    for s, _, w in edges:
        degree[s] += w
    laplacian = torch.eye(N, dtype=torch.float64)
    entries = [1.0]
    for s, t, w in edges:
        if degree[s] > 0 and degree[t] > 0:
            laplacian[t, s] -= w / (degree[s] * degree[t]).sqrt()
            entries.append(-float(w / (degree[s] * degree[t]).sqrt()))
    scaled = 2 * laplacian / (2 * max(entries)) - torch.eye(N, dtype=torch.float64)
    terms = [x, torch.stack([sum(scaled[n, m] * x[m] for m in range(N)) for n in range(N)])]
    for _ in conv.lins[2:]:
        hops = torch.stack([sum(scaled[n, m] * terms[-1][m] for m in range(N)) for n in range(N)])
        terms.append(2 * hops - terms[-2])
    return torch.stack(
        [sum(lin.weight @ t[n] for lin, t in zip(conv.lins, terms, strict=True)) + conv.bias for n in range(N)]
    )


@graphs
def test_cheb_equals_its_definition(graph: str) -> None:
    conv, _ = cheb_pair(order=4)
    edge_index, edge_weight = GRAPHS[graph]
    x = torch.randn(N, 3, dtype=torch.float64)
    expected = cheb_by_loops(conv, x, edge_index, edge_weight)
    torch.testing.assert_close(conv(x, edge_index, edge_weight.double()), expected, rtol=0, atol=1e-12)


@graphs
@pytest.mark.parametrize("normalization", ["sym", "rw", None])
@pytest.mark.parametrize("lambda_max", [None, 1.7, torch.tensor(3.0, dtype=torch.float64)])
@pytest.mark.parametrize("shape", [(N, 3), (2, 4, N, 3)])
def test_cheb_equals_pyg(graph: str, normalization: str | None, lambda_max: Any, shape: tuple[int, ...]) -> None:
    fast, original = cheb_pair(normalization=normalization)
    edge_index, edge_weight = GRAPHS[graph]
    x = torch.randn(shape, dtype=torch.float64)
    call = {"edge_weight": edge_weight.double(), "lambda_max": lambda_max}
    assert_same(gradients(fast, x, edge_index, **call), gradients(original, x, edge_index, **call), 1e-12)


@pytest.mark.parametrize(("order", "bias"), [(1, True), (2, False), (5, True)])
def test_cheb_of_any_order_equals_pyg(order: int, bias: bool) -> None:
    fast, original = cheb_pair(order=order, bias=bias)
    edges, x = GRAPHS["sparse directed"], torch.randn(2, N, 3, dtype=torch.float64)
    assert_same(gradients(fast, x, *edges), gradients(original, x, *edges), 1e-12)


def test_cheb_batch_of_different_graphs_equals_pyg() -> None:
    fast, original = cheb_pair()
    parts = [random_graph(20, seed) for seed in range(3)]
    edge_index = torch.cat([edges + N * k for k, (edges, _) in enumerate(parts)], 1)
    edge_weight = torch.cat([weight for _, weight in parts]).double()
    call = {
        "batch": torch.arange(3).repeat_interleave(N),
        "lambda_max": torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64),
    }
    x = torch.randn(3 * N, 3, dtype=torch.float64)
    ours = gradients(fast, x, edge_index, edge_weight, **call)
    assert_same(ours, gradients(original, x, edge_index, edge_weight, **call), 1e-12)


def test_cheb_learnable_weights_get_the_gradient_of_pyg_and_leave_the_cache_alone() -> None:
    fast, original = cheb_pair()
    edge_index, edge_weight = GRAPHS["sparse directed"]
    x = torch.randn(2, N, 3, dtype=torch.float64)
    results = []
    for conv in (fast, original):
        weight = edge_weight.double().requires_grad_()
        y = conv(x, edge_index, weight)
        results.append((y, torch.autograd.grad(y.square().sum(), weight)[0]))
    assert_same(results[0], results[1], 1e-12)
    assert len(fast._cache) == 0


def test_cheb_calls_every_order_as_a_module() -> None:
    conv, _ = cheb_pair(order=4)
    calls: list[int] = []
    for k, lin in enumerate(conv.lins):
        lin.register_forward_hook(lambda *_, k=k: calls.append(k))
    conv(torch.randn(N, 3, dtype=torch.float64), *GRAPHS["sparse directed"])
    assert calls == [0, 1, 2, 3]


def test_cheb_with_an_explainers_mask_equals_pyg() -> None:
    from torch_geometric.explain.algorithm.utils import set_masks

    fast, original = cheb_pair()
    edge_index, edge_weight = symmetric_graph()
    edge_index = edge_index[:, edge_index[0] != edge_index[1]]
    edge_weight = edge_weight[: edge_index.shape[1]].double()
    x = torch.randn(N, 3, dtype=torch.float64)
    unmasked = fast(x, edge_index, edge_weight)
    for conv in (fast, original):
        mask = nn.Parameter(torch.linspace(-2, 2, edge_index.shape[1], dtype=torch.float64))
        set_masks(conv, mask, edge_index, apply_sigmoid=True)
    masked = fast(x, edge_index, edge_weight)
    torch.testing.assert_close(masked, original(x, edge_index, edge_weight), rtol=0, atol=1e-12)
    assert not torch.allclose(masked, unmasked)


def test_cheb_under_autocast_agrees_with_pyg() -> None:
    fast, original = CachedChebConv(3, 4, 3), ChebConv(3, 4, 3)
    same_weights(fast, original)
    edges, x = GRAPHS["sparse directed"], torch.randn(2, N, 3)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(x, *edges), original(x, *edges)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


def test_cheb_in_bfloat16_takes_single_precision_weights() -> None:
    conv, exact = CachedChebConv(3, 4, 3).bfloat16(), CachedChebConv(3, 4, 3)
    exact.load_state_dict(conv.state_dict())
    edges, x = GRAPHS["sparse directed"], torch.randn(2, N, 3).bfloat16()
    y = conv(x, *edges)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact(x.float(), *edges), rtol=0, atol=3e-2)


REFUSALS = {
    "node": (
        {"edge_index": torch.tensor([[0, N], [1, 2]])},
        f"node numbers from 0 to {N - 1}, for N={N} nodes",
        f"numbers from 0 to {N}",
        "give the graph of the city that x belongs to",
    ),
    "shape": (
        {"edge_index": torch.zeros(5, 2, dtype=torch.long)},
        "edge_index of shape (2, E), integer node numbers",
        "shape (5, 2), torch.int64",
        "put the sources in the first row and the targets in the second; without edges they are "
        "torch.empty(2, 0, dtype=torch.long)",
    ),
    "weight": (
        {"edge_index": torch.zeros(2, 5, dtype=torch.long), "edge_weight": torch.ones(4)},
        "edge_weight of shape (5,), one for each edge",
        "shape (4,)",
        "give one weight for each column of edge_index, or none at all",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_cheb_unfit_graph_is_refused(case: str) -> None:
    call, expected, got, fix = REFUSALS[case]
    text = f"the graph does not fit the nodes.\n  expected: {expected}\n  got:      {got}\n  to fix:   {fix}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        CachedChebConv(3, 4, 3)(torch.zeros(N, 3), **call)


# The cache


def in_place(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(call: dict[str, Any]) -> dict[str, Any]:
        change(call)
        return call

    return apply


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another graph": lambda call: {**call, "edge_index": random_graph(25, seed=9)[0].int().long()},
    "one edge moved in place": in_place(lambda call: call["edge_index"][1].__setitem__(0, 8)),
    "one edge turned round": lambda call: {**call, "edge_index": call["edge_index"].flip(0)},
    "weights in place": in_place(lambda call: call["edge_weight"].mul_(torch.arange(1.0, 26.0))),
    "weights through data": in_place(lambda call: call["edge_weight"].data.__setitem__(slice(0, 5), 7.0)),
    "weights through numpy": in_place(lambda call: call["edge_weight"].numpy().__setitem__(slice(0, 5), 7.0)),
    "no weights": lambda call: {**call, "edge_weight": None},
    "weights and input in double": lambda call: {
        **call, "x": call["x"].double(), "edge_weight": call["edge_weight"].double() + 1e-9
    },
    "more nodes, same edges": lambda call: {**call, "x": torch.randn(2, N + 3, 3)},
    "fewer edges": lambda call: {
        **call, "edge_index": call["edge_index"][:, :20], "edge_weight": call["edge_weight"][:20]
    },
    "lambda_max": lambda call: {**call, "lambda_max": 1.3},
    "lambda_max per graph": lambda call: {
        **call, "lambda_max": torch.tensor([1.3, 1.6]), "batch": (torch.arange(N) > 4).long()
    },
}  # fmt: skip


def start() -> dict[str, Any]:
    edge_index, edge_weight = random_graph(25)
    return {"x": torch.randn(2, N, 3), "edge_index": edge_index, "edge_weight": edge_weight}


@pytest.mark.parametrize("change", CHANGES)
def test_cache_notices_a_changed_graph(change: str) -> None:
    conv, call = CachedChebConv(3, 4, 3), start()
    before = conv(**call)
    call = CHANGES[change](call)
    conv, fresh = (model.to(call["x"].dtype) for model in (conv, copy.deepcopy(conv)))
    assert len(fresh._cache) == 0
    after = conv(**call)
    assert torch.equal(after, fresh(**call))
    assert before.shape != after.shape or not torch.allclose(before.to(after.dtype), after, rtol=0, atol=1e-12)


def test_cache_notices_another_normalisation() -> None:
    conv, call = CachedChebConv(3, 4, 3), start()
    before = conv(**call)
    conv.normalization = "rw"
    assert torch.equal(conv(**call), copy.deepcopy(conv)(**call))
    assert not torch.allclose(conv(**call), before)


def test_cache_builds_once_for_equal_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[int] = []
    build = CachedChebConv._build
    monkeypatch.setattr(CachedChebConv, "_build", lambda self, *inputs: builds.append(1) or build(self, *inputs))
    conv, call = CachedChebConv(3, 4, 3), start()
    for _ in range(3):
        conv(**{key: value.clone() for key, value in call.items()}, lambda_max=1.5)
    conv(call["x"][0], call["edge_index"], call["edge_weight"], lambda_max=1.5)
    assert len(builds) == 1


def test_cache_returns_to_the_first_graph() -> None:
    conv, call = CachedChebConv(3, 4, 3), start()
    other = {**call, "edge_index": random_graph(25, seed=3)[0]}
    first, second = conv(**call), conv(**other)
    assert not torch.allclose(first, second)
    assert torch.equal(conv(**call), first)


@pytest.mark.parametrize("graph", ["sparse directed", "crowded directed"])
def test_cache_filled_in_inference_mode_serves_training(graph: str) -> None:
    conv = CachedChebConv(3, 4, 3)
    call = dict(zip(("x", "edge_index", "edge_weight"), (torch.randn(2, N, 3), *GRAPHS[graph]), strict=True))
    with torch.inference_mode():
        expected = conv(**{key: value.clone() for key, value in call.items()})
    y = conv(**{**call, "x": call["x"].requires_grad_()})
    y.sum().backward()
    assert torch.equal(y, expected.clone())
    assert call["x"].grad.isfinite().all()


def test_cache_is_not_saved_copied_or_pickled() -> None:
    conv, call = CachedChebConv(3, 4, 3), start()
    keys = list(conv.state_dict())
    y = conv(**call)
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), torch.load(buffer, weights_only=False)]
    assert list(conv.state_dict()) == keys == ["bias", "lins.0.weight", "lins.1.weight", "lins.2.weight"]
    assert len(conv._cache) == 1
    for model in copies:
        assert len(model._cache) == 0
        assert torch.equal(model(**call), y)


def test_cache_tells_integers_from_floats_and_tensors() -> None:
    cache, built = PropagationCache(), []

    def build(value: Any) -> Propagation:
        built.append(value)
        return Propagation(torch.eye(1), torch.eye(1))

    for value in (1, 1, 1.0, torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1), None, None):
        cache.get((value,), build)
    assert [type(value) for value in built] == [int, float, Tensor, Tensor, type(None)]


# The propagation matrix


@pytest.mark.parametrize(("edges", "layout"), [(25, torch.sparse_csr), (150, torch.strided)])
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_terms_have_the_first_and_second_derivative(edges: int, layout: torch.layout, order: int) -> None:
    edge_index, edge_weight = random_graph(edges)
    propagation = Propagation.build(edge_index, edge_weight.double(), N)
    assert propagation.matrix.layout == layout
    x = torch.randn(2, N, 2, dtype=torch.float64, requires_grad=True)

    def squared(x: Tensor) -> Tensor:
        return torch.stack(propagation.terms(x, order)).square().sum(0)

    assert torch.autograd.gradcheck(squared, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(squared, x, fast_mode=True)


@pytest.mark.parametrize("slabs", [0, 1, 92, 93, 94, 187])
def test_terms_of_any_number_of_slabs_equal_a_dense_product(slabs: int) -> None:
    edge_index, edge_weight = random_graph(25)
    matrix = torch.zeros(N, N).index_put_((edge_index[1], edge_index[0]), edge_weight, accumulate=True)
    x = torch.randn(slabs, N, 2)
    terms = Propagation.build(edge_index, edge_weight, N).terms(x, 2)
    torch.testing.assert_close(terms[1], matrix @ x, rtol=0, atol=1e-5)


def test_terms_of_a_sparse_graph_keep_a_missing_reading_to_the_neighbours() -> None:
    edge_index, edge_weight = random_graph(25)
    x = torch.zeros(N, 1)
    x[N - 1] = torch.nan  # an isolated node
    assert Propagation.build(edge_index, edge_weight, N).terms(x, 2)[1].isfinite().all()


@pytest.mark.parametrize(("edges", "device", "dense"), [(29, "cpu", False), (30, "cpu", True), (0, "cuda", True)])
def test_dense_is_faster_for_crowded_graphs_and_off_the_cpu(edges: int, device: str, dense: bool) -> None:
    assert dense_is_faster(10, edges, torch.device(device)) is dense


# STGCN


def small(**changes: Any) -> STGCN:
    return STGCN(**{"num_nodes": N, "in_channels": 3, "hidden_channels": 4, "head_channels": 6, **changes})


def test_stgcn_equals_original_blocks_and_head() -> None:
    model = small(out_channels=2, horizon=3).double()
    blocks = [Original(N, 3, 4, 4, 3, 3).double(), Original(N, 4, 4, 4, 3, 3).double()]
    same_weights(blocks[0], model.block1)
    same_weights(blocks[1], model.block2)
    edge_index, edge_weight = GRAPHS["sparse directed"]
    x = torch.randn(2, 12, N, 3, dtype=torch.float64)
    z = blocks[1](blocks[0](x, edge_index, edge_weight.double()), edge_index, edge_weight.double())
    assert z.shape == (2, 4, N, 4)
    expected = torch.empty(2, 3, N, 2, dtype=torch.float64)
    for n in range(N):
        hidden = (z[:, :, n].flatten(1) @ model.head.hidden.weight.T + model.head.hidden.bias).relu()
        change = hidden @ model.head.output.weight.T + model.head.output.bias
        for h in range(3):
            expected[:, h, n] = x[:, -1, n, :2] + change[:, 2 * h : 2 * h + 2]
    ours = model(x, edge_index, edge_weight.double())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def permuted(model: STGCN, order: Tensor) -> STGCN:
    """The same network with the tensors of its normalisations in another order of nodes."""
    result = copy.deepcopy(model)
    for norm in (result.block1._batch_norm, result.block2._batch_norm):
        norm.load_state_dict({k: v[order] if v.ndim else v for k, v in norm.state_dict().items()})
    return result


@pytest.mark.parametrize("train", [True, False])
def test_stgcn_permuting_nodes_edges_and_normalisation_permutes_the_forecast(train: bool) -> None:
    model = small().double()
    for norm in (model.block1._batch_norm, model.block2._batch_norm):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    model.train(train)
    order = torch.randperm(N)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(N))
    edge_index, edge_weight = GRAPHS["sparse directed"]
    x, edge_weight = torch.randn(2, 12, N, 3, dtype=torch.float64), edge_weight.double()
    expected = model(x, edge_index, edge_weight)[:, :, order]
    moved = permuted(model, order)(x[:, :, order], place[edge_index], edge_weight)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    unmoved_norm = model(x[:, :, order], place[edge_index], edge_weight)
    assert (unmoved_norm - expected).abs().amax() > 1e-3


@pytest.mark.parametrize(("window", "kernel_size", "steps"), [(9, 3, 1), (13, 4, 1), (12, 2, 8), (5, 1, 5)])
def test_stgcn_fits_every_window_that_leaves_a_step(window: int, kernel_size: int, steps: int) -> None:
    model = small(window=window, kernel_size=kernel_size, horizon=7)
    assert model.head.hidden.in_features == steps * 4
    assert model(torch.randn(2, window, N, 3), *GRAPHS["sparse directed"]).shape == (2, 7, N, 1)


def test_stgcn_window_too_short_names_the_shortest() -> None:
    text = (
        "backbone 'stgcn': window too short for the kernels.\n"
        "  expected: window >= 4 * (kernel_size - 1) + 1 = 9 for kernel_size=3\n"
        "  got:      window = 8\n"
        "  to fix:   give a longer window or a smaller kernel_size"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        small(window=8)


def test_stgcn_wrong_number_of_nodes_names_axis_and_fix() -> None:
    text = (
        "backbone 'stgcn': wrong number of nodes.\n"
        "  expected: N=11 on axis 'n' of 'b t n c', the number of nodes of its normalisation\n"
        "  got:      N=7 from an input of shape (2, 12, 7, 3)\n"
        "  to fix:   adapt it to the new city with STLoraConfig(num_nodes=7), or build it with num_nodes=7"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        small()(torch.zeros(2, 12, 7, 3), GRAPHS["no edges"][0])


class Wrapper(nn.Module):
    """Stands in the place of a layer, as a tuner's wrapper does."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *inputs: Any) -> Any:
        return self.base(*inputs)


def test_stgcn_runs_on_other_nodes_once_its_normalisation_is_replaced() -> None:
    model = small()
    for block in (model.block1, model.block2):
        block._batch_norm = Wrapper(nn.BatchNorm2d(7))
    assert model(torch.zeros(2, 12, 7, 3), GRAPHS["no edges"][0]).shape == (2, 12, 7, 1)


def test_stgcn_with_wrapped_layers_gives_the_same_forecast() -> None:
    model, x = small().eval(), torch.randn(2, 12, N, 3)
    expected = model(x, *GRAPHS["sparse directed"])
    for block in (model.block1, model.block2):
        block._graph_conv.lins[2] = Wrapper(block._graph_conv.lins[2])
        block._graph_conv = Wrapper(block._graph_conv)
        block._temporal_conv1.conv_2 = Wrapper(block._temporal_conv1.conv_2)
    assert torch.equal(model(x, *GRAPHS["sparse directed"]), expected)


def test_stgcn_default_targets_are_its_fourteen_convolutions_and_two_head_layers() -> None:
    model = small()
    spec = model.stlora_spec
    hits = [n for n, _ in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in spec.target_modules)]
    kinds = [type(model.get_submodule(name)) for name in hits]
    assert {kind: kinds.count(kind) for kind in kinds} == {nn.Conv2d: 12, CachedChebConv: 2, nn.Linear: 2}
    bound = [model.get_submodule(name) for name in spec.node_bound]
    assert [(type(norm), norm.num_features) for norm in bound] == [(nn.BatchNorm2d, N)] * 2
    named = {name for name, tensor in model.state_dict().items() if N in tensor.shape}
    assert {name.rpartition(".")[0] for name in named} == set(spec.node_bound)
    assert spec.node_layout["conv_1"] == "b c n t"
    assert spec.node_layout["_graph_conv"] == "... n c"


def test_stgcn_layouts_name_the_axis_that_the_nodes_are_on() -> None:
    model, sizes = small(num_nodes=N), {}
    layouts = model.stlora_spec.node_layout

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: sizes.update({name: inputs[0].shape})

    for name, module in model.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in layouts):
            module.register_forward_hook(keep(name))
    model(torch.randn(2, 12, N, 3), *GRAPHS["sparse directed"])
    assert len(sizes) == 16
    for name, shape in sizes.items():
        layout = next(layout for target, layout in layouts.items() if name == target or name.endswith(f".{target}"))
        axes = layout.replace("...", "b t").split()
        assert shape[axes.index("n")] == N, name
        assert shape[axes.index("b")] == 2, name


def test_stgcn_backward_reaches_every_parameter() -> None:
    model = small()
    model(torch.randn(4, 12, N, 3), *GRAPHS["sparse directed"]).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_stgcn_copies_and_pickles_to_the_same_numbers() -> None:
    model, x = small().eval(), torch.randn(2, 12, N, 3)
    expected = model(x, *GRAPHS["sparse directed"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, *GRAPHS["sparse directed"]), expected)


def test_stgcn_compiled_gives_the_same_numbers_after_the_graph_changed() -> None:
    model = small().double()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    edge_index, edge_weight = GRAPHS["sparse directed"]
    edge_weight = edge_weight.double()
    x = torch.randn(2, 12, N, 3, dtype=torch.float64)
    for _ in range(2):
        assert_same(
            gradients(compiled, x, edge_index, edge_weight), gradients(model, x, edge_index, edge_weight), 1e-12
        )
        edge_weight.mul_(torch.linspace(0.5, 2, edge_weight.numel()))


def test_stgcn_exports_with_a_free_batch() -> None:
    model = small().eval()
    edge_index, edge_weight = GRAPHS["symmetric"]
    batch = {0: torch.export.Dim("batch", min=2)}
    inputs = (torch.randn(3, 12, N, 3), edge_index, edge_weight)
    program = torch.export.export(model, inputs, dynamic_shapes=(batch, None, None), strict=False)
    x = torch.randn(5, 12, N, 3)
    ours = program.module()(x, edge_index, edge_weight)
    torch.testing.assert_close(ours, model(x, edge_index, edge_weight), rtol=0, atol=1e-5)


def test_stgcn_of_the_papers_width_has_the_documented_number_of_parameters_on_pems04() -> None:
    model = STGCN(num_nodes=307, in_channels=3, hidden_channels=64)
    assert sum(p.numel() for p in model.parameters()) == 156_248
    bound = sum(p.numel() for name, p in model.named_parameters() if "_batch_norm" in name)
    assert bound == 4 * 307
