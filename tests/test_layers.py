"""Every kind of layer x every conditioning against a float64 loop over nodes: outputs, gradients, identity."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import reference
import torch
from einops import rearrange
from hosts import (
    ALPHA,
    CONV,
    EDGES,
    GRAPH,
    HOSTS,
    LINEAR,
    PLAIN,
    RECURRENT,
    WEIGHTS,
    B,
    C,
    D,
    N,
    R,
    T,
    canonical,
    conv2d,
    expected_output,
    graph_call,
    options_of,
)
from peft import LoraConfig, get_peft_model
from reference import Temporal
from torch import Tensor, nn
from toys import CONDITIONINGS, Holder, adapted, assert_same, factors_of, leaves, raised, randomised, small_backbone

from stlora_peft import STLoraConfig
from stlora_peft.tuner.layers import STLoraLayer

gnn = pytest.importorskip("torch_geometric.nn")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def test_hosts_have_different_names():
    assert len({host.name for host in HOSTS}) == len(HOSTS)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_forward_and_backward_match_per_node_loop(host, conditioning):
    base = host.make().double()
    model = adapted(copy.deepcopy(base), N, **options_of(host, conditioning))
    factors, x = host.factors(model), canonical()
    theirs, their_x = leaves(factors), canonical()

    out = host.unfold(host.call(model, host.fold(x)))
    expected = expected_output(host, base, their_x, conditioning, theirs, reference.scale_of(ALPHA, R))
    assert_same(out, expected)
    assert not torch.equal(out, host.unfold(host.call(base, host.fold(x))))

    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_same(x.grad, their_x.grad)
    assert factors.keys() == theirs.keys()
    for name, factor in factors.items():
        assert factor.grad.abs().max() > 0, f"no gradient for {name}"
        assert_same(factor.grad, theirs[name].grad)


@pytest.mark.parametrize("host", [LINEAR[0], CONV[8], GRAPH[0], RECURRENT[0]], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_with_rank_and_alpha_patterns_scales_as_lora(host, rslora):
    base = host.make().double()
    patterns = {"rank_pattern": {"layer": 3}, "alpha_pattern": {"layer": 7}, "use_rslora": rslora}
    model = adapted(copy.deepcopy(base), N, **options_of(host, "gate", **patterns))
    scale = 7 / 3**0.5 if rslora else 7 / 3
    x = canonical()
    expected = expected_output(host, base, x, "gate", leaves(factors_of(model)), scale)
    assert_same(host.unfold(host.call(model, host.fold(x))), expected)


@pytest.mark.parametrize("host", [*LINEAR[:1], *CONV[9:11]], ids=str)
def test_forward_matches_the_formula_including_the_frozen_weights(host):
    base = host.make().double()
    model = adapted(copy.deepcopy(base), N, **options_of(host, "gate"))
    x, factors, scale = canonical(), leaves(factors_of(model)), ALPHA / R
    if host.temporal is None:
        frozen = {"A": base.weight, "B": torch.eye(D, dtype=torch.float64)}
        expected = reference.pointwise_update(x, "shared", frozen, 1.0) + base.bias
        expected = expected + reference.pointwise_update(x, "gate", factors, scale)
    else:
        factors["A"] = factors["A"].flatten(2)
        expected = reference.conv_base(x, base.weight.flatten(2), base.bias, host.temporal)
        expected = expected + reference.conv_update(x, "gate", factors, scale, host.temporal)
    assert_same(host.unfold(model(host.fold(x))), expected)


@pytest.mark.parametrize("conv", ["gcn", "cheb"])
def test_graph_forward_matches_the_formula_including_the_graph(conv):
    base = (gnn.GCNConv(C, D) if conv == "gcn" else gnn.ChebConv(C, D, K=3)).double()
    model = adapted(copy.deepcopy(base), N)
    x, adjacency = canonical(), reference.dense_graph(EDGES, WEIGHTS, N)
    if conv == "gcn":
        out = model(x, EDGES, WEIGHTS)
        expected = reference.gcn_base(x, base.lin.weight, base.bias, adjacency)
    else:
        out = model(x, EDGES, WEIGHTS, lambda_max=2.0)
        expected = reference.cheb_base(x, [lin.weight for lin in base.lins], base.bias, adjacency)
    assert_same(out, expected + reference.pointwise_update(x, "gate", leaves(factors_of(model)), ALPHA / R))


# -- identity at the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize(
    ("host", "pattern"),
    [(CONV[1], "n c t"), (CONV[4], "n c t"), (CONV[9], "c n t"), (CONV[12], "c n t"), (CONV[13], "c t n")],
    ids=["conv1d n c t", "conv1d wide n c t", "conv2d c n t", "conv2d wide c n t", "conv2d wide c t n"],
)
def test_conv_of_one_sample_without_batch_axis_equals_a_batch_of_one(host, pattern, conditioning):
    base = host.make().double()
    model = adapted(copy.deepcopy(base), N, conditioning=conditioning, node_layout={"layer": pattern})
    x = canonical()
    theirs = adapted(copy.deepcopy(base), N, **options_of(host, conditioning))
    out = rearrange(model(rearrange(x[0], f"t n c -> {pattern}")), f"{pattern} -> t n c")
    assert_same(out, host.unfold(theirs(host.fold(x[:1])))[0])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_forward_at_init_equals_base_bitwise(host, conditioning):
    # Frozen first: torch multiplies strided inputs by another kernel where the weight needs a gradient.
    base = host.make().double().eval().requires_grad_(False)
    options = options_of(host, conditioning) | {"predictor": None, "target_modules": ["layer"], "r": R}
    x = host.fold(canonical())
    expected = host.call(base, x)
    model = get_peft_model(Holder(copy.deepcopy(base)), STLoraConfig(num_nodes=N, **options)).eval()
    assert torch.equal(host.call(model, x), expected)
    model.train()
    assert torch.equal(host.call(model, x), expected)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_forward_with_random_start_changes_base(host, conditioning):
    base = host.make().double().eval()
    options = options_of(host, conditioning) | {"predictor": None, "target_modules": ["layer"], "init_weights": False}
    x = host.fold(canonical())
    model = get_peft_model(Holder(copy.deepcopy(base)), STLoraConfig(num_nodes=N, **options)).eval()
    assert (host.call(model, x) - host.call(base, x)).abs().max() > 1e-3


# -- nodes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("host", [LINEAR[0], CONV[1], CONV[8], *GRAPH[:1], GRAPH[4], RECURRENT[0]], ids=str)
def test_forward_permuting_nodes_edges_and_rows_permutes_output(host, conditioning):
    model = adapted(host.make(), N, **options_of(host, conditioning))
    order = torch.tensor([2, 0, 1])
    x = canonical().detach()
    out = host.unfold(host.call(model, host.fold(x)))

    def shuffled() -> Tensor:
        if host.call is graph_call:
            return model(host.fold(x[:, :, order]), torch.argsort(order)[EDGES], WEIGHTS)
        return host.unfold(host.call(model, host.fold(x[:, :, order])))

    if conditioning != "shared":
        assert not torch.allclose(shuffled(), out[:, :, order], atol=1e-3)
    with torch.no_grad():
        for name, factor in factors_of(model).items():
            if name in ("gate", "node_bias", "node_vector", "core", "emb") or (name == "A" and conditioning == "full"):
                factor.copy_(factor[order].clone())
    assert_same(shuffled(), out[:, :, order])


# -- plain LoRA is PEFT's own -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [LINEAR[0], conv2d(PLAIN), conv2d(Temporal(3, 2, 1, 2, 2), padding=2)], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_shared_equals_peft_lora_with_the_same_factors(host, rslora):
    base = host.make().double()
    model = adapted(copy.deepcopy(base), None, conditioning="shared", use_rslora=rslora)
    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"], use_rslora=rslora)
    theirs = get_peft_model(Holder(copy.deepcopy(base)), lora).double()
    ours = factors_of(model)
    with torch.no_grad():
        for name in ("A", "B"):
            weight = getattr(theirs.base_model.model.layer, f"lora_{name}")["default"].weight
            weight.copy_(ours[name].view(weight.shape))
    x = host.fold(canonical())
    out, expected = model(x), theirs(x)
    assert_same(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for name, factor in ours.items():
        weight = getattr(theirs.base_model.model.layer, f"lora_{name}")["default"].weight
        assert_same(factor.grad, weight.grad.view(factor.shape))


@pytest.mark.parametrize("host", [LINEAR[0], CONV[8]], ids=str)
def test_gate_of_ones_and_core_of_identities_equal_shared(host):
    outs = []
    for conditioning in ("shared", "gate", "core"):
        torch.manual_seed(0)
        model = adapted(host.make(), N, **options_of(host, conditioning))
        factors, generator = factors_of(model), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name in ("A", "B"):
                factors[name].copy_(torch.randn(factors[name].shape, generator=generator, dtype=torch.float64))
            if conditioning == "gate":
                factors["gate"].fill_(1.0)
                factors["node_bias"].zero_()
            if conditioning == "core":
                factors["core"].copy_(torch.eye(R).expand(N, R, R))
        outs.append(model(host.fold(canonical())))
    assert_same(outs[1], outs[0])
    assert_same(outs[2], outs[0])


# -- ChebConv: the update is one of lins[0] -----------------------------------------------------------------


def test_cheb_shared_update_equals_adding_the_delta_to_the_order_0_weight():
    base = gnn.ChebConv(C, D, K=3).double()
    model = adapted(copy.deepcopy(base), None, conditioning="shared")
    factors = factors_of(model)
    with torch.no_grad():
        base.lins[0].weight += ALPHA / R * factors["B"] @ factors["A"]
    x = canonical()
    assert_same(model(x, EDGES, WEIGHTS), base(x, EDGES, WEIGHTS))
    model.merge_adapter()
    assert_same(model(x, EDGES, WEIGHTS), base(x, EDGES, WEIGHTS))
    model.unmerge_adapter()
    assert_same(model(x, EDGES, WEIGHTS), base(x, EDGES, WEIGHTS))


def test_cheb_node_update_equals_an_order_0_weight_of_each_node():
    base = gnn.ChebConv(C, D, K=3).double()
    model = adapted(copy.deepcopy(base), N)
    factors, x = factors_of(model), canonical()
    out = model(x, EDGES, WEIGHTS)
    for node in range(N):
        own = copy.deepcopy(base)
        A, h = reference.node_factors("gate", factors, node)
        with torch.no_grad():
            own.lins[0].weight += ALPHA / R * factors["B"] @ A
            own.bias += ALPHA / R * factors["B"] @ h
        assert_same(out[:, :, node], own(x, EDGES, WEIGHTS)[:, :, node])


@pytest.mark.parametrize("conv", ["gcn", "cheb"])
def test_graph_update_reaches_no_other_node(conv):
    host = GRAPH[0] if conv == "gcn" else GRAPH[4]
    model = adapted(host.make(), N, **options_of(host, "gate"))
    x = canonical().detach()
    with model.disable_adapter():
        frozen = graph_call(model, x)
    update = graph_call(model, x) - frozen
    moved = x.clone()
    moved[:, :, 1] += 1.0
    with model.disable_adapter():
        frozen = graph_call(model, moved)
    change = (graph_call(model, moved) - frozen - update).abs().amax((0, 1, 3))
    assert change[1] > 1e-3
    assert change[[0, 2]].max() < 1e-12


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_layers_inside_a_graph_convolution_match_per_node_loop(conditioning):
    base = gnn.ChebConv(C, D, K=3).double()
    targets = [f"lins.{k}" for k in range(3)]  # PyG calls the forward of the last one directly
    model = adapted(copy.deepcopy(base), N, conditioning=conditioning, target_modules=targets)
    x, adjacency = canonical(), reference.dense_graph(EDGES, WEIGHTS, N)
    eye = torch.eye(C, dtype=torch.float64)
    expected = reference.cheb_base(x, [lin.weight for lin in base.lins], base.bias, adjacency)
    for k in range(3):  # the term T_k(L) x is what the layer is given; the update is on the receiving node
        term = reference.cheb_base(x, [eye * (j == k) for j in range(3)], torch.zeros(C).double(), adjacency)
        factors = factors_of(model, f"base_model.model.layer.lins.{k}")
        expected = expected + reference.pointwise_update(term, conditioning, factors, ALPHA / R)
    assert_same(model(x, EDGES, WEIGHTS, lambda_max=2.0), expected)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_layer_inside_gcn_conditions_on_the_sending_node(conditioning):
    base = gnn.GCNConv(C, D).double()
    model = adapted(copy.deepcopy(base), N, conditioning=conditioning, target_modules=["lin"])
    x, adjacency = canonical(), reference.dense_graph(EDGES, WEIGHTS, N)
    update = reference.pointwise_update(x, conditioning, factors_of(model, "base_model.model.layer.lin"), ALPHA / R)
    expected = reference.gcn_base(x, base.lin.weight, base.bias, adjacency)
    expected = expected + reference.gcn_base(update, torch.eye(D).double(), torch.zeros(D).double(), adjacency)
    assert_same(model(x, EDGES, WEIGHTS), expected)


# -- recurrent layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_final_hidden_state_gets_the_update_of_the_last_output(kind, batch_first, bidirectional):
    base = kind(C, D, 2, batch_first=batch_first, bidirectional=bidirectional).double().requires_grad_(False)
    pattern = "(b n) t c" if batch_first else "t (b n) c"
    model = adapted(copy.deepcopy(base), N, node_layout={"layer": pattern})
    x = rearrange(canonical(), f"b t n c -> {pattern}")
    out, state = model(x)
    base_out, base_state = base(x)
    hidden, base_hidden = (state[0], base_state[0]) if kind is nn.LSTM else (state, base_state)
    steps = out if not batch_first else out.transpose(0, 1)
    if bidirectional:
        assert torch.equal(hidden[-2], steps[-1][:, :D])
        assert torch.equal(hidden[-1], steps[0][:, D:])
        assert torch.equal(hidden[:-2], base_hidden[:-2])
    else:
        assert torch.equal(hidden[-1], steps[-1])
        assert torch.equal(hidden[:-1], base_hidden[:-1])
    assert not torch.allclose(hidden[-1], base_hidden[-1])
    assert not torch.allclose(out, base_out)
    if kind is nn.LSTM:
        assert torch.equal(state[1], base_state[1])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_of_which_only_the_final_state_is_read_updates_that_alone(kind, batch_first, bidirectional):
    base = kind(C, D, 2, batch_first=batch_first, bidirectional=bidirectional).double()
    pattern = "(b n) t c" if batch_first else "t (b n) c"
    whole = adapted(base, N, node_layout={"layer": pattern})
    final = copy.deepcopy(whole)
    layer = final.base_model.model.layer
    layer.final_state = True
    x = rearrange(canonical(), f"b t n c -> {pattern}")
    (_, expected), (out, state) = whole(x), final(x)
    assert out is None
    pairs = zip(expected, state, strict=True) if kind is nn.LSTM else [(expected, state)]
    for one, other in pairs:
        assert_same(other, one)
    with final.disable_adapter():
        assert final(x)[0].shape == whole(x)[0].shape


def test_the_lstm_backbone_says_that_only_its_final_state_is_read():
    model = get_peft_model(small_backbone("lstm"), STLoraConfig(num_nodes=5))
    assert model.base_model.model.lstm.final_state


def test_recurrent_initial_state_passes_through():
    base = nn.LSTM(C, D, batch_first=True).double()
    model = adapted(copy.deepcopy(base), N, node_layout={"layer": "(b n) t c"})
    x, state = rearrange(canonical(), "b t n c -> (b n) t c"), tuple(torch.randn(2, 1, B * N, D).double())
    frozen = rearrange(base(x, state)[0], "(b n) t c -> b t n c", n=N)
    update = reference.pointwise_update(frozen, "gate", factors_of(model), ALPHA / R)
    assert_same(rearrange(model(x, state)[0], "(b n) t c -> b t n c", n=N), frozen + update)


@pytest.mark.parametrize("conditioning", ["gate", "shared"])
@pytest.mark.parametrize("what", ["packed", "unbatched"])
def test_recurrent_input_without_batch_of_series_raises_and_says_what_to_pass(what, conditioning):
    model = adapted(nn.LSTM(C, D, batch_first=True), N, conditioning=conditioning)
    x = torch.randn(N, C).double()
    given = nn.utils.rnn.pack_sequence([x, x]) if what == "packed" else x
    lines = raised(lambda: model(given))
    assert lines["where"] == "stlora layer 'layer' cannot read its input"
    assert lines["expected"] == "a padded tensor of three axes"
    assert lines["got"] == ("PackedSequence" if what == "packed" else f"a tensor of shape ({N}, {C})")
    assert lines["fix"]


# -- several adapters on one layer --------------------------------------------------------------------------


def test_two_active_adapters_add_their_updates():
    base = nn.Linear(C, D).double()
    model = adapted(copy.deepcopy(base), N, conditioning="gate")
    config = STLoraConfig(
        num_nodes=N, r=3, lora_alpha=2, conditioning="core", predictor=None, target_modules=["layer"]
    )
    model.add_adapter("second", config)
    randomised(model)
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(B, 5, N, C, dtype=torch.float64)
    expected = base(x) + reference.pointwise_update(x, "gate", factors_of(model), ALPHA / R)
    expected = expected + reference.pointwise_update(x, "core", factors_of(model, adapter="second"), 2 / 3)
    assert_same(model(x), expected)


def test_update_layer_of_the_same_name_replaces_every_factor():
    model = adapted(nn.Linear(C, D), N, conditioning="gate")
    layer: STLoraLayer = model.base_model.model.layer
    config = STLoraConfig(num_nodes=N + 1, conditioning="core", target_modules=["layer"])
    layer.update_layer("default", config, r=3, lora_alpha=1.0, layout=None)
    assert {name: tuple(value.shape) for name, value in layer.factors("default").items()} == {
        "A": (3, C),
        "B": (D, 3),
        "core": (N + 1, 3, 3),
    }
    assert layer(torch.zeros(B, T, N + 1, C).double()).shape == (B, T, N + 1, D)


def test_host_variants_do_not_share_state():
    host = replace(LINEAR[0], name="twice")
    one, two = (adapted(host.make(), N, **options_of(host, "gate")) for _ in range(2))
    factors_of(one)["gate"].data.zero_()
    assert factors_of(two)["gate"].abs().max() > 0


# -- what is kept for the backward pass ---------------------------------------------------------------------


def large_tensors_kept(model: nn.Module, x: Tensor) -> int:
    """Number of different pieces of memory of at least the input's size that a forward pass keeps."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return len(kept)


@pytest.mark.parametrize("learning_input", [False, True])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_no_more_tensors_of_the_inputs_size_are_kept_than_by_lora(conditioning, learning_input):
    x = torch.randn(4, 6, N, 32, dtype=torch.float64, requires_grad=learning_input)
    lora = get_peft_model(Holder(nn.Linear(32, 32).double()), LoraConfig(r=2, target_modules=["layer"])).double()
    ours = adapted(nn.Linear(32, 32), N, conditioning=conditioning, node_layout={"layer": "b t n c"})
    assert large_tensors_kept(ours, x) <= large_tensors_kept(lora, x) == 1
