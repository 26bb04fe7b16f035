"""New nodes in a city that has an adapter: old entries stay, new ones are means of those that read alike."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from toys import CONDITIONINGS, assert_same, call, graph, pristine, raised, randomised, small_backbone, windows

from stlora_peft import STLoraConfig, fingerprint
from stlora_peft.data import City
from stlora_peft.extension import extend_adapter, nearest_nodes
from stlora_peft.storage import load_adapter, save_adapter
from stlora_peft.tuner.node_bound import node_bound_modules

OLD = ("a", "b", "c", "d")  # as many as the networks have channels: sizes alone do not tell a node axis
NOW = ("y", "c", "a", "x", "d", "b")
SCALER = {"mean": [50.0], "std": [8.0]}
BACKBONES = ("lstm", "stgcn", "agcrn", "gwnet", "astgcn", "staeformer")
MATRIX = [case for case in itertools.product(BACKBONES, CONDITIONINGS) if case != ("lstm", "shared")]

# Which axes of a tensor are nodes, by its name: what the package finds by comparing shapes is written down here.
FACTORS = {"gate": (0,), "node_bias": (0,), "core": (0,), "node_vector": (0,), "emb": (0,)}
BOUND: dict[str, dict[str, tuple[int, ...]]] = {
    "lstm": {},
    "stgcn": dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (0,)),
    "agcrn": {"weight": (0,)},
    "gwnet": {"weight": (0,)},
    "staeformer": {"rows": (0,)},
    "astgcn": {"_U1": (0,), "_U2": (1,), "_bs": (1, 2), "_Vs": (0, 1)},
}


def node_axes(key: str, name: str, conditioning: str) -> tuple[int, ...]:
    """Axes of a saved tensor that are nodes."""
    kind, _, rest = key.partition(".nall_")[2].partition(".")
    if kind == "node_bound":
        return BOUND[name].get(rest, ())
    factor = rest.rpartition("_")[0] if kind == "predictor" else kind
    return (0,) if factor == "A" and conditioning == "full" else FACTORS.get(factor, ())


def city(node_ids: tuple[str, ...] = NOW, steps: int = 50, seed: int = 0) -> City:
    """A city whose nodes read the same under the same names, whatever their order."""
    series = {}
    for node in sorted({*NOW, *node_ids}):
        rng = np.random.default_rng([seed, ord(node)])
        series[node] = 50 + 10 * rng.standard_normal(steps)
        series[node][rng.random(steps) < 0.1] = np.nan
    edge_index, edge_weight = graph(len(node_ids))
    values = np.stack([series[node] for node in node_ids], axis=1)
    return City(values, edge_index.numpy(), edge_weight.numpy(), 60, node_ids, name="town", dead_sensors="keep")


def changed(now: City, **histories: np.ndarray) -> City:
    """The city with other readings of some nodes."""
    values = now.values.copy()
    for node, readings in histories.items():
        values[:, now.node_ids.index(node), 0] = readings
    return City(values, now.edge_index, now.edge_weight, 60, now.node_ids, name=now.name, dead_sensors="keep")


def readings(now: City, node: str) -> np.ndarray:
    return now.values[:, now.node_ids.index(node), 0]


def trained(backbone: nn.Module, conditioning: str = "gate", **options: object) -> PeftModel:
    """An adapter of the old nodes, every tensor of its own at random."""
    known = {"num_nodes": len(OLD), "node_ids": list(OLD), "scaler": SCALER, "r": 2, "emb_size": 3}
    config = STLoraConfig(conditioning=conditioning, **{**known, **options})
    model = randomised(get_peft_model(pristine(backbone), config)).eval()
    with torch.no_grad():
        for module in node_bound_modules(model).values():
            for value in module.state_dict().values():
                value.add_(torch.rand_like(value) if value.is_floating_point() else 3)
    return model


def tensors(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name=adapter)


@functools.cache
def case(name: str, conditioning: str) -> tuple[nn.Module, PeftModel, PeftModel]:
    """A backbone, an adapter on it and the extended adapter; nobody may change them."""
    backbone = small_backbone(name).eval()
    model = trained(backbone, conditioning)
    return backbone, model, extend_adapter(model, backbone, city())


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape, one.numpy().tobytes()) == (other.dtype, other.shape, other.numpy().tobytes())


def loop(old: Tensor, axes: tuple[int, ...], made_of: list[dict[int, float]]) -> Tensor:
    """The extended tensor, entry by entry in float64."""
    values = old.double().numpy()
    shape = [len(made_of) if axis in axes else size for axis, size in enumerate(old.shape)]
    out = np.zeros(shape)
    for index in np.ndindex(*shape):
        nodes = [index[axis] for axis in axes]
        if len(set(nodes)) == 1:
            terms = [((j,) * len(axes), weight) for j, weight in made_of[nodes[0]].items()]
        else:
            pairs = itertools.product(*(made_of[node].items() for node in nodes))
            terms = [((j, k), v * w) for (j, v), (k, w) in pairs]
        for numbers, weight in terms:
            place = list(index)
            for axis, number in zip(axes, numbers, strict=True):
                place[axis] = number
            out[index] += weight * values[tuple(place)]
    return torch.from_numpy(out).to(old.dtype)


# -- entries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "conditioning"), MATRIX)
def test_entries_of_old_nodes_are_their_own_bit_for_bit_at_their_new_places(name: str, conditioning: str) -> None:
    _, model, new = case(name, conditioning)
    before, after = tensors(model), tensors(new)
    assert before.keys() == after.keys()
    places = torch.tensor([NOW.index(node) for node in OLD])
    for key, value in after.items():
        for axis in node_axes(key, name, conditioning):
            value = value.index_select(axis, places)
        assert same_bits(value, before[key]), key


@pytest.mark.parametrize(("name", "conditioning"), MATRIX)
def test_entries_of_new_nodes_match_a_loop(name: str, conditioning: str) -> None:
    _, model, new = case(name, conditioning)
    found = nearest_nodes(model, city())
    made_of = [{OLD.index(j): w for j, w in found.get(node, {node: 1.0}).items()} for node in NOW]
    grown = 0
    for key, value in tensors(new).items():
        if axes := node_axes(key, name, conditioning):
            assert_same(value, loop(tensors(model)[key], axes, made_of), 1e-8)
            grown += 1
    assert grown > 0


def test_loop_of_a_pair_takes_a_node_with_itself_from_nodes_with_themselves() -> None:
    old = torch.tensor([[1.0, 5.0], [7.0, 3.0]])
    found = loop(old, (0, 1), [{0: 1.0}, {1: 1.0}, {0: 0.5, 1: 0.5}])
    assert found.tolist() == [[1.0, 5.0, 3.0], [7.0, 3.0, 5.0], [4.0, 4.0, 2.0]]


@pytest.mark.parametrize(("name", "conditioning"), MATRIX)
def test_extending_changes_neither_adapter_nor_backbone(name: str, conditioning: str) -> None:
    backbone = small_backbone(name).eval()
    model = trained(backbone, conditioning)
    before = [copy.deepcopy(module.state_dict()) for module in (backbone, model)]
    new = extend_adapter(model, backbone, city())
    for module, state in zip((backbone, model), before, strict=True):
        assert all(same_bits(value, state[key]) for key, value in module.state_dict().items())
    assert fingerprint(new) == fingerprint(backbone)
    assert not new.training
    config, old = (one.peft_config["default"].to_dict() for one in (new, model))
    assert config == old | {"num_nodes": 6, "node_ids": list(NOW)}


def test_modules_to_save_stay_as_they_are() -> None:
    backbone = small_backbone("lstm").eval()
    model = trained(backbone, target_modules=["lstm"], modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1.0)
    new = extend_adapter(model, backbone, city())
    key = "base_model.model.head.weight"
    assert same_bits(tensors(new)[key], tensors(model)[key])


# -- forecasts ----------------------------------------------------------------------------------------------


def forecast(model: nn.Module, node_ids: tuple[str, ...]) -> Tensor:
    """Forecast of nodes whose windows and roads go with their names."""
    order = torch.tensor([NOW.index(node) for node in node_ids])
    place = torch.full((len(NOW),), -1)
    place[order] = torch.arange(len(order))
    edge_index, edge_weight = graph(len(NOW))
    edges = place[edge_index]
    inside = (edges >= 0).all(0)
    with torch.no_grad():
        return model(windows(len(NOW))[:, :, order], edges[:, inside], edge_weight.float()[inside])


@pytest.mark.parametrize("conditioning", CONDITIONINGS[:-1])
def test_new_node_that_reads_as_an_old_one_forecasts_as_that_one(conditioning: str) -> None:
    now, (backbone, model, _) = city(), case("lstm", conditioning)
    new = extend_adapter(model, backbone, changed(now, x=readings(now, "c")))
    x, c = NOW.index("x"), NOW.index("c")
    for key, value in tensors(new).items():
        for axis in node_axes(key, "lstm", conditioning):
            assert torch.equal(value.select(axis, x), value.select(axis, c)), key
    window = windows(len(NOW))
    window[:, :, x] = window[:, :, c]
    with torch.no_grad():
        out = new(window, graph(len(NOW))[0])
    assert_same(out[:, :, x], out[:, :, c], 1e-6)
    assert not torch.allclose(out[:, :, x], out[:, :, NOW.index("a")], atol=1e-2)


@pytest.mark.parametrize(("name", "conditioning"), MATRIX)
def test_permuted_city_has_permuted_entries_and_forecasts(name: str, conditioning: str) -> None:
    backbone, model, new = case(name, conditioning)
    permuted = ("b", "x", "a", "d", "c", "y")
    other = extend_adapter(model, backbone, city(permuted))
    order = torch.tensor([NOW.index(node) for node in permuted])
    for key, value in tensors(new).items():
        for axis in node_axes(key, name, conditioning):
            value = value.index_select(axis, order)
        assert same_bits(tensors(other)[key], value), key
    assert_same(forecast(other, permuted), forecast(new, NOW)[:, :, order], 1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS[:-1])
def test_forecasts_of_old_nodes_stay_where_nodes_do_not_hear_one_another(conditioning: str) -> None:
    _, model, new = case("lstm", conditioning)
    order = torch.tensor([NOW.index(node) for node in OLD])
    assert_same(forecast(new, NOW)[:, :, order], forecast(model, OLD), 1e-6)


def test_forecasts_of_old_nodes_change_where_they_hear_the_new_ones() -> None:
    _, model, new = case("stgcn", "gate")
    order = torch.tensor([NOW.index(node) for node in OLD])
    assert not torch.allclose(forecast(new, NOW)[:, :, order], forecast(model, OLD), atol=1e-3)


# -- files and adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "conditioning"), MATRIX)
def test_extended_adapter_is_saved_and_loaded_bit_for_bit(name: str, conditioning: str, tmp_path: Path) -> None:
    backbone, model, new = case(name, conditioning)
    save_adapter(tmp_path / "old", model)
    loaded = load_adapter(backbone, tmp_path / "old", city(OLD))
    for one in (new, extend_adapter(loaded, backbone, city())):
        save_adapter(tmp_path / "new", one)
        again = load_adapter(backbone, tmp_path / "new", city())
        assert all(same_bits(value, tensors(new)[key]) for key, value in tensors(again).items())
        assert torch.equal(forecast(again, NOW), forecast(new, NOW))


def test_extended_twice_keeps_every_node() -> None:
    backbone, _, new = case("stgcn", "gate")
    now = (*reversed(NOW), "z")
    twice = extend_adapter(new, backbone, city(now))
    kept = torch.tensor([now.index(node) for node in NOW])
    for key, value in tensors(twice).items():
        for axis in node_axes(key, "stgcn", "gate"):
            value = value.index_select(axis, kept)
        assert same_bits(value, tensors(new)[key]), key


@pytest.mark.parametrize("active", ["default", "other"])
def test_active_adapter_alone_is_extended_under_its_name(active: str) -> None:
    backbone = small_backbone("stgcn").eval()
    model = trained(backbone)
    model.add_adapter("other", STLoraConfig(num_nodes=4, r=3, node_ids=list(OLD), scaler=SCALER))
    randomised(model, seed=5).set_adapter(active)
    before = copy.deepcopy(model.state_dict())
    new = extend_adapter(model, backbone, city())
    assert list(new.peft_config) == [active]
    assert new.peft_config[active].r == (3 if active == "other" else 2)
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())
    places = torch.tensor([NOW.index(node) for node in OLD])
    for key, value in tensors(new, active).items():
        for axis in node_axes(key, "stgcn", "gate"):
            value = value.index_select(axis, places)
        assert same_bits(value, tensors(model, active)[key]), key


def test_shared_adapter_without_node_bound_modules_fits_the_new_city_as_it_is(tmp_path: Path) -> None:
    backbone = small_backbone("lstm").eval()
    save_adapter(tmp_path / "shared", trained(backbone, "shared"))
    assert call(load_adapter(backbone, tmp_path / "shared"), 6).shape == (2, 4, 6, 1)


# -- which nodes are near -----------------------------------------------------------------------------------


def test_nearest_nodes_match_a_loop_over_steps() -> None:
    now, (_, model, _) = city(), case("lstm", "gate")
    for neighbours in (1, 3, 9):
        found = nearest_nodes(model, now, neighbours)
        assert list(found) == ["y", "x"]
        for node, shares in found.items():
            distances = {}
            for other in OLD:
                pairs = zip(readings(now, node).tolist(), readings(now, other).tolist(), strict=True)
                known = [abs(a - b) / 8.0 for a, b in pairs if a == a and b == b]
                distances[other] = sum(known) / len(known)
            chosen = sorted(OLD, key=distances.__getitem__)[:neighbours]
            total = sum(1 / distances[other] for other in chosen)
            assert list(shares) == chosen
            assert list(shares.values()) == pytest.approx([1 / distances[j] / total for j in chosen], rel=1e-6)


def test_nearest_nodes_of_hand_computed_distances() -> None:
    _, model, _ = case("lstm", "gate")
    level = {"a": 50.0, "b": 60.0, "c": 90.0, "d": 200.0, "x": 54.0, "y": 90.0}
    now = changed(city(), **{node: np.full(50, value) for node, value in level.items()})
    assert nearest_nodes(model, now, 2) == {"y": {"c": 1.0}, "x": {"a": pytest.approx(0.6), "b": pytest.approx(0.4)}}


def test_node_that_reads_as_two_old_ones_is_their_mean() -> None:
    now, (_, model, _) = city(), case("lstm", "gate")
    same = readings(now, "c")
    assert nearest_nodes(model, changed(now, x=same, d=same), 2)["x"] == {"c": 0.5, "d": 0.5}


def test_channels_count_in_units_of_the_adapters_scaler() -> None:
    backbone = small_backbone("lstm").eval()
    model = trained(backbone, scaler={"mean": [0.0, 0.0], "std": [1.0, 100.0]})
    base = {"a": (0.0, 0.0), "b": (9.0, 0.0), "c": (9.0, 900.0), "d": (90.0, 0.0), "x": (1.0, 200.0), "y": (0.0, 0.0)}
    values = np.tile(np.array([base[node] for node in NOW], dtype=np.float32), (8, 1, 1))
    now = City(values, *(value.numpy() for value in graph(6)), 60, NOW)
    found = nearest_nodes(model, now, 2)["x"]  # mean gaps 1.5 to a, 5 to b, 7.5 to c
    assert found == {"a": pytest.approx(5 / 6.5), "b": pytest.approx(1.5 / 6.5)}


def test_adapter_without_scaler_compares_in_units_of_the_given_steps() -> None:
    backbone = small_backbone("lstm").eval()
    found = nearest_nodes(trained(backbone, scaler=None), city())
    known = nearest_nodes(trained(backbone), city())
    assert list(found["x"]) == list(known["x"])
    assert list(found["x"].values()) == pytest.approx(list(known["x"].values()))


def test_steps_that_are_not_given_are_not_read() -> None:
    now, (_, model, _) = city(), case("lstm", "gate")
    later = np.where(np.arange(50) < 20, readings(now, "x"), readings(now, "c"))
    spoiled = changed(now, x=later)
    assert nearest_nodes(model, spoiled) != nearest_nodes(model, now)
    assert nearest_nodes(model, spoiled, given=range(20)) == nearest_nodes(model, now, given=range(20))


def test_old_node_with_few_steps_in_common_is_passed_by() -> None:
    now, (_, model, _) = city(), case("lstm", "gate")
    rare = np.where(np.arange(50) < 20, readings(now, "x"), np.nan)
    assert "c" not in nearest_nodes(model, changed(now, c=rare), 9)["x"]
    half = np.where(np.arange(50) < 40, readings(now, "x"), np.nan)
    assert nearest_nodes(model, changed(now, c=half), 9)["x"] == {"c": 1.0}


# -- mistakes -----------------------------------------------------------------------------------------------


def test_city_that_lacks_old_nodes_is_refused() -> None:
    backbone, model, _ = case("lstm", "gate")
    assert raised(lambda: extend_adapter(model, backbone, city(("x", "c", "a")))) == {
        "where": "city 'town' lacks nodes of stlora adapter 'default'",
        "expected": "all of its 4 nodes, and new ones",
        "got": "no node 'b', 'd'",
        "fix": "keep them in the city, with NaN where they have no reading",
    }


def test_many_nodes_are_named_in_part() -> None:
    backbone = small_backbone("lstm").eval()
    model = trained(backbone, num_nodes=8, node_ids=list("abcdefgh"))
    lines = raised(lambda: extend_adapter(model, backbone, city(("x",))))
    assert lines["got"] == "no node 'a', 'b', 'c', 'd', 'e' and 3 more"


@pytest.mark.parametrize("node_ids", [OLD, OLD[::-1]])
def test_city_without_a_new_node_is_refused(node_ids: tuple[str, ...]) -> None:
    backbone, model, _ = case("lstm", "gate")
    assert raised(lambda: extend_adapter(model, backbone, city(node_ids))) == {
        "where": "city 'town' has no new node",
        "expected": "nodes beside the 4 of stlora adapter 'default'",
        "got": "its nodes alone",
        "fix": "use the adapter as it is, with the readings in its order of nodes",
    }


def test_adapter_that_does_not_know_its_nodes_is_refused() -> None:
    backbone = small_backbone("lstm").eval()
    model = trained(backbone, node_ids=None)
    assert raised(lambda: extend_adapter(model, backbone, city())) == {
        "where": "stlora adapter 'default' does not know its nodes",
        "expected": "their names in its configuration",
        "got": "node_ids=None",
        "fix": "make the adapter with 'stlora adapt', or with STLoraConfig(node_ids=[...], ...)",
    }


def test_adapter_that_is_the_same_for_every_node_is_refused() -> None:
    backbone = small_backbone("lstm").eval()
    model = trained(backbone, "shared")
    assert raised(lambda: extend_adapter(model, backbone, city())) == {
        "where": "stlora adapter 'default' has nothing to extend",
        "expected": "tensors that depend on the node",
        "got": "conditioning='shared' and no node-bound modules: the same for every node",
        "fix": "use it as it is: load_adapter(backbone, folder) without a city gives a model for any nodes",
    }


def test_new_node_without_a_reading_in_common_is_refused() -> None:
    now, (backbone, model, _) = city(), case("lstm", "gate")
    dead = changed(now, x=np.full(50, np.nan))
    expected = {
        "where": "nodes of city 'town' cannot be compared with those of stlora adapter 'default'",
        "expected": "for each new node a step at which it and an old node are measured",
        "got": "no such step for 'x' among 50 given steps",
        "fix": "give more steps (given, --days), or leave these nodes out until they have readings",
    }
    assert raised(lambda: extend_adapter(model, backbone, dead)) == expected
    late = np.where(np.arange(50) < 30, np.nan, 50.0)
    spoiled = changed(now, x=late, y=late)
    lines = raised(lambda: extend_adapter(model, backbone, spoiled, given=range(30)))
    assert lines == expected | {"got": "no such step for 'y', 'x' among 30 given steps"}
    assert extend_adapter(model, backbone, spoiled).peft_config["default"].num_nodes == 6


def test_neighbours_below_one_are_refused() -> None:
    backbone, model, _ = case("lstm", "gate")
    assert raised(lambda: extend_adapter(model, backbone, city(), 0)) == {
        "where": "option 'neighbours' is out of range",
        "expected": "1 or more",
        "got": "neighbours=0",
        "fix": "give a larger number",
    }


def test_another_backbone_is_refused() -> None:
    _, model, _ = case("lstm", "gate")
    lines = raised(lambda: extend_adapter(model, small_backbone("lstm", seed=1), city()))
    assert lines["where"] == "stlora adapter 'default' belongs to another backbone"


def test_kernel_along_the_numbers_of_nodes_is_refused_even_where_its_size_is_theirs() -> None:
    backbone = small_backbone("aagcn").eval()  # a kernel has the largest odd size up to N
    model = trained(backbone, num_nodes=5, node_ids=[*OLD, "e"])
    now = city(("g", *OLD, "f", "e"))
    assert raised(lambda: extend_adapter(model, backbone, now)) == {
        "where": "node-bound module 'block1.gcn1.conv_sa' cannot be extended",
        "expected": "tensors of floats, the same for every N, with one entry for each node, or for each pair",
        "got": "'weight' of torch.float32 with the shapes (1, 8, 5) at N=5, (1, 8, 7) at N=7, (1, 8, 7) at N=8",
        "fix": "make a new adapter for the whole city with 'stlora adapt'",
    }


class Numbered(nn.Module):
    """A node-bound module that holds whole numbers."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        self.register_buffer("order", torch.arange(num_nodes))

    def resized(self, num_nodes: int) -> Numbered:
        return Numbered(num_nodes)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.order]


def test_whole_numbers_with_a_node_axis_are_refused() -> None:
    backbone = nn.Sequential()
    backbone.add_module("lin", nn.Linear(3, 4))
    backbone.add_module("order", Numbered(4))
    options = {"target_modules": ["lin"], "node_layout": {"lin": "b t n c"}, "node_bound": ["order"]}
    model = trained(backbone, predictor=None, **options)
    lines = raised(lambda: extend_adapter(model, backbone, city()))
    assert lines["where"] == "node-bound module 'order' cannot be extended"
    assert lines["got"] == "'order' of torch.int64 with the shapes (4,) at N=4, (6,) at N=6, (7,) at N=7"
