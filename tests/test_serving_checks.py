"""Backbones whose cities must not share a forward are found out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cities import SIZES, WINDOW, furthest, make_readings
from peft import get_peft_model
from toys import graph, pristine, raised, randomised

from stlora_peft import MultiCity, STLoraConfig
from stlora_peft.data import Scaler, time_encoding


class Toy(torch.nn.Module):
    """Hears the weighted sum of its neighbours, and what ``extra`` adds."""

    window, horizon, in_channels, out_channels = WINDOW, 2, 3, 1

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner, self.outer = torch.nn.Linear(WINDOW * 3, 6), torch.nn.Linear(6, 2)
        self.table = torch.nn.Embedding(5, 6)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, edge_weight: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x.transpose(1, 2).flatten(2)).relu()  # [b n c]
        if self.kind == "single precision":
            hidden = hidden @ torch.eye(6)
        if self.kind == "broken":
            raise KeyError("nothing here")
        if self.kind == "heaviest edge" and len(edge_weight):
            edge_weight = edge_weight / edge_weight.max()
        if self.kind == "few nodes" and x.shape[2] > 25:
            raise RuntimeError("too many nodes\nfor this backbone")
        source, target = edge_index
        hidden = hidden.index_add(1, target, hidden[:, source] * edge_weight[:, None])
        if self.kind == "mean":
            hidden = hidden + 1e-3 * hidden.mean(1, keepdim=True)
        if self.kind == "table":
            hidden = hidden + self.table.weight
        return self.outer(hidden).transpose(1, 2)[..., None]  # [b t n c]


def serve(kind: str, sizes: dict[str, int]) -> SimpleNamespace:
    torch.manual_seed(0)
    backbone = Toy(kind)
    served, models, edges = MultiCity(backbone), {}, {}
    bound = ["table"] if kind == "table" else []
    for name, size in sizes.items():
        config = STLoraConfig(
            num_nodes=size,
            target_modules=["inner", "outer"],
            predictor=None,
            node_bound=bound,
            node_layout={"inner": "b n c", "outer": "b n c"},
            scaler={"mean": [50.0], "std": [10.0]},
        )
        models[name] = randomised(get_peft_model(pristine(backbone), config)).eval()
        edge_index, weight = graph(size) if size > 1 else (torch.zeros(2, 0, dtype=torch.long), torch.zeros(0))
        edges[name] = edge_index, weight.float()
        served.add(name, models[name], edge_index=edge_index, edge_weight=weight.float())
    return SimpleNamespace(served=served, models=models, edges=edges)


def alone(city: SimpleNamespace, readings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    scaler, clock, found = Scaler((50.0,), (10.0,)), time_encoding(WINDOW, 5, None, "day")[:, None], {}
    for name, values in readings.items():
        x = torch.cat([scaler.transform(values), clock.expand(-1, values.shape[1], -1)], 2)[None]
        with torch.no_grad():
            found[name] = scaler.inverse(city.models[name](x, *city.edges[name]))[0]
    return found


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("edges alone", ""),
        ("table", ""),
        ("mean", "a node hears more than its edges tell"),
        ("heaviest edge", "a node hears more than its edges tell"),
        ("single precision", "cannot be tried out in float64"),
        ("few nodes", "cannot run on two cities side by side (too many nodes)"),
    ],
)
def test_backbone_is_joined_exactly_if_that_changes_no_number(kind, reason):
    city, readings = serve(kind, SIZES), make_readings()
    for row in city.served.report():
        assert reason in row.alone
        assert bool(row.alone) == bool(reason)
    assert furthest(city.served.forecast(readings), alone(city, readings)) < 1e-5


def test_a_first_city_of_one_node_does_not_hide_what_edges_do():
    sizes = {"one": 1} | SIZES
    city, readings = serve("heaviest edge", sizes), {"one": torch.full((WINDOW, 1, 1), 40.0)} | make_readings()
    assert [bool(row.alone) for row in city.served.report()] == [False, True, True, True]
    assert furthest(city.served.forecast(readings), alone(city, readings)) < 1e-5


def test_a_city_whose_own_model_does_not_run_is_refused():
    lines = raised(lambda: serve("broken", SIZES))
    assert lines["where"] == "city 'ara' is not added"
    assert lines["got"] == "KeyError: 'nothing here'"
