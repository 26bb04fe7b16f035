"""Accelerated layers against the originals: numbers, graphs that change, copies, adapters, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from acceleration_layers import CASES, GRAPHS, B, C, Case, F, Graph, N, T, attention, directed, gnn, recurrent
from peft import get_peft_model
from torch import Tensor, nn
from toys import ALL_BACKBONES, assert_same, largest, raised, randomised, small_backbone, windows
from toys import graph as toy_graph

from stlora_peft import STLoraConfig, accelerate, decelerate, fingerprint
from stlora_peft.acceleration.fast import Fast
from stlora_peft.tuner.graph_layers import STLoraGraphConv
from stlora_peft.tuner.host_layers import STLoraConv

EVERY = [(name, graph) for name, case in CASES.items() for graph in case.graphs]
CONSTANT = ("GCNConv cached", "TGCN2 cached", "BatchedDCRNN K=1")
"""Layers that keep the first graph by their own rule, or read none."""
ONCE = [(name, case.graphs[0]) for name, case in CASES.items()]


@pytest.fixture(autouse=True)
def one_eigenvalue(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyG's search starts at random and ends at another last digit each time."""
    from torch_geometric.transforms import LaplacianLambdaMax

    def forward(self: Any, data: Any) -> Any:
        data.lambda_max = 2.0 * data.edge_index[0].bincount().max().item()
        return data

    monkeypatch.setattr(LaplacianLambdaMax, "forward", forward)


def pair(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The original and its accelerated copy, with weights that are large enough to matter."""
    plain = case.make().to(dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    return plain, fast


def results(case: Case, model: nn.Module, graph: Graph, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and all gradients of one call."""
    edges, weight = graph
    x = torch.randn(B, T, N, C, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    model.zero_grad()
    y = case.run(model, x, edges, None if weight is None else weight.to(dtype))
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(dtype)).sum().backward()
    found = {"y": y, "x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    return {name: value for name, value in found.items() if value is not None}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        difference, size = float((found[name] - value).detach().abs().max()), max(largest(value.detach()), 1e-3)
        assert difference <= tolerance * size, f"{name}: {difference / size:.1e}"


def silenced(model: nn.Module) -> nn.Module:
    """Fail where a layer still passes messages along edges."""

    def message(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a message was passed")

    for layer in model.modules():
        if isinstance(layer, gnn.MessagePassing):
            vars(layer)["message"] = message
    return model


# -- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "graph"), EVERY)
def test_accelerated_layer_equals_the_original_forward_and_backward(name: str, graph: str) -> None:
    case, edges = CASES[name], GRAPHS[graph]()
    plain, fast = pair(case)
    expected = results(case, plain, edges)
    for _ in range(2):  # the second time by what was kept
        assert_alike(results(case, fast, edges), expected, case.tolerance)
        expected = results(case, plain, edges)  # batch statistics move on


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.double])
def test_accelerated_layer_equals_the_original_in_double_precision(name: str) -> None:
    case = CASES[name]
    plain, fast = pair(case, torch.float64)
    edges = GRAPHS[case.graphs[0]]()
    expected = results(case, plain, edges, torch.float64)
    assert_alike(results(case, fast, edges, torch.float64), expected, 1e-11)


@pytest.mark.parametrize(("name", "graph"), ONCE)
def test_accelerated_layer_passes_no_messages(name: str, graph: str) -> None:
    case = CASES[name]
    model = case.make()
    accelerate(model)
    assert results(case, silenced(model), GRAPHS[graph]())["y"].isfinite().all()


def test_the_check_for_messages_can_fail() -> None:
    with pytest.raises(AssertionError, match="a message was passed"):
        silenced(gnn.GCNConv(C, F))(torch.randn(N, C), directed()[0])


@pytest.mark.parametrize("name", ["GCNConv", "GConvGRU", "TGCN2", "A3TGCN2", "BatchedDCRNN", "STConv", "GCLSTM"])
def test_accelerated_layer_takes_the_types_of_autocast(name: str) -> None:
    case = CASES[name]
    plain, fast = pair(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = results(case, plain, GRAPHS[case.graphs[0]]())
        found = results(case, fast, GRAPHS[case.graphs[0]]())
    assert_alike({"y": found["y"]}, {"y": expected["y"]}, 0.05)


# -- graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "graph"), [once for once in ONCE if once[0] not in ("GCNConv cached", "TGCN2 cached", "BatchedDCRNN K=1")]
)
def test_changed_graph_is_noticed_also_in_place(name: str, graph: str) -> None:
    case = CASES[name]
    plain, fast = pair(case)
    edges, weight = GRAPHS[graph]()
    fresh = copy.deepcopy(fast)
    before = results(case, fast, (edges, weight))["y"]
    edges.add_(3).remainder_(N - 1)
    if weight is not None:
        weight.mul_(torch.linspace(0.5, 2.0, len(weight)))
    fast.load_state_dict(plain.state_dict())
    after = results(case, fast, (edges, weight))
    assert_alike(after, results(case, fresh, (edges, weight)), 1e-6)
    assert not torch.allclose(after["y"], before)


def test_cached_true_keeps_the_first_graph_as_pyg_does() -> None:
    plain = gnn.GCNConv(C, F, cached=True)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    x = torch.randn(N, C)
    for edges, weight in (directed(0), directed(1)):
        assert_same(fast(x, edges, weight), plain(x, edges, weight), 1e-6)
    fast.reset_parameters()
    plain.load_state_dict(fast.state_dict())
    plain._cached_edge_index = None
    assert_same(fast(x, *directed(2)), plain(x, *directed(2)), 1e-6)


def test_graph_without_entering_edges_goes_the_diffusions_own_way() -> None:
    edges, weight = torch.tensor([[0, 1, 2], [1, 2, 1]]), torch.ones(3)
    plain = recurrent.BatchedDCRNN(C, F, 2)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    x = torch.randn(B, T, N, C)
    assert torch.equal(fast(x, edges, weight).isnan(), plain(x, edges, weight).isnan())


def test_edges_that_do_not_fit_the_nodes_are_refused() -> None:
    conv = gnn.GCNConv(C, F)
    accelerate(conv)
    lines = raised(lambda: conv(torch.randn(N, C), torch.tensor([[0], [N]])))
    assert lines["expected"] == f"node numbers from 0 to {N - 1}, for N={N} nodes"


def test_different_graphs_of_the_steps_go_the_blocks_own_way() -> None:
    for name in ("MSTGCN", "ASTGCN"):
        plain, fast = pair(CASES[name])
        x = torch.randn(B, N, C, T)
        graphs = [directed(seed)[0] for seed in range(T)]
        assert_same(fast(x, graphs), plain(x, graphs), 1e-5)


# -- the layer's own way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ChebConv", "GCNConv", "GraphConv", "GConvGRU", "TGCN2", "STConv", "A3TGCN2"])
def test_learnable_edge_weights_get_their_gradient(name: str) -> None:
    case = CASES[name]
    gradients = []
    for model in pair(case):
        edges, weight = directed()
        weight.requires_grad_()
        case.run(model, torch.ones(B, T, N, C), edges, weight).square().sum().backward()
        gradients.append(weight.grad)
    assert_same(gradients[1], gradients[0], 1e-5)
    assert gradients[0].abs().max() > 0


def own_ways() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    x, (edges, weight) = torch.randn(N, C), directed()
    adjacency = torch.sparse_coo_tensor(edges.flip(0), weight, (N, N)).coalesce().to_sparse_csr()
    hooked = gnn.GCNConv(C, F)
    hooked.register_message_forward_hook(lambda module, inputs, out: 2.0 * out)
    return {
        "sparse matrix": (gnn.GCNConv(C, F), (x, adjacency)),
        "against the edges": (gnn.GCNConv(C, F, flow="target_to_source"), (x, edges, weight)),
        "largest": (gnn.GraphConv(C, F, aggr="max"), (x, edges, weight)),
        "several aggregations": (gnn.SAGEConv(C, F, aggr=["mean", "max"]), (x, edges)),
        "two kinds of nodes": (gnn.SAGEConv((C, 2), F), ((x, torch.randn(4, 2)), torch.tensor([[0, 9], [3, 1]]))),
        "pair": (gnn.GraphConv(C, F), ((x, None), edges, weight, (N, N))),
        "decomposed": (gnn.GCNConv(4, F, decomposed_layers=2), (torch.randn(N, 4), edges)),
        "message hook": (hooked, (x, edges)),
        "wide weights": (gnn.GraphConv(C, F, bias=False), (x.double(), edges, weight.double())),
        "three axes": (gnn.GCNConv(C, F), (torch.randn(2, N, C), edges)),
        "integers": (gnn.GraphConv(C, F), (x, edges.int())),
    }


@pytest.mark.parametrize("name", own_ways())
def test_what_is_not_known_goes_the_layers_own_way(name: str) -> None:
    conv, inputs = own_ways()[name]
    conv = conv.to(inputs[0].dtype) if isinstance(inputs[0], Tensor) else conv
    expected = conv(*inputs)
    accelerate(conv)
    assert_same(conv(*inputs), expected, 1e-6)


def test_classes_derived_from_known_ones_and_changed_instances_are_left_alone() -> None:
    class Louder(gnn.GCNConv):
        def message(self, x_j: Tensor, edge_weight: Tensor | None) -> Tensor:
            return 2.0 * x_j

    changed = gnn.GCNConv(C, F)
    changed.forward = lambda *args: torch.zeros(1)
    assert accelerate(nn.ModuleList([Louder(C, F), changed, nn.Linear(2, 2)])).replaced == {}


def test_explainer_sees_the_edges_of_an_accelerated_layer() -> None:
    conv = gnn.GCNConv(C, F)
    x, edges = torch.randn(N, C), directed()[0]
    masks = []
    for _ in range(2):
        mask = torch.full((edges.shape[1],), 0.3, requires_grad=True)
        conv.explain, conv._edge_mask, conv._apply_sigmoid = True, mask, True
        conv._loop_mask = edges[0] != edges[1]
        conv(x, edges).sum().backward()
        masks.append(mask.grad)
        conv.explain = False
        conv._edge_mask = None
        conv = pickle.loads(pickle.dumps(conv))
        accelerate(conv)
    assert torch.allclose(*masks)


def test_hooks_on_a_part_of_a_cell_are_called() -> None:
    for name, part in (("GConvGRU", "conv_h_r"), ("TGCN2", "linear_r"), ("BatchedDCRNN", "conv_x_z")):
        case = CASES[name]
        plain, fast = pair(case)
        calls: list[int] = []
        fast.get_submodule(part).register_forward_hook(lambda *args, calls=calls: calls.append(1))
        graph = GRAPHS[case.graphs[0]]()
        expected = results(case, plain, graph)
        assert_alike(results(case, fast, graph), expected, 1e-5)
        assert len(calls) == T


def test_accelerated_layer_is_exported_and_compiled() -> None:
    model = gnn.GCNConv(C, F)
    x, (edges, weight) = torch.randn(N, C), directed()
    expected = model(x, edges, weight)
    accelerate(model)
    assert_same(torch.compile(model, backend="eager")(x, edges, weight), expected, 1e-6)
    program = torch.export.export(model, (x, edges, weight), strict=False)
    assert_same(program.module()(x, edges, weight), expected, 1e-6)


@pytest.mark.parametrize("name", ["GConvGRU", "TGCN2", "BatchedDCRNN", "MSTGCN"])
def test_accelerated_cell_is_compiled(name: str) -> None:
    case = CASES[name]
    plain, fast = pair(case)
    torch.compiler.reset()
    graph = GRAPHS[case.graphs[0]]()
    compiled = torch.compile(fast, backend="eager")
    x = torch.randn(B, T, N, C)
    assert_same(case.run(compiled, x, *graph), case.run(plain, x, *graph), 1e-5)


# -- in place, and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_undo_gives_every_layer_its_class_back(name: str) -> None:
    case = CASES[name]
    model = case.make()
    before = [type(layer) for layer in model.modules()]
    attributes = [set(vars(layer)) for layer in model.modules()]
    keys = model.state_dict().keys()
    accelerated = accelerate(model)
    graph = GRAPHS[case.graphs[0]]()
    results(case, model, graph)
    assert model.state_dict().keys() == keys
    assert all(isinstance(layer, kind) for layer, kind in zip(model.modules(), before, strict=True))
    accelerated.undo()
    assert [type(layer) for layer in model.modules()] == before
    if "DCRNN" not in name:
        assert [set(vars(layer)) for layer in model.modules()] == attributes
    results(case, model, graph)


@pytest.mark.parametrize("name", ["GCNConv", "ChebConv", "BatchedDCRNN", "A3TGCN2", "STConv"])
def test_copies_and_pickles_are_fast_and_empty(name: str) -> None:
    case = CASES[name]
    model = pair(case)[1]
    graph = GRAPHS[case.graphs[0]]()
    expected = results(case, model, graph)["y"]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert all(len(layer._cache) == 0 for layer in other.modules() if isinstance(layer, Fast))
        assert [type(layer) for layer in other.modules()] == [type(layer) for layer in model.modules()]
        if name != "STConv":  # its batch statistics moved on
            assert torch.equal(results(case, other, graph)["y"], expected)
        decelerate(other)
        assert not any(isinstance(layer, Fast) for layer in other.modules())


def test_batched_dcrnn_runs_after_undo_on_the_graph_that_it_remembers() -> None:
    case = CASES["BatchedDCRNN"]
    plain, model = pair(case)
    graph = directed()
    expected = results(case, plain, graph)["y"]
    for step in (decelerate, accelerate, decelerate):
        results(case, model, graph)
        step(model)
        assert_same(results(case, model, graph)["y"], expected, 1e-5)


def test_what_was_replaced_is_told_and_twice_is_once() -> None:
    model = nn.ModuleDict({"cell": recurrent.TGCN(C, F), "block": attention.stgcn.STConv(N, C, F, F, 3, 3)})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    done = accelerate(model, *directed())
    assert done.replaced == {
        "cell": "TGCN",
        "cell.conv_z": "GCNConv",
        "cell.conv_r": "GCNConv",
        "cell.conv_h": "GCNConv",
        "block": "STConv",
        "block._temporal_conv1": "TemporalConv",
        "block._graph_conv": "ChebConv",
        "block._temporal_conv2": "TemporalConv",
    }
    assert str(done) == "ChebConv: 1\nGCNConv: 3\nSTConv: 1\nTGCN: 1\nTemporalConv: 2"
    assert accelerate(model).replaced == {}
    assert str(accelerate(model)) == "nothing to accelerate"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_without_cells_only_what_computes_adapters_too_is_replaced() -> None:
    assert set(accelerate(recurrent.TGCN(C, F), cells=False).replaced.values()) == {"GCNConv"}
    assert set(accelerate(recurrent.GConvGRU(C, F, 1), cells=False).replaced.values()) == {"ChebConv", "GConvGRU"}
    replaced = accelerate(attention.stgcn.STConv(N, C, F, F, 3, 3), cells=False).replaced
    assert set(replaced.values()) == {"ChebConv", "TemporalConv"}


def test_what_is_no_graph_is_refused() -> None:
    lines = raised(lambda: accelerate(nn.Linear(2, 2), [[0], [1]]))
    assert lines["got"] == "a list"
    assert "edge_weight" in raised(lambda: accelerate(nn.Linear(2, 2), directed()[0], torch.ones(2)))["expected"]


# -- adapters -----------------------------------------------------------------------------------------------

TARGETS = {
    "GConvGRU": ["conv_x_z", "conv_h_r", "conv_h_h.lins.1"],
    "GConvLSTM": ["conv_h_i"],
    "GCLSTM": ["cell", "conv_i"],
    "TGCN2": ["conv_z", "linear_r", "conv_h.lin"],
    "A3TGCN2": ["conv_z", "linear_h"],
    "BatchedDCRNN": ["conv_x_z"],
    "MPNNLSTM": ["_convolution_1", "_recurrent_1"],
    "STConv": ["_graph_conv", "conv_1"],
    "MSTGCN": ["_cheb_conv", "_time_conv"],
    "ASTGCN": ["_chebconv_attention"],
    "GCNConv": ["cell"],
    "SAGEConv": ["cell"],
}
LAYOUTS = {"_time_conv": "b c n t", "_recurrent_1": "t (b n) c", "conv_1": "b c n t", "conv_h.lin": "b n c"}


WHOLE = {
    "GConvGRU": [f"conv_{source}_{gate}" for source in "xh" for gate in "zrh"],
    "GConvGRU union": [f"conv_{source}_{gate}" for source in "xh" for gate in "zrh"],
    "GConvLSTM": [f"conv_{source}_{gate}" for source in "xh" for gate in "ifco"],
    "GCLSTM": ["cell", *(f"conv_{gate}" for gate in "ifco")],
    "STConv": ["conv_1", "conv_2", "conv_3", "_graph_conv"],
}
"""Every layer of a cell that computes the updates of its adapters together."""


class Holder(nn.Module):
    """A backbone with one layer, ``cell``."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, *args: Any) -> Any:
        return self.cell(*args)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("conditioning", ["embedding", "gate"])
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_put_on_before_or_after_work_as_on_the_original(name: str, conditioning: str, when: str) -> None:
    case, targets = CASES[name], TARGETS[name]
    config = STLoraConfig(
        num_nodes=N,
        conditioning=conditioning,
        target_modules=targets,
        predictor=None,
        node_layout={target: LAYOUTS[target] for target in targets if target in LAYOUTS},
    )
    bare = Holder(pair(case)[0])
    models = []
    for fast in (False, True):
        torch.manual_seed(0)
        model: Any = copy.deepcopy(bare)
        if fast and when == "before":
            accelerate(model)
        model = randomised(get_peft_model(model, copy.deepcopy(config)).eval())
        if fast and when == "after":
            accelerate(model)
        models.append(model)
    graph = GRAPHS[case.graphs[0]]()
    expected, found = (results(case, model, graph) for model in models)
    assert any("nall" in key or "stlora" in key for key in found)
    assert_alike(found, expected, case.tolerance)
    assert fingerprint(models[0]) == fingerprint(models[1])
    keys = {key for model in models for key in model.state_dict()}
    assert keys == set(models[0].state_dict())
    decelerate(models[1])
    assert_alike({"y": results(case, models[1], graph)["y"]}, {"y": expected["y"]}, 1e-4)


def whole(name: str, conditioning: str) -> tuple[nn.Module, Any]:
    """A cell, and its accelerated copy with an adapter on all of its layers."""
    targets = WHOLE[name]
    layouts = {"conv_1": "b c n t", "conv_2": "b c n t", "conv_3": "b c n t"} if name == "STConv" else {}
    config = STLoraConfig(
        num_nodes=N, conditioning=conditioning, target_modules=targets, predictor=None, node_layout=layouts
    )
    bare = Holder(pair(CASES[name])[0])
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(bare), config).eval()
    accelerate(model)
    return bare, model


@pytest.mark.parametrize("conditioning", ["embedding", "full", "core", "bias", "shared"])
@pytest.mark.parametrize("name", WHOLE)
def test_cells_compute_the_updates_of_their_layers_without_calling_them(
    name: str, conditioning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    model = randomised(whole(name, conditioning)[1]).double()
    plain = copy.deepcopy(model)
    decelerate(plain)
    graph = GRAPHS[case.graphs[0]]()
    expected = results(case, plain, graph, torch.float64)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{self.name} was called")

    monkeypatch.setattr(STLoraConv, "forward", called)
    if name != "STConv":  # its graph convolution is called: it is alone
        monkeypatch.setattr(STLoraGraphConv, "forward", called)
    assert_alike(results(case, model, graph, torch.float64), expected, 1e-11)


@pytest.mark.parametrize("name", WHOLE)
def test_untrained_adapters_leave_an_accelerated_cell_as_it_was_bit_for_bit(name: str) -> None:
    bare, model = whole(name, "embedding")
    accelerate(bare.eval())
    graph = GRAPHS["directed"]()
    assert torch.equal(results(CASES[name], model, graph)["y"], results(CASES[name], bare, graph)["y"])


# -- the package's own backbones ----------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("name", ALL_BACKBONES)
def test_every_backbone_forecasts_the_same_when_accelerated(name: str, adapt: bool) -> None:
    plain: Any = small_backbone(name)
    if adapt:
        plain = get_peft_model(plain, STLoraConfig(num_nodes=5, conditioning="embedding", init_weights=False))
    # with an adapter at random, their numbers grow to a thousand and a million: single precision tells little
    dtype = torch.float64 if adapt and name in ("stgcn", "dnntsp") else torch.float32
    plain = plain.eval().to(dtype)
    decelerate(plain)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    edge_index, edge_weight = toy_graph(5)
    batch = windows(5).to(dtype), edge_index, edge_weight.to(dtype)
    outputs = []
    for model in (plain, fast):
        y = model(*batch)
        y.mean().backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        outputs.append({"y": y, **gradients})
    assert_alike(outputs[1], outputs[0], 1e-5)
    decelerate(fast)
    assert torch.equal(fast(*batch), plain(*batch))
