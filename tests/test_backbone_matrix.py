"""Every backbone x every conditioning: identity, gradients, learning, frozen statistics, permutations, files."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import (
    ALL_BACKBONES,
    CONDITIONINGS,
    assert_same,
    call,
    graph,
    pristine,
    randomised,
    small_backbone,
    windows,
)

from stlora_peft import STLoraConfig, rebuild

MATRIX = [(name, conditioning) for name in ALL_BACKBONES for conditioning in CONDITIONINGS]
N = 7  # the backbones were built for 5
NEVER_USED = {"a3tgcn": ("conv_r", "linear_r"), "a3tgcn2": ("conv_r", "linear_r")}  # upstream hands on no state
IN_NODE_ORDER = {"aagcn": "its attention convolves along the numbers of the nodes"}
WITHOUT_EDGES = ("agcrn", "gman", "mtgnn", "staeformer")  # they learn who hears whom


@pytest.fixture(params=MATRIX, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    name, conditioning = request.param
    return small_backbone(name).eval().requires_grad_(False), conditioning


def city_model(backbone: nn.Module, conditioning: str, num_nodes: int = N, **options: object) -> PeftModel:
    return get_peft_model(pristine(backbone), STLoraConfig(num_nodes=num_nodes, conditioning=conditioning, **options))


# -- start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_forecast_at_init_equals_backbone_bitwise(case, grad):
    backbone, conditioning = case
    model = city_model(backbone, conditioning, 5)
    with torch.set_grad_enabled(grad):
        expected = call(backbone, 5)
        assert torch.equal(call(model.eval(), 5), expected)
        # Every node-bound copy starts from the backbone's own entries; only in train mode does it follow the batch.
        if not model.peft_config["default"].node_bound:
            assert torch.equal(call(model.train(), 5), expected)


def test_forecast_at_init_equals_rebuilt_backbone_in_another_city(case):
    backbone, conditioning = case
    model = city_model(backbone, conditioning).eval()
    assert torch.equal(call(model, N), call(rebuild(backbone, N), N))


def test_forecast_at_init_equals_backbone_that_still_trains_up_to_rounding(case):
    # torch multiplies a strided input by another kernel where the weight needs a gradient (the head of STGCN).
    backbone, conditioning = case
    model = city_model(backbone, conditioning, 5).eval()
    assert_same(call(model, 5), call(pristine(backbone).requires_grad_(True), 5), tolerance=1e-6)


def test_forecast_from_a_random_start_differs_from_the_backbone(case):
    backbone, conditioning = case
    model = city_model(backbone, conditioning, 5, init_weights=False).eval()
    assert (call(model, 5) - call(backbone, 5)).abs().max() > 1e-3


def test_disabled_adapter_equals_backbone_bitwise(case):
    backbone, conditioning = case
    model = randomised(city_model(backbone, conditioning, 5)).eval()
    with model.disable_adapter():
        assert torch.equal(call(model, 5), call(backbone, 5))


# -- training -----------------------------------------------------------------------------------------------


def train(model: nn.Module, steps: int = 12) -> tuple[list[float], set[str]]:
    """Losses of a few steps towards a target that differs from node to node, and names that ever had a gradient."""
    target = call(model.eval(), N).detach() + torch.linspace(-0.5, 1.5, N)[None, None, :, None]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.005)
    losses, reached = [], set()
    model.train()
    for _ in range(steps):
        loss = (call(model, N) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().max() > 0:
                reached.add(name)
    return losses, reached


def test_training_reaches_every_adapter_parameter_and_no_other(case):
    backbone, conditioning = case
    model = city_model(backbone, conditioning, lora_dropout=0.0)
    adapter = {name for name, _ in model.named_parameters() if "nall_" in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapter
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "nall_" not in name}
    losses, reached = train(model)
    assert reached == adapter
    assert min(losses[-3:]) < losses[0]
    for name, value in frozen.items():
        assert torch.equal(model.state_dict()[name], value), f"'{name}' changed"
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in adapter)


def test_node_conditioning_fits_node_by_node_targets_that_plain_lora_cannot():
    backbone = small_backbone("lstm").eval()
    end = {}
    for conditioning in ("gate", "shared"):
        model = city_model(backbone, conditioning, lora_dropout=0.0, predictor=None)
        torch.manual_seed(0)
        end[conditioning] = train(model, 60)[0][-1]
    assert end["gate"] < 0.7 * end["shared"]


def test_backbone_trains_too_where_asked(case):
    backbone, conditioning = case
    model = city_model(backbone, conditioning, lora_dropout=0.0, freeze_backbone=False)
    _, reached = train(model, 3)
    bound = tuple(f"{name}.base_layer" for name in model.peft_config["default"].node_bound)
    expected = {
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not any(part in name for part in bound)
    }
    parts = ("gate_map", "bias_map", "nall_emb", *NEVER_USED.get(backbone.name, ()))
    inert = {name for name in expected if any(part in name for part in parts)}
    assert expected - inert <= reached


# -- statistics of normalisation ----------------------------------------------------------------------------


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("again", [True, False])
def test_train_mode_leaves_the_frozen_statistics_alone_and_moves_the_citys(again):
    model = city_model(small_backbone("stgcn"), "gate")
    model.train()
    if again:
        model.eval()
        model.train()
    before = statistics(model)
    call(model, N)
    changed = {name for name, value in statistics(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "nall_node_bound" in name}
    with model.disable_adapter():
        before = statistics(model)
        call(model, 5)
        assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())


def test_norm_that_belongs_to_no_node_is_frozen_unless_it_is_saved():
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.lin(x).flatten(0, 2)).view(*x.shape[:3], 4)

    for saved in (False, True):
        options = {"modules_to_save": ["norm"]} if saved else {}
        config = STLoraConfig(num_nodes=N, target_modules=["lin"], predictor=None, **options)
        model = get_peft_model(Channels(), config).train()
        before = statistics(model)
        model(torch.randn(2, 9, N, 3))
        changed = {name for name, value in statistics(model).items() if not torch.equal(value, before[name])}
        assert changed == ({name for name in before if "modules_to_save" in name} if saved else set())


def test_node_bound_statistics_are_saved(tmp_path):
    backbone = small_backbone("stgcn")
    model = city_model(backbone, "gate").train()
    call(model, N)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pristine(backbone), tmp_path).eval()
    found = {name: value for name, value in statistics(loaded).items() if "nall_node_bound" in name}
    assert len(found) == 6
    for name, value in found.items():
        assert torch.equal(value, statistics(model)[name])
        if value.numel() > 1:
            assert value.std() > 0


# -- nodes --------------------------------------------------------------------------------------------------

ORDER = torch.tensor([3, 0, 6, 1, 5, 2, 4])


def permute_rows(model: nn.Module) -> None:
    """Bring everything that belongs to a node into the new order."""
    full = model.peft_config["default"].conditioning == "full"
    own = ("emb", "core", "node_bias", "node_vector", "gate") + (("A",) if full else ())
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "nall_" not in name or value.ndim == 0 or "base_layer" in name:
                continue
            factor = name.split("nall_")[1].replace("predictor.default.", "")
            if factor.startswith("node_bound"):
                for axis in (axis for axis, size in enumerate(value.shape) if size == N):
                    value.copy_(value.index_select(axis, ORDER))
            elif factor.startswith(own) and "_map" not in factor:
                assert value.shape[0] == N, name
                value.copy_(value[ORDER].clone())


def test_permuting_nodes_edges_and_rows_permutes_the_forecast(case):
    backbone, conditioning = case
    if backbone.name in IN_NODE_ORDER:
        pytest.skip(IN_NODE_ORDER[backbone.name])
    if "exact_diffusion" in backbone.hyperparameters:  # upstream's norms depend on the order of the edges
        backbone = small_backbone(backbone.name, exact_diffusion=True).eval().requires_grad_(False)
    backbone = copy.deepcopy(backbone).double()
    model = randomised(city_model(backbone, conditioning)).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "nall_node_bound" in name and value.is_floating_point():
                value.add_(torch.rand(value.shape, dtype=value.dtype))
    edge_index, edge_weight = graph(N)
    x, moved = windows(N).double(), torch.argsort(ORDER)[edge_index]
    out = model(x, edge_index, edge_weight)[:, :, ORDER]

    only_nodes = model(x[:, :, ORDER], moved, edge_weight)
    bound = model.peft_config["default"].node_bound
    if conditioning != "shared" or bound:
        assert (only_nodes - out).abs().max() > 1e-3
    permute_rows(model)
    assert_same(model(x[:, :, ORDER], moved, edge_weight), out)
    if backbone.name != "lstm" and backbone.name not in WITHOUT_EDGES:  # nodes and rows alone are another city
        assert (model(x[:, :, ORDER], edge_index, edge_weight) - out).abs().max() > 1e-3


def test_wrong_city_is_refused_by_name(case):
    backbone, conditioning = case
    model = city_model(backbone, conditioning)
    if conditioning == "shared" and not model.peft_config["default"].node_bound:
        assert call(model, N + 1).shape == (2, 4, N + 1, 1)  # plain LoRA on what no node is bound to fits every city
        return
    with pytest.raises(ValueError, match="wrong number of nodes"):
        call(model, N + 1)


# -- files --------------------------------------------------------------------------------------------------


def test_saved_adapter_loads_into_the_pristine_backbone_bitwise(case, tmp_path):
    backbone, conditioning = case
    model = city_model(backbone, conditioning, init_weights=False)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "nall_node_bound" in name and value.is_floating_point():
                value.add_(torch.rand_like(value))
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pristine(backbone), tmp_path).eval()
    with torch.no_grad():
        expected = call(model, N)
        assert expected.isfinite().all()
        assert torch.equal(call(loaded, N), expected)


# -- several adapters ---------------------------------------------------------------------------------------


def test_two_cities_are_switched_and_one_is_deleted(case):
    backbone, conditioning = case
    model = randomised(city_model(backbone, conditioning))
    model.add_adapter("other", STLoraConfig(num_nodes=N - 1, conditioning=conditioning, init_weights=False))
    model.eval()
    first = call(model, N)
    model.set_adapter("other")
    other = call(model, N - 1)
    alone = get_peft_model(pristine(backbone), model.peft_config["other"]).eval()
    alone.load_state_dict(
        {
            name.replace(".other", ".default"): value
            for name, value in model.state_dict().items()
            if ".default" not in name
        },
        strict=False,
    )
    assert torch.equal(call(alone, N - 1), other)
    model.set_adapter("default")
    assert torch.equal(call(model, N), first)
    model.delete_adapter("other")
    assert torch.equal(call(model, N), first)
    assert not any(".other" in name for name in model.state_dict())
