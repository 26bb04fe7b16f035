"""Parts of a graph: what they hold, and that their core forecasts and learns as in the whole graph."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import k_hop_subgraph, subgraph, to_undirected
from toys import randomised, small_backbone, windows

from stlora_peft import STLoraConfig, node_subset
from stlora_peft.sampling import Neighbourhoods, SubGraph, partition


def street_grid(side: int = 9, apart: int = 0) -> tuple[Tensor, Tensor, int]:
    """Streets of a square town, one way and two way, some of them missing, and ``apart`` nodes without any."""
    generator = torch.Generator().manual_seed(side)
    place = torch.arange(side * side).reshape(side, side)
    along = torch.stack([place[:, :-1].flatten(), place[:, 1:].flatten()])
    down = torch.stack([place[:-1].flatten(), place[1:].flatten()])
    edges = torch.cat([along, down, along[:, ::3].flip(0), down[:, ::2].flip(0)], 1)
    kept = torch.rand(edges.shape[1], generator=generator) < 0.9
    edges = torch.randperm(side * side, generator=generator)[edges[:, kept]]
    weight = 0.2 + torch.rand(edges.shape[1], generator=generator, dtype=torch.float64)
    return edges, weight, side * side + apart


@pytest.mark.parametrize(("size", "hops", "apart"), [(10, 0, 0), (10, 2, 7), (81, 1, 0), (1, 1, 2), (500, 3, 0)])
def test_every_node_is_in_one_core_and_a_halo_is_the_neighbourhood(size: int, hops: int, apart: int) -> None:
    edges, weight, num_nodes = street_grid(apart=apart)
    parts = partition(edges, weight, num_nodes, nodes_per_step=size, hops=hops)
    assert torch.cat([part.core for part in parts]).sort().values.tolist() == list(range(num_nodes))
    assert max(part.num_core for part in parts) - min(part.num_core for part in parts) <= 1
    assert len(parts) == -(-num_nodes // size)
    for part in parts:
        around, *_ = k_hop_subgraph(part.core, hops, to_undirected(edges, num_nodes=num_nodes), num_nodes=num_nodes)
        assert sorted(part.node_ids.tolist()) == around.tolist()
        wanted, weights = subgraph(part.node_ids, edges, weight, num_nodes=num_nodes)
        assert torch.equal(part.node_ids[part.edge_index], wanted)
        assert torch.equal(part.edge_weight, weights)


def test_one_part_is_the_graph_itself() -> None:
    edges, weight, num_nodes = street_grid()
    (part,) = partition(edges, weight, num_nodes, nodes_per_step=num_nodes, hops=2)
    assert torch.equal(part.node_ids, torch.arange(num_nodes))
    assert torch.equal(part.edge_index, edges)
    assert torch.equal(part.edge_weight, weight)


def test_parts_of_a_grid_are_compact() -> None:
    edges, weight, num_nodes = street_grid(40)
    parts = partition(edges, weight, num_nodes, nodes_per_step=100, hops=1)
    assert sum(len(part.node_ids) for part in parts) < 1.6 * num_nodes  # squares of 10 x 10 would be 1.4


def test_the_same_graph_gives_the_same_parts() -> None:
    first, second = (partition(*street_grid(), nodes_per_step=20, hops=1) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.node_ids, other.node_ids)


def test_parts_of_a_graph_without_edges_have_no_halo() -> None:
    none = torch.empty(2, 0, dtype=torch.long)
    parts = partition(none, torch.empty(0), 7, nodes_per_step=3, hops=2)
    assert [(part.num_core, len(part.node_ids), part.edge_index.shape[1]) for part in parts] == [
        (2, 2, 0),
        (2, 2, 0),
        (3, 3, 0),
    ]


@pytest.mark.parametrize(("option", "value", "least"), [("nodes_per_step", 0, 1), ("hops", -1, 0)])
def test_sizes_out_of_range_are_refused(option: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match="cannot be divided") as error:
        partition(*street_grid(), **({"nodes_per_step": 5, "hops": 1} | {option: value}))
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert option in lines[0]
    assert f"{option} >= {least}" in lines[1]
    assert f"{option}={value}" in lines[2]
    assert "hops=2" in lines[3]


def adapted(name: str, num_nodes: int, conditioning: str) -> PeftModel:
    options = {"exact_diffusion": True} if name == "dcrnn" else {}
    config = STLoraConfig(
        num_nodes=num_nodes, conditioning=conditioning, r=2, lora_dropout=0.0, emb_size=3, emb_noise=0.0
    )
    return randomised(get_peft_model(small_backbone(name, num_nodes, **options).double(), config)).double().train()


def compare_with_whole(model: PeftModel, part: SubGraph, whole: tuple[Tensor, Tensor], x: Tensor) -> None:
    """Forecast, loss and gradients of the core, whole graph and part."""
    core = part.core
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def learned(forecast: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        loss = forecast.square().mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return forecast, loss, [torch.zeros(1) if gradient is None else gradient for gradient in gradients]

    statistics = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    expected = learned(model(x, *whole)[:, :, core])
    after = {key: model.state_dict()[key][core].clone() for key in statistics if "nall" in key}
    model.load_state_dict(statistics, strict=False)
    with node_subset(model, part.node_ids, num_core=part.num_core):
        found = learned(model(x[:, :, part.node_ids], part.edge_index, part.edge_weight)[:, :, : part.num_core])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for key, value in after.items():
        torch.testing.assert_close(model.state_dict()[key][core], value, rtol=1e-9, atol=1e-12)


# K=3 in two blocks: four edges, and one more for the degrees. K=3 in each gate and each candidate of nine steps: 36.
@pytest.mark.parametrize(
    ("name", "conditioning", "hops"),
    [
        ("stgcn", "gate", 5),
        ("stgcn", "core", 5),
        ("gconvgru", "embedding", 37),
        ("dcrnn", "gate", 37),
        ("lstm", "full", 0),
    ],
)
def test_core_forecasts_and_learns_as_in_the_whole_graph(name: str, conditioning: str, hops: int) -> None:
    if hops > 5:  # a long street, or the halo would be all of the town
        nodes = torch.arange(99)
        edges, num_nodes = torch.stack([nodes, nodes + 1]), 100
        edges, weight = torch.cat([edges, edges[:, ::2].flip(0)], 1), torch.linspace(0.3, 1, 149, dtype=torch.float64)
    else:
        edges, weight, num_nodes = street_grid(20)
    model = adapted(name, num_nodes, conditioning)
    part = partition(edges, weight, num_nodes, nodes_per_step=num_nodes // 10, hops=hops)[0]
    assert len(part.node_ids) < num_nodes
    compare_with_whole(model, part, (edges, weight), windows(num_nodes).double())


def test_a_halo_that_is_too_shallow_shows() -> None:
    edges, weight, num_nodes = street_grid(20)
    part = partition(edges, weight, num_nodes, nodes_per_step=40, hops=1)[0]
    with pytest.raises(AssertionError):
        compare_with_whole(adapted("stgcn", num_nodes, "gate"), part, (edges, weight), windows(num_nodes).double())


def test_a_batch_with_node_ids_and_seeds_first_is_a_part() -> None:
    """What PyG's NeighborLoader yields for all neighbours: ``n_id``, ``edge_index``, ``batch_size`` seeds first."""
    edges, weight, num_nodes = street_grid(20)
    model = adapted("stgcn", num_nodes, "gate")
    part = Neighbourhoods(edges, weight, num_nodes).around(torch.tensor([3, 77, 200]), hops=5)
    batch = Data(edge_index=part.edge_index, edge_attr=part.edge_weight, n_id=part.node_ids, batch_size=3)
    x = windows(num_nodes).double()
    expected = model.eval()(x, edges, weight)[:, :, [3, 77, 200]]
    with node_subset(model, batch.n_id, num_core=batch.batch_size):
        found = model(x[:, :, batch.n_id], batch.edge_index, batch.edge_attr)[:, :, : batch.batch_size]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
