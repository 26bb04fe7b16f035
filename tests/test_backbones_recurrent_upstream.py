"""The recurrent forecasters against torch-geometric-temporal's classes, sample by sample and step by step."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stlora_peft.backbones import Forecaster, tgt
from stlora_peft.backbones.recurrent import CLASSES

cells: Any = tgt.load().nn.recurrent
N, T, C, H = 9, 4, 3, 5
EDGES = torch.stack([torch.arange(N), (torch.arange(N) + 1) % N]).repeat(1, 2)
EDGES[1, N:] = (torch.arange(N) + 4) % N
WEIGHTS = torch.linspace(0.5, 1.5, EDGES.shape[1])
pytestmark = pytest.mark.filterwarnings("ignore:backbone '(a3tgcn|dcrnn|batcheddcrnn)")


def build(name: str, **options: Any) -> Any:
    file, cls = CLASSES[name]
    module = importlib.import_module(f"stlora_peft.backbones.recurrent.{file}")
    sizes = {"in_channels": C, "out_channels": 2, "window": T, "horizon": 3, "hidden_channels": H}
    return getattr(module, cls)(**{**sizes, **options}).eval()


def original(cell: nn.Module, model: Any) -> Any:
    """The original cell with the weights of the forecaster."""
    cell.load_state_dict(model.cell.state_dict())
    return cell.eval()


def stepwise(cell: Any, x: Tensor, *graph: Any) -> Tensor:
    """Last output of a cell without a batch axis for one sample ``[t n c]``."""
    state: tuple[Any, ...] = ()
    for step in x:
        out = cell(step, *graph, *state)
        state = out if isinstance(out, tuple) else (out,)
    return state[0]


def chebyshev(name: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, x: stepwise(original(getattr(cells, name)(C, H, 3), model), x, EDGES, WEIGHTS)


def relational(model: Any, x: Tensor) -> Tensor:
    kinds = torch.cat([torch.zeros(EDGES.shape[1]), torch.ones(EDGES.shape[1])]).long()
    return stepwise(original(cells.LRGCN(C, H, 2, 2), model), x, torch.cat([EDGES, EDGES.flip(0)], 1), kinds)


def batched_diffusion(model: Any, x: Tensor) -> Tensor:
    return original(cells.BatchedDCRNN(C, H, 2), model)(x[None], EDGES, WEIGHTS)[0, -1]


def batched_attention(model: Any, x: Tensor) -> Tensor:
    cell = original(cells.A3TGCN2(C, H, periods=T, batch_size=1), model)
    return cell(x.permute(1, 2, 0)[None], EDGES, WEIGHTS)[0]


def gated(model: Any, x: Tensor) -> Tensor:
    cell, state = original(cells.DyGrEncoder(H, 2, "mean", H, 1), model), ()
    for step in x:
        out, *state = cell(step, EDGES, WEIGHTS, *state)
    return out


def evolving(cell: Any) -> Callable[[Any, Tensor], Tensor]:
    def features(model: Any, x: Tensor) -> Tensor:
        own = original(cell, model)
        own.reinitialize_weight()
        return torch.cat([own(step, EDGES, WEIGHTS).relu() for step in model.embed(x)], dim=-1)

    return features


def message_passing(model: Any, x: Tensor) -> Tensor:
    edges = torch.cat([EDGES + t * N for t in range(T)], 1)
    return original(cells.MPNNLSTM(C, H, N, T, 0.0), model)(x.flatten(0, 1), edges, WEIGHTS.repeat(T))


def adaptive(model: Any, x: Tensor) -> Tensor:
    steps = x[:, None]
    for layer, width in enumerate((C, H)):
        cell, state, outputs = cells.AGCRN(N, width, H, 2, 3), None, []
        cell.load_state_dict(model.cells[layer].state_dict())
        for step in steps:
            state = cell(step, model.node_embedding.weight, state)
            outputs.append(state)
        steps = torch.stack(outputs)
    return steps[-1, 0]


FEATURES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a3tgcn": lambda model, x: original(cells.A3TGCN(C, H, periods=T), model)(x.permute(1, 2, 0), EDGES, WEIGHTS),
    "a3tgcn2": batched_attention,
    "agcrn": adaptive,
    "batcheddcrnn": batched_diffusion,
    "dcrnn": lambda model, x: stepwise(original(cells.DCRNN(C, H, 2), model), x, EDGES, WEIGHTS),
    "dygrencoder": gated,
    "evolvegcnh": evolving(cells.EvolveGCNH(N, H)),
    "evolvegcno": evolving(cells.EvolveGCNO(H)),
    "gclstm": chebyshev("GCLSTM"),
    "gconvgru": chebyshev("GConvGRU"),
    "gconvlstm": chebyshev("GConvLSTM"),
    "lrgcn": relational,
    "mpnnlstm": message_passing,
    "tgcn": lambda model, x: stepwise(original(cells.TGCN(C, H), model), x, EDGES, WEIGHTS),
    "tgcn2": lambda model, x: stepwise(original(cells.TGCN2(C, H, 1), model), x[:, None], EDGES, WEIGHTS)[0],
}


@pytest.mark.parametrize("name", CLASSES)
def test_forecast_equals_the_original_cell_and_the_head(name: str) -> None:
    model: Forecaster = build(name, **({"num_nodes": N, "emb_size": 3} if name == "agcrn" else {}))
    x = torch.randn(2, T, N, C)
    with torch.no_grad():
        for sample, forecast in zip(x, model(x, EDGES, WEIGHTS), strict=True):
            change = model.head(FEATURES[name](model, sample)).view(N, 3, 2).transpose(0, 1)
            torch.testing.assert_close(forecast, sample[-1:, :, :2] + change, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("one", "other"), [("tgcn", "tgcn2"), ("a3tgcn", "a3tgcn2"), ("dcrnn", "batcheddcrnn")])
def test_twins_load_each_other_and_forecast_the_same(one: str, other: str) -> None:
    model, twin, x = build(one), build(other), torch.randn(2, T, N, C)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x, EDGES, WEIGHTS), model(x, EDGES, WEIGHTS), rtol=0, atol=1e-6)


# A3TGCN


@pytest.mark.parametrize("name", ["a3tgcn", "a3tgcn2"])
def test_a3tgcn_carrying_its_state_weighs_the_states_of_a_tgcn(name: str) -> None:
    model, x = build(name, carry_state=True), torch.randn(T, N, C)
    cell = cells.TGCN(C, H)
    cell.load_state_dict(model.cell._base_tgcn.state_dict())
    weights, state, mean = model.cell._attention.softmax(0), None, torch.zeros(N, H)
    for t in range(T):
        state = cell(x[t], EDGES, WEIGHTS, state)
        mean = mean + weights[t] * state
    expected = model.head(mean).view(N, 3, 2).transpose(0, 1) + x[-1, :, :2]
    torch.testing.assert_close(model(x[None], EDGES, WEIGHTS)[0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("carry", "moved"), [(False, False), (True, True)])
def test_a3tgcn_by_default_does_not_know_the_order_of_the_steps(carry: bool, moved: bool) -> None:
    model, x, order = build("a3tgcn", carry_state=carry, residual=False), torch.randn(2, T, N, C), [2, 0, 3, 1]
    expected = model(x, EDGES, WEIGHTS)
    model.cell._attention.data = model.cell._attention.data[order]
    assert moved == bool((model(x[:, order], EDGES, WEIGHTS) - expected).abs().max() > 1e-4)


def test_a3tgcn_warns_that_it_carries_no_state() -> None:
    expected = (
        "backbone 'a3tgcn2': torch-geometric-temporal does not pass its state on.\n"
        "  expected: h_t computed from h_(t-1)\n"
        "  got:      each of the 4 steps computed from a state of zero\n"
        "  to fix:   build it with carry_state=True and train it so, or ignore this if its weights come from there"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(expected)}$"):
        build("a3tgcn2")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{"carry_state": True}, {"window": 1}])
def test_a3tgcn_with_nothing_to_warn_of_is_quiet(options: dict[str, Any]) -> None:
    build("a3tgcn", **options)


# AGCRN


def test_agcrn_has_the_published_number_of_parameters_on_pems04() -> None:
    model = build("agcrn", num_nodes=307, in_channels=1, out_channels=1, window=12, horizon=12, hidden_channels=64)
    assert sum(p.numel() for p in model.parameters()) == 748_810


def test_agcrn_with_another_number_of_nodes_names_the_axis_and_the_fix() -> None:
    expected = (
        "backbone 'agcrn': wrong number of nodes.\n"
        "  expected: N=9 on axis 'n' of 'b t n c', the number of rows of its table of nodes\n"
        "  got:      N=8 from an input of shape (2, 4, 8, 3)\n"
        "  to fix:   adapt it to the new city with STLoraConfig(num_nodes=8), or build it with num_nodes=8"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        build("agcrn", num_nodes=N)(torch.zeros(2, T, 8, C), EDGES)


def test_agcrn_of_one_term_is_refused() -> None:
    with pytest.raises(ValueError, match="expected: K >= 2: the support always has two terms"):
        build("agcrn", num_nodes=N, K=1)


# DyGrEncoder


def test_dygrencoder_of_two_lstm_layers_equals_a_loop_over_the_nodes() -> None:
    model, x = build("dygrencoder", lstm_layers=2, conv_layers=1, aggregation="add"), torch.randn(1, T, N, C)
    convolved = torch.stack([model.cell.conv_layer(step, EDGES, WEIGHTS) for step in x[0]])
    for n in range(N):
        states = model.cell.recurrent_layer(convolved[:, n])[0]
        expected = x[0, -1, n, :2] + model.head(states[-1]).view(3, 2)
        torch.testing.assert_close(model(x, EDGES, WEIGHTS)[0, :, n], expected, rtol=0, atol=2e-6)


def test_dygrencoder_wider_input_than_state_is_refused() -> None:
    with pytest.raises(ValueError, match="expected: in_channels <= hidden_channels = 2"):
        build("dygrencoder", hidden_channels=2)


def test_dygrencoder_unknown_aggregation_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected: one of add, max, mean\n  got:      'sum'"):
        build("dygrencoder", aggregation="sum")


# EvolveGCN


@pytest.mark.parametrize(("channels", "nodes"), [(7, 13), (4, 4), (6, 4)])
def test_evolvegcnh_reads_as_many_nodes_as_it_has_channels(channels: int, nodes: int) -> None:
    model, x = build("evolvegcnh", hidden_channels=channels), torch.randn(2, T, nodes, C)
    cell, none = model.cell, torch.zeros(2, 0, dtype=torch.long)
    for sample, forecast in zip(x, model(x, none), strict=True):
        weight, outputs = cell.initial_weight, []
        for embedded in model.embed(sample):
            direction = cell.pooling_layer.select.weight[0]
            scores = (embedded @ direction / direction.norm()).tanh()
            best = sorted(range(nodes), key=lambda n: -scores[n].item())[:channels]
            best += [best[-1]] * (channels - nodes)
            weight = cell.recurrent_layer((embedded * scores[:, None])[best][None], weight)[1]
            outputs.append((embedded @ weight[0]).relu())
        change = model.head(torch.cat(outputs, -1)).view(nodes, 3, 2).transpose(0, 1)
        torch.testing.assert_close(forecast, sample[-1:, :, :2] + change, rtol=0, atol=2e-6)


def test_evolvegcnh_of_upstream_fails_where_ours_does_not() -> None:
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        cells.EvolveGCNH(13, 7)(torch.randn(13, 7), torch.zeros(2, 0, dtype=torch.long))


# MPNNLSTM


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_mpnnlstm_dropout_out_of_range_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match=f"expected: 0 <= dropout < 1\n  got:      dropout = {dropout}"):
        build("mpnnlstm", dropout=dropout)


def test_mpnnlstm_drops_features_in_training_only() -> None:
    model, x = build("mpnnlstm", dropout=0.5), torch.randn(2, T, N, C)
    assert torch.equal(model(x, EDGES), model(x, EDGES))
    model.train()
    assert not torch.allclose(model(x, EDGES), model(x, EDGES))
