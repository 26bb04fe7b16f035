"""What the forecasters of the attention family share: shapes, batches, gradients, copies, nodes and their number."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stlora_peft.backbones import Forecaster
from stlora_peft.backbones.attention import CLASSES
from stlora_peft.backbones.nodes import mean_entry, mean_pair
from stlora_peft.tuner.node_bound import resize

N, B, T = 7, 2, 5
NODES = {"num_nodes": N}
SIZES: dict[str, dict[str, Any]] = {
    "aagcn": NODES | {"hidden_channels": 8},
    "astgcn": NODES | {"hidden_channels": 4, "K": 3, "time_stride": 2},
    "dnntsp": NODES | {"hidden_channels": 4, "heads": 2},
    "gman": NODES | {"num_blocks": 1, "heads": 2, "head_size": 3, "time_features": "day", "steps_per_day": 24},
    "mstgcn": {"hidden_channels": 4, "K": 3, "num_blocks": 2, "time_stride": 2},
    "mtgnn": NODES
    | {"hidden_channels": 4, "skip_channels": 3, "end_channels": 6, "num_layers": 2, "dilation": 2, "depth": 2}
    | {"learned_graph": True, "neighbours": 3, "emb_size": 4, "dropout": 0.1},
}
COMMON = {"in_channels": 3, "out_channels": 1, "window": T, "horizon": 3, "residual": True}
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 3, 0]])  # directed; nodes 5 and 6 are isolated
WEIGHTS = torch.linspace(0.5, 2, 7, dtype=torch.float64)
NO_EDGES = torch.empty(2, 0, dtype=torch.long)
every = pytest.mark.parametrize("name", CLASSES)
bound = pytest.mark.parametrize("name", [name for name in CLASSES if name != "mstgcn"])


def backbone_class(name: str) -> type[Forecaster]:
    file, kind = CLASSES[name]
    return getattr(importlib.import_module(f"stlora_peft.backbones.attention.{file}"), kind)


def build(name: str, **changes: Any) -> Forecaster:
    """A small forecaster in float64 and eval mode, its normalisation statistics those of a used network."""
    model = backbone_class(name)(**(SIZES[name] | COMMON | changes)).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for value in (module.weight, module.bias, module.running_mean, module.running_var):
                    value.add_(torch.rand_like(value))
            if isinstance(shift := getattr(module, "shift", None), nn.Module):  # AAGCN's corrections start at zero
                shift.weight.normal_()
                module.alpha.fill_(0.5)
    return model


def windows(batch: int = B, num_nodes: int = N, window: int = T, channels: int = 3) -> Tensor:
    return torch.randn(batch, window, num_nodes, channels, dtype=torch.float64)


@every
@pytest.mark.parametrize(
    "changes",
    [{}, {"window": 1, "horizon": 1}, {"window": 20, "out_channels": 2}, {"in_channels": 5, "residual": False}],
)
def test_forward_gives_every_step_node_and_channel(name: str, changes: dict[str, Any]) -> None:
    model = build(name, **({"in_channels": 4} if "out_channels" in changes else {}) | changes)
    for batch in (1, 3):
        x = windows(batch, window=model.window, channels=model.in_channels)
        forecast = model(x, EDGES, WEIGHTS)
        assert forecast.shape == (batch, model.horizon, N, model.out_channels)
        assert forecast.isfinite().all()


@every
def test_forward_of_a_batch_equals_its_samples_one_by_one(name: str) -> None:
    model, x = build(name), windows(3)
    together = model(x, EDGES, WEIGHTS)
    apart = torch.cat([model(sample[None], EDGES, WEIGHTS) for sample in x])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


@every
@pytest.mark.parametrize("edges", [EDGES, NO_EDGES], ids=["isolated nodes", "no edges"])
@pytest.mark.parametrize("train", [True, False])
def test_forward_and_backward_are_finite_and_print_nothing(
    name: str, edges: Tensor, train: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(name).train(train)
    model(windows(), edges).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert capsys.readouterr() == ("", "")


# The similarities of AAGCN count with a weight that starts at zero, its attention over channels with a layer of zeros.
UNREACHED_AT_FIRST = {"aagcn": r"block\d\.gcn1\.(conv_[ab]\.\d|fc1c)\.(weight|bias)"}


@every
def test_backward_reaches_every_parameter_but_those_behind_zeros_and_these_after_a_step(name: str) -> None:
    model = backbone_class(name)(**SIZES[name], **COMMON).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    missing = []
    for _ in range(2):
        optimizer.zero_grad()
        model(windows().float(), EDGES, WEIGHTS.float()).square().mean().backward()
        missing.append([key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()])
        optimizer.step()
    expected = [key for key, _ in model.named_parameters() if re.fullmatch(UNREACHED_AT_FIRST.get(name, "-"), key)]
    assert missing == [expected, []]
    assert bool(expected) == (name in UNREACHED_AT_FIRST)


@every
def test_hyperparameters_after_json_rebuild_the_same_network(name: str) -> None:
    model = build(name)
    twin = type(model)(**json.loads(json.dumps(model.hyperparameters))).double().eval()
    twin.load_state_dict(model.state_dict())
    x = windows()
    assert set(model.hyperparameters) == set(inspect.signature(type(model)).parameters)
    assert twin.hyperparameters == model.hyperparameters == SIZES[name] | COMMON
    assert torch.equal(twin(x, EDGES, WEIGHTS), model(x, EDGES, WEIGHTS))


@every
def test_copies_after_a_backward_give_the_same_numbers_and_gradients(name: str) -> None:
    model, x = build(name), windows()
    first = model(x, EDGES, WEIGHTS)
    first.sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.zero_grad()
        again = twin(x, EDGES, WEIGHTS)
        again.sum().backward()
        assert torch.equal(again, first)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


# -- nodes --------------------------------------------------------------------------------------------------


def permuted(model: Forecaster, order: Tensor) -> Forecaster:
    """The same network with everything that it keeps for the nodes in another order."""
    result = copy.deepcopy(model)
    for name in model.stlora_spec.node_bound:
        for tensor in result.get_submodule(name).parameters():
            for axis, size in enumerate(tensor.shape):
                if size == N:
                    tensor.data = tensor.data.index_select(axis, order)
    return result


@every
def test_permuting_nodes_edges_and_tables_permutes_the_forecast(name: str) -> None:
    model, x, order = build(name), windows(), torch.randperm(N)
    if name == "aagcn":  # equivariant but for its convolution along the numbers of the nodes
        for block in (model.block1, model.block2):
            nn.init.zeros_(block.gcn1.conv_sa.weight)
    place = torch.argsort(order)
    expected = model(x, EDGES, WEIGHTS)[:, :, order]
    moved = permuted(model, order)(x[:, :, order], place[EDGES], WEIGHTS)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    unmoved_tables = model(x[:, :, order], place[EDGES], WEIGHTS)
    assert ((unmoved_tables - expected).abs().amax() > 1e-6) == (name != "mstgcn")


def test_aagcn_depends_on_the_order_of_the_nodes() -> None:
    model, x, order = build("aagcn"), windows(), torch.arange(N).roll(2)
    expected = model(x, EDGES, WEIGHTS)[:, :, order]
    moved = permuted(model, order)(x[:, :, order], torch.argsort(order)[EDGES], WEIGHTS)
    assert (moved - expected).abs().amax() > 1e-6


@bound
def test_wrong_number_of_nodes_names_axis_part_and_fix(name: str) -> None:
    model = build(name)
    part = model.stlora_spec.node_bound[0]
    text = (
        f"backbone '{name}': wrong number of nodes.\n"
        f"  expected: N=7 on axis 'n' of 'b t n c', the number of nodes that '{part}' was built for\n"
        "  got:      N=9 from an input of shape (2, 5, 9, 3)\n"
        "  to fix:   adapt it to the new city with STLoraConfig(num_nodes=9), or build it with num_nodes=9"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        model(windows(num_nodes=9), EDGES)


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "gman"])  # which takes no edges
def test_edges_of_another_graph_are_refused(name: str) -> None:
    for edges, weights in ((EDGES + 3, None), (EDGES, torch.ones(3)), (EDGES.T, None), (EDGES.double(), None)):
        with pytest.raises(ValueError, match=r"^the graph does not fit the nodes\.\n  expected: "):
            build(name)(windows(), edges, weights)


@every
def test_sizes_below_one_are_refused(name: str) -> None:
    for key, value in SIZES[name].items():
        if isinstance(value, int) and not isinstance(value, bool):
            with pytest.raises(ValueError, match=rf"^backbone '{name}': {key} out of range\.\n  expected: {key} >= 1"):
                build(name, **{key: 0})


# -- another city -------------------------------------------------------------------------------------------


def moved_to(model: Forecaster, num_nodes: int) -> Forecaster:
    """The forecaster with its node-bound modules rebuilt for another city."""
    new = copy.deepcopy(model)
    for name in model.stlora_spec.node_bound:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(name)
        rebuilt = module.resized(num_nodes) if hasattr(module, "resized") else resize(module, num_nodes, name)
        setattr(new.get_submodule(parent), child, rebuilt)
    return new


@bound
@pytest.mark.parametrize("num_nodes", [1, 6, 12])
def test_resized_modules_fit_another_city_and_are_always_the_same(name: str, num_nodes: int) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    new = moved_to(model, num_nodes)
    fresh = build(name, num_nodes=num_nodes).state_dict()
    assert {k: v.shape for k, v in new.state_dict().items()} == {k: v.shape for k, v in fresh.items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = moved_to(model, num_nodes).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in new.state_dict().items())
    edges = NO_EDGES if num_nodes == 1 else EDGES % num_nodes
    forecast = new(windows(num_nodes=num_nodes), edges)
    assert forecast.shape == (B, 3, num_nodes, 1)
    forecast.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in new.parameters())
    x = windows(num_nodes=num_nodes)
    assert torch.equal(copy.deepcopy(new)(x, edges), new(x, edges))


@bound
def test_resized_to_the_same_number_is_an_exact_copy(name: str) -> None:
    model, x = build(name), windows()
    twin = moved_to(model, N)
    assert torch.equal(twin(x, EDGES, WEIGHTS), model(x, EDGES, WEIGHTS))
    ours = {id(p) for name in model.stlora_spec.node_bound for p in model.get_submodule(name).parameters()}
    assert ours.isdisjoint(
        id(p) for name in model.stlora_spec.node_bound for p in twin.get_submodule(name).parameters()
    )


@every
def test_all_tensors_that_depend_on_the_number_of_nodes_are_listed(name: str) -> None:
    small, large = (build(name, **({} if name == "mstgcn" else {"num_nodes": n})).state_dict() for n in (7, 10))
    changed = {key for key, value in small.items() if value.shape != large[key].shape}
    parts = build(name).stlora_spec.node_bound
    owners = {part for part in parts for key in changed if key.startswith(f"{part}.")}
    assert {key for key in changed if not any(key.startswith(f"{part}.") for part in parts)} == set()
    assert owners == set(parts)


def test_mean_entry_and_mean_pair_keep_the_sums_of_a_network() -> None:
    value = torch.rand(2, 5, 5, dtype=torch.float64)
    assert torch.allclose(mean_entry(value, 1, 8, summed=True).sum(1), value.sum(1))
    pairs = mean_pair(value, 8, summed=True)
    assert torch.allclose(pairs.sum(2), value.sum((1, 2))[:, None] / 5)
    assert torch.allclose(pairs.diagonal(dim1=1, dim2=2).mean(1), value.diagonal(dim1=1, dim2=2).mean(1))


# -- what the tuner is told ---------------------------------------------------------------------------------


def is_named(key: str, names: Any) -> list[str]:
    return [name for name in names if key == name or key.endswith(f".{name}")]


@every
def test_stlora_spec_layouts_name_the_axes_of_nodes_and_batch(name: str) -> None:
    model, sizes = build(name), {}
    spec = model.stlora_spec
    targets = {key: module for key, module in model.named_modules() if is_named(key, spec.target_modules)}
    assert {target for key in targets for target in is_named(key, spec.target_modules)} == set(spec.target_modules)
    assert set(spec.node_layout) == set(spec.target_modules)
    for key, module in targets.items():
        module.register_forward_hook(lambda _, inputs, __, key=key: sizes.update({key: inputs[0].shape}))
    model(windows(), EDGES, WEIGHTS)
    assert sizes.keys() == targets.keys()  # none of them is dead
    for key, shape in sizes.items():
        groups = re.findall(r"\([^)]*\)|\w+", spec.node_layout[is_named(key, spec.node_layout)[0]])
        counts = {"n": N, "b": B, "(b n)": B * N, "(b t)": B * T}
        assert len(groups) == len(shape), key
        for axis, group in enumerate(groups):
            assert shape[axis] == counts.get(group, shape[axis]), (key, group)
    for part in spec.head:
        assert model.get_submodule(part) is not None
