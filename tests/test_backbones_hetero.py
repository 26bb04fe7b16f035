"""HeteroGCLSTM as a forecaster: its cell, batches, both directions of the roads."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import SAGEConv

from stlora_peft.backbones import tgt
from stlora_peft.backbones.hetero import AGAINST, ALONG, NODE, Cell, HeteroGCLSTM

UPSTREAM: Any = tgt.load().nn.hetero.heterogclstm
N, B, T = 6, 2, 4
EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 0]])  # directed; nodes 4 and 5 are isolated
NO_EDGES = EDGES[:, :0]


def small(**changes: Any) -> HeteroGCLSTM:
    sizes = {"in_channels": 3, "window": T, "horizon": 2, "hidden_channels": 5}
    return HeteroGCLSTM(**(sizes | changes)).double().eval()


def windows(batch: int = B, num_nodes: int = N, **shape: int) -> Tensor:
    return torch.randn(batch, shape.get("window", T), num_nodes, shape.get("channels", 3), dtype=torch.float64)


@pytest.mark.parametrize(
    "changes", [{}, {"window": 1, "horizon": 1}, {"out_channels": 2}, {"in_channels": 1, "out_channels": 1}]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_forward_gives_every_step_node_and_channel(changes: dict[str, int], batch: int) -> None:
    model = small(**changes)
    forecast = model(windows(batch, window=model.window, channels=model.in_channels), EDGES)
    assert forecast.shape == (batch, model.horizon, N, model.out_channels)


def mean_of_neighbours(h: Tensor, n: int, edges: Tensor) -> Tensor:
    sources = [s for s, t in edges.T.tolist() if t == n]
    return torch.stack([h[s] for s in sources]).mean(0) if sources else torch.zeros_like(h[n])


def gate_of_one_node(cell: nn.Module, gate: str, x: Tensor, h: Tensor, n: int) -> Tensor:
    """Value of a gate at node ``n`` before its activation, for ``x`` and ``h`` of ``[n c]``."""
    value = x[n] @ getattr(cell, f"W_{gate}")[NODE] + getattr(cell, f"b_{gate}")[NODE][0]
    convolutions = getattr(cell, f"conv_{gate}").convs
    for kind, edges in ((ALONG, EDGES), (AGAINST, EDGES.flip(0))):
        conv = convolutions[kind]
        value = value + conv.lin_l(mean_of_neighbours(h, n, edges)) + conv.lin_r(h[n])
    return value


def test_forward_equals_a_loop_over_samples_steps_and_nodes() -> None:
    model, x = small(out_channels=2), windows()
    expected = torch.empty(B, 2, N, 2, dtype=torch.float64)
    for b in range(B):
        h, c = torch.zeros(2, N, 5, dtype=torch.float64)
        for t in range(T):
            gates = [
                torch.stack([gate_of_one_node(model.cell, gate, x[b, t], h, n) for n in range(N)]) for gate in "ifco"
            ]
            i, f, g, o = gates
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        change = h @ model.head.weight.T + model.head.bias
        expected[b] = x[b, -1:, :, :2] + change.view(N, 2, 2).transpose(0, 1)
    torch.testing.assert_close(model(x, EDGES), expected, rtol=0, atol=1e-12)


def test_cell_equals_torch_geometric_temporal_once_that_has_its_weights() -> None:
    ours, edges = Cell(3, 5), {ALONG: EDGES, AGAINST: EDGES.flip(0)}
    theirs, x = UPSTREAM.HeteroGCLSTM({NODE: 3}, 5, ([NODE], [ALONG, AGAINST])), {NODE: torch.randn(N, 3)}
    with pytest.raises(ValueError, match="uninitialized parameter"):
        _ = [p.numel() for p in theirs.parameters()]
    theirs(x, edges)  # it has no weights before its first forward
    theirs.load_state_dict(ours.state_dict())
    state = {NODE: torch.zeros(N, 5)}
    for mine, other in zip(ours(x, edges, state, state), theirs(x, edges), strict=True):
        assert torch.equal(mine[NODE], other[NODE])


def test_forward_of_a_batch_equals_its_samples_one_by_one() -> None:
    model, x = small(), windows(3)
    apart = torch.cat([model(sample[None], EDGES) for sample in x])
    torch.testing.assert_close(model(x, EDGES), apart, rtol=0, atol=1e-12)


def test_permuting_nodes_and_edges_permutes_the_forecast() -> None:
    model, x, order = small(), windows(), torch.randperm(N)
    moved = model(x[:, :, order], torch.argsort(order)[EDGES])
    torch.testing.assert_close(moved, model(x, EDGES)[:, :, order], rtol=0, atol=1e-12)


def test_directions_of_the_roads_are_told_apart_and_weights_are_not_used() -> None:
    model, x = small(), windows()
    assert (model(x, EDGES) - model(x, EDGES.flip(0))).abs().max() > 1e-4
    assert torch.equal(model(x, EDGES, torch.rand(6)), model(x, EDGES))


@pytest.mark.parametrize("edges", [EDGES, NO_EDGES], ids=["isolated nodes", "no edges"])
@pytest.mark.parametrize("num_nodes", [1, N, 9])
def test_any_number_of_nodes_gives_finite_numbers_and_prints_nothing(
    edges: Tensor, num_nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    forecast = model(windows(num_nodes=num_nodes), edges % num_nodes)
    forecast.square().sum().backward()
    assert forecast.shape == (B, 2, num_nodes, 1)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert capsys.readouterr() == ("", "")


def test_backward_reaches_every_parameter_from_the_second_step_on() -> None:
    model = small()
    model(windows(), EDGES).square().sum().backward()
    assert [key for key, p in model.named_parameters() if not p.grad.any()] == []
    single = small(window=1)  # its hidden state is zero, and so is all that a gate hears of it
    single(windows(window=1), EDGES).square().sum().backward()
    unreached = {key.split(".")[-2] for key, p in single.named_parameters() if not p.grad.any()}
    assert {"lin_r", "lin_l"} <= unreached


def test_hyperparameters_after_json_rebuild_the_same_network() -> None:
    model = small(out_channels=2, residual=False)
    twin = HeteroGCLSTM(**json.loads(json.dumps(model.hyperparameters))).double()
    twin.load_state_dict(model.state_dict())
    x = windows()
    assert set(model.hyperparameters) == set(inspect.signature(HeteroGCLSTM).parameters)
    assert torch.equal(twin(x, EDGES), model(x, EDGES))


def test_copies_before_and_after_a_backward_give_the_same_numbers() -> None:
    model, x = small(), windows()
    for _ in range(2):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x, EDGES), model(x, EDGES))
        model(x, EDGES).sum().backward()


def test_edges_of_another_graph_and_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the graph does not fit the nodes\.\n  expected: node numbers"):
        small()(windows(), EDGES + 3)
    with pytest.raises(ValueError, match=r"^backbone 'heterogclstm': hidden_channels out of range\."):
        small(hidden_channels=0)


def test_stlora_spec_names_the_cell_one_convolution_of_each_gate_and_the_head() -> None:
    model, sizes = small(), {}
    spec = model.stlora_spec
    targets = {
        key: module
        for key, module in model.named_modules()
        if any(key == name or key.endswith(f".{name}") for name in spec.target_modules)
    }
    assert [type(module) for module in targets.values()] == [Cell] + [SAGEConv] * 4 + [nn.Linear]

    def note(key: str, x: Any) -> None:
        sizes[key] = (x["sensor"] if isinstance(x, dict) else x).shape[:2]

    for key, module in targets.items():
        module.register_forward_hook(lambda _, inputs, __, key=key: note(key, inputs[0]))
    model(windows(), EDGES)
    assert sizes == dict.fromkeys(targets, (B, N))
    assert set(spec.node_layout.values()) == {"b n c"}
    assert set(spec.node_layout) == set(spec.target_modules)
    assert (spec.node_bound, spec.head) == ((), ("head",))
