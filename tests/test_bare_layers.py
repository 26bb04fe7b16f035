"""Cells with bare matrices: beside adapters on their own convolutions, in files, merged, copied and given back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import reference
import torch
from hosts import (
    ALONG,
    ALPHA,
    BARE,
    EDGES,
    GATES,
    SENSOR,
    WEIGHTS,
    C,
    D,
    N,
    R,
    canonical,
    cell_call,
    expected_output,
    options_of,
    states,
    tgt_layer,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from toys import (
    CONDITIONINGS,
    Holder,
    adapted,
    assert_same,
    assert_unchanged,
    call,
    factors_of,
    leaves,
    pristine,
    raised,
    randomised,
    small_backbone,
    snapshot,
)

from stlora_peft import STLoraConfig, find_layouts
from stlora_peft.tuner.bare_layers import STLoraGates, STLoraGCLSTM
from stlora_peft.tuner.identity import base_tensors, fingerprint

CELL = "base_model.model.layer"
CONVOLUTIONS = [f"conv_{gate}" for gate in "ifco"]
BOTH = ["layer", *CONVOLUTIONS]
cells = pytest.mark.parametrize("host", BARE[::2], ids=str)
conditionings = pytest.mark.parametrize("conditioning", CONDITIONINGS)


def gclstm() -> nn.Module:
    torch.manual_seed(0)
    return tgt_layer("recurrent.gc_lstm.GCLSTM")(C, D, 3)


def run(model: nn.Module) -> Tensor:
    """Both new states of a float32 cell, side by side."""
    x = canonical().detach().float()
    return torch.cat(model(x, EDGES, WEIGHTS.float(), *states(x)), dim=-1)


def config(targets: list[str], **options: object) -> STLoraConfig:
    defaults = {"num_nodes": N, "target_modules": targets, "predictor": None, "init_weights": False, "r": R}
    return STLoraConfig(**({"conditioning": "gate", "lora_dropout": 0.0} | defaults | options))


@pytest.fixture
def backbone() -> Holder:
    return Holder(gclstm()).eval().requires_grad_(False)


# -- the cell and its convolutions --------------------------------------------------------------------------


@conditionings
def test_cell_and_its_convolutions_adapted_at_once_match_the_loop(conditioning: str) -> None:
    base = gclstm().double()
    model = adapted(copy.deepcopy(base), N, conditioning=conditioning, target_modules=BOTH)
    x, (h, c) = canonical(), states(canonical())
    factors = {name: leaves(factors_of(model, f"{CELL}.{name}")) for name in ("stlora_gates", *CONVOLUTIONS)}
    update = reference.pointwise_update(x, conditioning, factors["stlora_gates"], ALPHA / R)
    gates = reference.gate_products(x, [getattr(base, f"W_{gate}") for gate in "ifco"], update)
    adjacency = reference.dense_graph(EDGES, WEIGHTS, N)
    for g, name in enumerate(CONVOLUTIONS):
        conv = getattr(base, name)
        gates[g] = gates[g] + reference.cheb_base(h, [lin.weight for lin in conv.lins], conv.bias, adjacency)
        gates[g] = gates[g] + reference.pointwise_update(h, conditioning, factors[name], ALPHA / R)
        gates[g] = gates[g] + getattr(base, f"b_{name[-1]}")
    out, expected = cell_call(model, x), torch.cat(reference.lstm_gates(gates, c), dim=-1)
    assert_same(out, expected)

    weight = torch.randn(out.shape, dtype=torch.float64)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, theirs in factors.items():
        for key, factor in factors_of(model, f"{CELL}.{name}").items():
            if key != "emb":  # its gradient is the sum over all the layers that read it
                assert_same(factor.grad, theirs[key].grad)


def test_layers_inside_the_convolutions_are_targets_with_their_own_layout(backbone: Holder) -> None:
    model = get_peft_model(backbone, config(["layer", "conv_i.lins.1"]))
    run(model)
    layers = {key: m.layout["default"].pattern for key, m in model.named_modules() if hasattr(m, "nall_A")}
    assert layers == {f"{CELL}{GATES}": "... (b n) c", f"{CELL}.conv_i.lins.1": "... (b n) c"}


@conditionings
def test_names_of_the_backbone_stay_and_the_adapter_is_one_part_more(backbone: Holder, conditioning: str) -> None:
    before, mark = set(backbone.state_dict()), fingerprint(backbone)
    model = get_peft_model(backbone, config(["layer"], conditioning=conditioning))
    own = {key for key in backbone.state_dict() if "nall_" in key}
    assert set(backbone.state_dict()) - own == before
    assert all(key.startswith((f"layer{GATES}.nall_", "stlora_nodes.")) for key in own)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{key}" for key in own
    }
    assert {key for key, _ in base_tensors(model)} == before
    assert fingerprint(model) == mark


@pytest.mark.parametrize("targets", [["layer"], CONVOLUTIONS, BOTH], ids=["cell", "convolutions", "both"])
@conditionings
def test_saved_adapter_loads_bitwise(backbone: Holder, targets: list[str], conditioning: str, tmp_path: Path) -> None:
    model = get_peft_model(pristine(backbone), config(targets, conditioning=conditioning)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(pristine(backbone), tmp_path).eval()
        assert torch.equal(run(loaded), run(model))
        lazy = PeftModel.from_pretrained(pristine(backbone), tmp_path, low_cpu_mem_usage=True).eval()
        assert_same(run(lazy), run(model), tolerance=1e-5)  # its tensors lie in memory as they do in the file


@pytest.mark.parametrize("first", [["layer"], CONVOLUTIONS], ids=["cell first", "convolutions first"])
def test_adapters_of_other_targets_share_a_cell(backbone: Holder, first: list[str], tmp_path: Path) -> None:
    second = CONVOLUTIONS if first == ["layer"] else BOTH
    alone = {}
    for name, targets in (("one", first), ("two", second)):
        model = randomised(get_peft_model(pristine(backbone), config(targets), adapter_name=name), seed=len(targets))
        model.eval().save_pretrained(tmp_path)
        alone[name] = run(model)
    model = PeftModel.from_pretrained(backbone, tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    for name, expected in alone.items():
        model.set_adapter(name)
        assert torch.equal(run(model.eval()), expected)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(Holder(gclstm()), tmp_path / "again" / "two").eval()
    assert torch.equal(run(again), alone["two"])
    model.delete_adapter("two")
    model.set_adapter("one")
    assert not [key for key in model.state_dict() if ".two" in key]
    assert torch.equal(run(model), alone["one"])


@cells
def test_two_active_adapters_add_up_inside_the_gates(host) -> None:
    base = host.make().double()
    model = adapted(copy.deepcopy(base), N)
    model.add_adapter("second", config(["layer"], conditioning="core", lora_alpha=ALPHA))
    randomised(model)
    model.base_model.set_adapter(["default", "second"])
    x, path = canonical(), f"{CELL}{host.part}"
    update = reference.pointwise_update(x, "gate", factors_of(model, path), ALPHA / R)
    update = update + reference.pointwise_update(x, "core", factors_of(model, path, "second"), ALPHA / R)
    assert_same(host.call(model.double(), x), host.inside(base, x, update))


@cells
def test_disabled_adapter_gives_the_cell_bitwise(host) -> None:
    base = host.make().double().requires_grad_(False)
    model = adapted(copy.deepcopy(base), N)
    with model.disable_adapter():
        assert torch.equal(host.call(model, canonical()), host.call(base, canonical()))
    assert not torch.equal(host.call(model, canonical()), host.call(base, canonical()))


# -- merging and unloading ----------------------------------------------------------------------------------


@cells
@pytest.mark.parametrize("safe_merge", [False, True])
def test_shared_update_merges_into_the_four_matrices_and_out_again(host, safe_merge: bool) -> None:
    base = host.make().double()
    model = adapted(copy.deepcopy(base), None, conditioning="shared")
    x = canonical().detach()
    factors = leaves(host.factors(model))
    expected = expected_output(host, base, x, "shared", factors, ALPHA / R)
    model.merge_adapter(safe_merge=safe_merge)
    assert_same(host.call(model, x), expected)
    assert_same(host.call(model.base_model.model.layer.cell, x), expected)
    with model.disable_adapter():
        assert_same(host.call(model, x), host.call(base, x))
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same(host.call(model.base_model.model.layer.cell, x), host.call(base, x))
    assert_same(host.call(model, x), expected)


def test_cell_and_convolutions_merge_and_unload_together(backbone: Holder) -> None:
    cell = backbone.layer
    model = get_peft_model(backbone, config(BOTH, conditioning="shared")).eval()
    expected = run(model)
    bare = model.merge_and_unload()
    assert bare.layer is cell
    assert [key for key in bare.state_dict() if "nall_" in key or "base_layer" in key] == []
    assert (run(bare) - run(Holder(gclstm()))).abs().max() > 1e-2
    torch.testing.assert_close(run(bare), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["layer"], BOTH], ids=["cell", "both"])
@conditionings
def test_unload_gives_the_same_cell_back(backbone: Holder, targets: list[str], conditioning: str) -> None:
    cell, before = backbone.layer, snapshot(backbone)
    model = randomised(get_peft_model(backbone, config(targets, conditioning=conditioning)))
    run(model)
    assert model.unload() is backbone
    assert backbone.layer is cell
    assert_unchanged(backbone, before)
    randomised(get_peft_model(backbone, config(targets, conditioning=conditioning)))
    assert isinstance(backbone.layer, STLoraGCLSTM)


def test_merging_an_update_that_depends_on_the_node_is_refused_and_changes_nothing(backbone: Holder) -> None:
    model = get_peft_model(backbone, config(["layer"]))
    before = snapshot(model)[1]
    assert raised(model.merge_adapter) == {
        "where": "adapter 'default' cannot be merged into 'layer'",
        "expected": "an update that is the same for every node (conditioning='shared')",
        "got": "its update depends on the node (conditioning='gate'): one weight cannot hold N of them",
        "fix": "keep the adapter beside the backbone: call the model as it is, or unload() to get the backbone",
    }
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["gclstm", "heterogclstm"])
@conditionings
def test_backbone_adapts_its_cell_beside_the_default_targets(name: str, conditioning: str) -> None:
    city = small_backbone(name).eval().requires_grad_(False)
    targets = {"cell", *city.stlora_spec.target_modules}
    expected = call(city, 5)
    model = get_peft_model(city, STLoraConfig(num_nodes=5, conditioning=conditioning, target_modules=targets)).eval()
    assert torch.equal(call(model, 5), expected)
    call(randomised(model), 5).square().sum().backward()
    adapter = {key for key, _ in model.named_parameters() if "nall_" in key}
    assert {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()} == adapter
    assert any("cell.stlora_gates.nall_B" in key for key in adapter)


# -- precisions, copies, modes ------------------------------------------------------------------------------


def test_half_precision_keeps_the_type_of_the_output(backbone: Holder) -> None:
    x, (h, c) = canonical().detach().float()[0, 0], states(canonical().detach().float()[0, 0])
    model = get_peft_model(backbone, config(BOTH))
    expected = torch.cat(model(x, EDGES, None, h, c))
    with torch.autocast("cpu", torch.bfloat16):
        mixed, before = model(x, EDGES, None, h, c), Holder(gclstm())(x, EDGES, None, h, c)
    assert [out.dtype for out in mixed] == [out.dtype for out in before]
    torch.testing.assert_close(torch.cat(mixed), expected, rtol=0, atol=0.03)

    half = get_peft_model(Holder(gclstm()).bfloat16(), config(BOTH))
    half.load_state_dict(model.state_dict())
    assert half.base_model.model.layer.gates.nall_B["default"].dtype == torch.float32
    out = half(
        *(value.bfloat16() if value.is_floating_point() else value for value in (x, EDGES)),
        None,
        *map(Tensor.bfloat16, (h, c)),
    )
    assert all(value.dtype == torch.bfloat16 for value in out)
    torch.testing.assert_close(torch.cat(out).float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@cells
def test_copy_gives_the_same_numbers_and_owns_its_parts(host, twin) -> None:
    model = adapted(
        host.make(), N, **options_of(host, "gate", target_modules=BOTH if "hetero" not in str(host) else ["layer"])
    )
    x = canonical().detach()
    expected = host.call(model, x)
    other = twin(model)
    assert torch.equal(host.call(other, x), expected)
    mine, theirs = ({id(p) for p in m.parameters()} for m in (model, other))
    assert not mine & theirs
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(host.call(model, x), expected)
    assert other.base_model.model.layer.cell is not model.base_model.model.layer.cell
    assert not host.call(other, x).equal(expected)
    assert isinstance(other.unload().layer, type(host.make()))


def test_cell_follows_mode_and_attributes_and_shows_its_own_name(backbone: Holder) -> None:
    cell = backbone.layer
    layer = get_peft_model(backbone, config(["layer"])).base_model.model.layer
    assert (layer.out_channels, layer.K) == (D, 3)
    assert repr(layer).startswith("stlora.GCLSTM(")
    for mode in (True, False):
        layer.train(mode)
        assert {module.training for module in (layer, cell.conv_i, layer.gates)} == {mode}
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_class_of_the_users_that_derives_from_the_cell_counts() -> None:
    class Own(tgt_layer("recurrent.gc_lstm.GCLSTM")):
        def _set_hidden_state(self, X: Tensor, H: Tensor | None) -> Tensor:
            return X.new_ones(*X.shape[:-1], D) if H is None else H

        def _set_cell_state(self, X: Tensor, C: Tensor | None) -> Tensor:
            return self._set_hidden_state(X, C)

    model = adapted(Own(C, D, 3), N)
    ones = torch.ones(2, N, D, dtype=torch.float64)
    x = canonical()[0, :2]
    assert_same(torch.cat(model(x, EDGES)), torch.cat(model(x, EDGES, None, ones, ones)))


# -- what is found and what is refused ----------------------------------------------------------------------


def test_find_layouts_reads_the_layout_of_cells() -> None:
    found = find_layouts(Holder(gclstm()), torch.randn(N, C), EDGES, num_nodes=N, target_modules=["layer", "conv_i"])
    assert found == {"layer": "n c", "layer.conv_i": "n c"}


def test_find_layouts_leaves_the_cell_as_it_was(backbone: Holder) -> None:
    cell, parts = backbone.layer, dict(backbone.layer._modules)
    find_layouts(backbone, torch.randn(N, C), EDGES, num_nodes=N, target_modules=["layer"])
    assert backbone.layer is cell
    assert cell._modules == parts


def test_second_adapter_on_all_linear_layers_leaves_the_cell_alone(backbone: Holder) -> None:
    model = get_peft_model(backbone, config(["layer"]))
    model.add_adapter("second", config("all-linear"))
    gates = [m for m in model.modules() if isinstance(m, STLoraGates)]
    assert [list(m.nall_B) for m in gates] == [["default"]]


def test_pattern_that_matches_the_adapters_too_loads_beside_another_adapter(backbone: Holder, tmp_path: Path) -> None:
    pattern = r"(.*\.)?layer(\.[a-z_]+)?"
    model = get_peft_model(pristine(backbone), config(pattern)).eval()
    model.save_pretrained(tmp_path)
    both = get_peft_model(backbone, config(["layer"]), adapter_name="other")
    both.load_adapter(tmp_path, adapter_name="default")
    both.set_adapter("default")
    assert torch.equal(run(both.eval()), run(model))


@pytest.mark.parametrize("keyword", [False, True])
def test_rows_of_another_city_are_refused_by_the_cells_name(backbone: Holder, keyword: bool) -> None:
    model = get_peft_model(backbone, config(["layer"]))
    x, crossing = torch.zeros(2 * N, C), torch.tensor([[0], [N]])
    attempt = (lambda: model(x, edge_index=crossing)) if keyword else (lambda: model(x, crossing))
    lines = raised(attempt)
    assert lines["where"] == "stlora adapter 'default' on 'layer': wrong number of nodes"
    assert lines["got"] == f"{2 * N} rows with edges from one graph of {N} nodes to another"
    assert raised(lambda: model(x[:-1], EDGES))["where"] == lines["where"]


def test_cell_of_several_types_of_nodes_is_refused() -> None:
    cell = tgt_layer("hetero.heterogclstm.HeteroGCLSTM")({SENSOR: C, "camera": 2}, D, ([SENSOR, "camera"], [ALONG]))
    lines = raised(lambda: get_peft_model(Holder(cell), config(["layer"])))
    assert lines["where"] == "layer 'layer' cannot be adapted"
    assert lines["got"] == (
        "torch_geometric_temporal.nn.hetero.heterogclstm.HeteroGCLSTM; it has 2 types of nodes, 'camera', 'sensor', "
        "and an adapter belongs to one"
    )


def test_adapter_is_injected_from_the_keys_of_a_state_dict() -> None:
    trained = get_peft_model(small_backbone("gclstm"), STLoraConfig(num_nodes=5, predictor=None))
    prefix = "base_model.model."
    tensors = {key.removeprefix(prefix): value for key, value in get_peft_model_state_dict(trained).items()}
    tensors = {key: value for key, value in tensors.items() if "nall_" in key}
    bare = small_backbone("gclstm")
    inject_adapter_in_model(STLoraConfig(num_nodes=5, predictor=None), bare, state_dict=tensors)
    found = {key.replace(".default", "") for key in bare.state_dict() if "nall_" in key}
    assert found == set(tensors)
    assert any("stlora_gates" in key for key in found)


def test_cell_is_in_training_mode_whenever_what_stands_in_its_place_is() -> None:
    model = get_peft_model(small_backbone("gclstm"), STLoraConfig(num_nodes=5)).train()
    cell = model.get_base_model().cell
    for module in model.modules():  # as those do who put the modes back one by one
        module.training = False
    for mode in (True, False):
        cell.training = mode
        call(model, 5)
        assert cell.cell.training is mode


def test_layouts_are_found_where_layers_are_called_by_keyword() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(query=x, key=x, value=x)[0]
            return out

    assert find_layouts(Net(), torch.rand(3, 5, 8), num_nodes=5, target_modules=["attention"]) == {
        "attention": "b n c"
    }
