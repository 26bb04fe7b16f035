"""Convolutions inside PyG's HeteroConv: each reads the nodes of the type that it writes to."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hosts import ONE_WAY, C, D, N
from peft import PeftModel, get_peft_model
from reference import pointwise_update
from torch import Tensor, nn
from toys import CONDITIONINGS, assert_same, factors_of, leaves, raised, randomised

from stlora_peft import STLoraConfig, find_layouts

gnn = pytest.importorskip("torch_geometric.nn")

STATIONS, WIDTH = 4, 2
ALONG, FEEDS, TELLS = ("sensor", "along", "sensor"), ("station", "feeds", "sensor"), ("sensor", "tells", "station")
EDGES = {
    ALONG: ONE_WAY,
    FEEDS: torch.tensor([[0, 3, 3], [0, 1, 2]]),
    TELLS: torch.tensor([[0, 0, 1], [1, 3, 3]]),
}
NAMES = {kind: f"<{'___'.join(kind)}>" for kind in EDGES}
R, ALPHA = 2, 5
conditionings = pytest.mark.parametrize("conditioning", CONDITIONINGS)


class Net(nn.Module):
    """Roads with sensors and weather stations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = gnn.HeteroConv(
            {ALONG: gnn.GCNConv(C, D), FEEDS: gnn.SAGEConv((WIDTH, C), D), TELLS: gnn.SAGEConv((C, WIDTH), D)}
        )

    def forward(self, x: dict[str, Tensor], edges: dict[tuple[str, str, str], Tensor]) -> dict[str, Tensor]:
        return self.conv(x, edges)


def features(batch: int = 1) -> dict[str, Tensor]:
    """Rows ``(b n) c`` of each type."""
    generator = torch.Generator().manual_seed(4)
    sizes = {"sensor": (batch * N, C), "station": (batch * STATIONS, WIDTH)}
    return {kind: torch.randn(size, generator=generator, dtype=torch.float64) for kind, size in sizes.items()}


def union(batch: int) -> dict[tuple[str, str, str], Tensor]:
    """Edges of several copies of the graph, as PyG batches them."""
    counts = {"sensor": N, "station": STATIONS}
    return {
        kind: torch.cat(
            [edges + torch.tensor([[counts[kind[0]]], [counts[kind[2]]]]) * i for i in range(batch)], dim=1
        )
        for kind, edges in EDGES.items()
    }


def adapted(*kinds: tuple[str, str, str], num_nodes: int = N, name: str = "default", **options: object) -> PeftModel:
    settings = {"num_nodes": num_nodes, "r": R, "lora_alpha": ALPHA, "emb_size": 3, "predictor": None}
    settings |= {"conditioning": "gate", "lora_dropout": 0.0, "emb_noise": 0.0}
    targets = [NAMES[kind] for kind in kinds]
    config = STLoraConfig(target_modules=targets, init_weights=False, **(settings | options))
    return randomised(get_peft_model(Net().double(), config, adapter_name=name).double())


def update(x: Tensor, conditioning: str, factors: dict[str, Tensor], num_nodes: int = N) -> Tensor:
    """The update of rows ``(b n) c`` by the loop."""
    rows = x.view(1, -1, num_nodes, x.shape[-1])
    return pointwise_update(rows, conditioning, factors, ALPHA / R).view(x.shape[0], -1)


def factors(model: nn.Module, kind: tuple[str, str, str], adapter: str = "default") -> dict[str, Tensor]:
    return factors_of(model, f"base_model.model.conv.convs.{NAMES[kind]}", adapter)


@pytest.mark.parametrize("batch", [1, 2])
@conditionings
def test_convolutions_of_one_type_of_node_match_the_loop(conditioning: str, batch: int) -> None:
    model, x, edges = adapted(ALONG, FEEDS, conditioning=conditioning), features(batch), union(batch)
    base, theirs = Net().double()(x, edges), {kind: leaves(factors(model, kind)) for kind in (ALONG, FEEDS)}
    out = model(x, edges)
    expected = base["sensor"] + sum(update(x["sensor"], conditioning, theirs[kind]) for kind in theirs)
    assert_same(out["sensor"], expected)
    assert torch.equal(out["station"], base["station"])

    (out["sensor"].square().sum()).backward()
    (expected.square().sum()).backward()
    for kind, reference in theirs.items():
        for name, factor in factors(model, kind).items():
            if name != "emb":  # its gradient is the sum over both convolutions
                assert_same(factor.grad, reference[name].grad)


def test_each_type_of_node_has_an_adapter_of_its_own_size_and_both_are_active() -> None:
    model, x = adapted(ALONG, FEEDS, name="sensors"), features()
    stations = {
        "num_nodes": STATIONS,
        "target_modules": [NAMES[TELLS]],
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "predictor": None,
    }
    model.add_adapter("stations", STLoraConfig(conditioning="core", **stations))
    model.base_model.set_adapter(["sensors", "stations"])
    randomised(model.double())
    out, base = model(x, EDGES), Net().double()(x, EDGES)
    own = factors(model, TELLS, "stations")
    assert_same(out["station"], base["station"] + update(x["station"], "core", own, STATIONS))
    both = [update(x["sensor"], "gate", factors(model, kind, "sensors")) for kind in (ALONG, FEEDS)]
    assert_same(out["sensor"], base["sensor"] + sum(both))


@conditionings
def test_saved_adapter_loads_bitwise(conditioning: str, tmp_path: Path) -> None:
    model, x = adapted(ALONG, FEEDS, conditioning=conditioning).eval(), features()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net().double(), tmp_path).double().eval()
    assert torch.equal(loaded(x, EDGES)["sensor"], model(x, EDGES)["sensor"])


def test_shared_update_of_pairs_merges_into_the_root_weight() -> None:
    model, x = adapted(FEEDS, TELLS, conditioning="shared"), features()
    expected, plain = model(x, EDGES), Net().double()(x, EDGES)
    merged = copy.deepcopy(model).merge_and_unload()
    for kind in ("sensor", "station"):
        assert_same(merged(x, EDGES)[kind], expected[kind])
        assert (expected[kind] - plain[kind]).abs().max() > 1e-2


def test_edges_between_two_graphs_of_a_batch_are_refused() -> None:
    model, x, edges = adapted(FEEDS), features(2), union(2)
    edges[FEEDS][0, 0] = STATIONS  # a station of the second graph
    lines = raised(lambda: model(x, edges))
    assert lines["where"] == f"stlora adapter 'default' on 'conv.convs.{NAMES[FEEDS]}': wrong number of nodes"
    assert lines["got"] == f"{2 * N} rows with edges from one graph of {N} nodes to another"


def test_type_with_another_number_of_nodes_is_refused_by_name() -> None:
    lines = raised(lambda: adapted(TELLS)(features(), EDGES))
    assert lines["where"] == f"stlora adapter 'default' on 'conv.convs.{NAMES[TELLS]}': wrong number of nodes"


def test_layer_without_features_of_the_receiving_nodes_is_refused() -> None:
    model, x = adapted(FEEDS), features()
    del x["sensor"]
    edges = {FEEDS: EDGES[FEEDS]}
    Net().double().conv.convs[FEEDS]((x["station"], None), EDGES[FEEDS], size=(STATIONS, N))  # PyG takes it
    assert raised(lambda: model(x, edges)) == {
        "where": f"stlora layer 'conv.convs.{NAMES[FEEDS]}' cannot read its input",
        "expected": "features of the receiving nodes",
        "got": "a pair whose second part is None",
        "fix": "give features of these nodes too, or leave the layer out with exclude_modules",
    }


def test_layouts_of_convolutions_inside_are_found_by_the_probe() -> None:
    class Roads(Net):
        def forward(self, x: Tensor) -> Tensor:  # [b n c]
            stations = x[..., :1, :WIDTH].expand(-1, STATIONS, -1)
            return self.conv({"sensor": x, "station": stations}, EDGES)["sensor"]

    targets = [NAMES[ALONG], NAMES[FEEDS]]
    found = find_layouts(Roads(), torch.randn(2, N, C), num_nodes=N, target_modules=targets)
    assert found == {f"conv.convs.{name}": "b n c" for name in targets}


def test_hetero_conv_itself_is_refused_and_its_convolutions_named() -> None:
    net = Net()
    lines = raised(lambda: get_peft_model(net, STLoraConfig(num_nodes=N, target_modules=["conv"], predictor=None)))
    assert lines["where"] == "layer 'conv' cannot be adapted"
    assert lines["expected"].startswith("one of torch.nn.Linear, ")
    assert lines["got"] == (
        "torch_geometric.nn.conv.hetero_conv.HeteroConv; its convolutions can be targets instead: "
        "<sensor___along___sensor>, <station___feeds___sensor>, <sensor___tells___station>"
    )
    assert type(net.conv) is gnn.HeteroConv
