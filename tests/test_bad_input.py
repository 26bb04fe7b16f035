"""What users get wrong, on every backbone of the package and on one of their own: one clear error."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import ALL_BACKBONES, assert_same, call, graph, pristine, raised, randomised, small_backbone, windows

from stlora_peft import STLoraConfig, find_layouts, rebuild

N = 7
every = pytest.mark.parametrize("name", ALL_BACKBONES)


def city_model(name: str, num_nodes: int = N) -> PeftModel:
    """A backbone for 5 nodes, adapted to a city, its factors random."""
    backbone = small_backbone(name).eval().requires_grad_(False)
    return randomised(get_peft_model(pristine(backbone), STLoraConfig(num_nodes=num_nodes)).eval())


def no_edges() -> tuple[Tensor, Tensor]:
    return torch.empty(2, 0, dtype=torch.long), torch.empty(0)


# -- backbones of the package -------------------------------------------------------------------------------


@every
def test_edges_of_another_graph_are_refused(name: str) -> None:
    edge_index, edge_weight = graph(9)
    error = raised(lambda: city_model(name)(windows(N), edge_index, edge_weight.float()))
    assert error == {
        "where": "the graph does not fit the nodes",
        "expected": f"node numbers from 0 to {N - 1}, for N={N} nodes",
        "got": "numbers from 0 to 8",
        "fix": "give the graph of the city that x belongs to",
    }


@every
@pytest.mark.parametrize(
    ("edges", "got"), [(None, "NoneType"), (torch.zeros(2, 3), "shape (2, 3), torch.float32")], ids=["none", "floats"]
)
def test_edges_that_are_no_edges_are_refused(name: str, edges: Tensor | None, got: str) -> None:
    assert raised(lambda: city_model(name)(windows(N), edges)) == {
        "where": "the graph does not fit the nodes",
        "expected": "edge_index of shape (2, E), integer node numbers",
        "got": got,
        "fix": "put the sources in the first row and the targets in the second; without edges they are "
        "torch.empty(2, 0, dtype=torch.long)",
    }


@every
def test_a_window_other_than_built_for_is_refused(name: str) -> None:
    edge_index, edge_weight = graph(N)
    error = raised(lambda: city_model(name)(windows(N)[:, 1:], edge_index, edge_weight.float()))
    assert error == {
        "where": f"backbone '{name}': wrong number of input steps",
        "expected": "window=9 on axis 't' of 'b t n c'",
        "got": f"8 steps from an input of shape (2, 8, {N}, 3)",
        "fix": "give 9 steps, or build the backbone with window=8",
    }


@every
def test_windows_of_another_city_are_refused(name: str) -> None:
    error = raised(lambda: call(city_model(name), 5))
    assert error["where"].endswith("wrong number of nodes")
    assert f"N={N}" in error["expected"]
    assert re.search(r"N=5|10 rows|90 rows", error["got"])
    assert "num_nodes" in error["fix"]


@every
def test_a_city_of_one_node_without_edges_is_forecast_and_trains(name: str) -> None:
    backbone = small_backbone(name).eval()
    model = get_peft_model(pristine(backbone), STLoraConfig(num_nodes=1)).eval()
    assert torch.equal(model(windows(1), *no_edges()), rebuild(backbone, 1)(windows(1), *no_edges()))
    forecast = randomised(model).train()(windows(1), *no_edges())
    forecast.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert gradients
    assert all(torch.isfinite(value).all() for value in [forecast, *gradients])


@every
def test_a_batch_of_one_is_forecast_as_in_a_larger_batch(name: str) -> None:
    model = city_model(name)
    edge_index, edge_weight = graph(N)
    both = model(windows(N), edge_index, edge_weight.float())
    for sample in range(2):
        alone = model(windows(N)[sample : sample + 1], edge_index, edge_weight.float())
        assert_same(alone, both[sample : sample + 1], tolerance=1e-5)


# -- a backbone of the user's -------------------------------------------------------------------------------


class Mine(nn.Module):
    """A GRU over each node's window, the nodes folded into its batch, and a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.rnn, self.out = nn.Linear(3, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 12)
        self.spare = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, t, n, _ = x.shape
        rows = self.mix(x).transpose(1, 2).reshape(b * n, t, -1)
        forecast: Tensor = self.out(self.rnn(rows)[0][:, -1]).reshape(b, n, 12, 1).transpose(1, 2)
        return forecast


LAYERS = ["mix", "rnn", "out"]
LAYOUT = {"mix": "b t n c", "rnn": "(b n) t c", "out": "(b n) c"}


def own(num_nodes: int, layers: list[str] = LAYERS, **options: object) -> PeftModel:
    options = {"node_layout": LAYOUT, "predictor": None} | options
    return get_peft_model(Mine(), STLoraConfig(num_nodes=num_nodes, target_modules=layers, **options))


def test_a_layout_with_unknown_axes_is_refused_when_it_is_written() -> None:
    error = raised(lambda: own(5, node_layout={"mix": "b t q c"}))
    assert "'b t q c'" in error["where"] + error["got"]
    assert error["fix"]


def test_a_layout_whose_node_axis_has_another_size_is_refused_when_the_layer_runs() -> None:
    model = own(5, node_layout=LAYOUT | {"mix": "b n t c"})
    error = raised(lambda: model(torch.rand(2, 12, 5, 3)))
    assert error["where"] == "stlora adapter 'default' on 'mix': wrong number of nodes"
    assert "N=5" in error["expected"]
    assert "(2, 12, 5, 3)" in error["got"]


@pytest.mark.parametrize(
    ("shape", "num_nodes", "readings"),
    [
        ((2, 12, 12, 3), 12, "'b n t c' or 'b t n c'"),
        ((5, 12, 5, 3), 5, "'n b t c' or 'b t n c'"),
        (
            (2, 12, 1, 3),
            1,
            "'b t n c' or '(b n) t u c' or '(n b) t u c' or 't (b n) u c' or 't (n b) u c'",
        ),
        ((1, 12, 1, 3), 1, "'n b t c' or 'b t n c' or 't (b n) u c' or 't (n b) u c'"),
    ],
    ids=["as many nodes as steps", "as many nodes as samples", "one node", "one node and a batch of one"],
)
def test_an_ambiguous_axis_shows_the_readings_and_is_never_guessed(
    shape: tuple[int, ...], num_nodes: int, readings: str
) -> None:
    model = own(num_nodes, node_layout={})
    assert raised(lambda: model(torch.rand(shape))) == {
        "where": "stlora adapter 'default' on 'mix': the node axis cannot be found",
        "expected": f"exactly one axis of N={num_nodes} nodes",
        "got": f"an input of shape {shape}, which reads as {readings}",
        "fix": "say which is true in STLoraConfig(node_layout={<layer name>: <pattern>}), or let find_layouts "
        "find it with sizes that cannot be confused",
    }
    assert own(num_nodes)(torch.rand(shape)).shape == (shape[0], 12, num_nodes, 1)  # said, it works


def test_a_target_that_is_never_called_is_reported_by_find_layouts() -> None:
    error = raised(
        lambda: find_layouts(Mine(), torch.rand(2, 12, 5, 3), num_nodes=5, target_modules=[*LAYERS, "spare"])
    )
    assert "spare" in error["where"] + error["got"]
    assert error["fix"]


def test_a_target_that_is_never_called_is_reported_after_the_first_forward() -> None:
    model = own(5, [*LAYERS, "spare"])
    with pytest.warns(UserWarning, match="spare") as caught:
        model(torch.rand(2, 12, 5, 3))
    assert len(caught) == 1
