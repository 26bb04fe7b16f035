"""Counts and starting values of the six forms."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from toys import CONDITIONINGS, Holder, adapted, factors_of

from stlora_peft import STLoraConfig
from stlora_peft.tuner.conditioning import CONDITIONINGS as NAMES
from stlora_peft.tuner.conditioning import condition, factor_shapes, new_factor

N, R, EMB = 7, 3, 5


def formula(conditioning: str, d_in: int, d_out: int) -> int:
    """Parameters of one layer, as the design's table counts them; the node vectors come once on top."""
    return {
        "full": N * R * d_in + R * d_out,
        "core": N * R**2 + R * (d_in + d_out),
        "gate": 2 * N * R + R * (d_in + d_out),
        "embedding": R * (d_in + d_out + 2 * EMB),
        "bias": N * R + R * d_out,
        "shared": R * (d_in + d_out),
    }[conditioning]


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def test_names_are_those_of_the_design():
    assert set(NAMES) == set(CONDITIONINGS)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("widths", [[(4, 6)], [(4, 6), (6, 2), (2, 9)]])
def test_parameter_count_equals_the_formula(conditioning, widths):
    stack = Stack(*(nn.Linear(*width) for width in widths))
    config = STLoraConfig(
        num_nodes=N, r=R, emb_size=EMB, conditioning=conditioning, predictor=None, target_modules="all-linear"
    )
    model = get_peft_model(stack, config)
    once = N * EMB if conditioning == "embedding" else 0
    assert trainable(model) == once + sum(formula(conditioning, *width) for width in widths)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize(
    ("layer", "d_in", "d_out"),
    [
        (lambda: nn.Conv2d(4, 6, (1, 3)), 4 * 3, 6),
        (lambda: nn.Conv1d(4, 6, 5), 4 * 5, 6),
        (lambda: nn.LSTM(4, 6), 6, 6),
        (lambda: nn.GRU(4, 6, bidirectional=True), 12, 12),
        (lambda: nn.LSTM(4, 6, proj_size=2), 2, 2),
    ],
    ids=["conv2d", "conv1d", "lstm", "gru both ways", "lstm projected"],
)
def test_parameter_count_of_other_layers_takes_the_width_that_the_update_reads(layer, d_in, d_out, conditioning):
    model = adapted(layer(), N, r=R, emb_size=EMB, conditioning=conditioning)
    once = N * EMB if conditioning == "embedding" else 0
    assert trainable(model) == once + formula(conditioning, d_in, d_out)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_factor_shapes_count_equals_the_formula(conditioning):
    shapes = factor_shapes(conditioning, r=R, num_nodes=N, in_shape=(4,), out_features=6, emb_size=EMB)
    assert sum(math.prod(shape) for shape in shapes.values()) == formula(conditioning, 4, 6)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_start_is_plain_lora_or_a_node_bias_without_effect(conditioning):
    options = {"predictor": None, "target_modules": ["layer"], "r": R, "emb_size": EMB, "conditioning": conditioning}
    factors = factors_of(get_peft_model(Holder(nn.Linear(4, 6)), STLoraConfig(num_nodes=N, **options)))
    assert torch.equal(factors["B"], torch.zeros(6, R))
    if conditioning == "bias":
        assert factors.keys() == {"B", "node_vector"}
        assert factors["node_vector"].std() > 0.5
        return
    assert factors["A"].abs().max() <= 1 / math.sqrt(4)  # Kaiming, as nn.Linear starts
    assert factors["A"].abs().min() > 0
    if conditioning == "full":
        assert torch.equal(factors["A"], factors["A"][:1].expand(N, R, 4))
    if conditioning == "gate":
        assert torch.equal(factors["gate"], torch.ones(N, R))
        assert torch.equal(factors["node_bias"], torch.zeros(N, R))
    if conditioning == "core":
        assert torch.equal(factors["core"], torch.eye(R).expand(N, R, R))
    if conditioning == "embedding":
        assert torch.equal(factors["gate_map"], torch.zeros(R, EMB))
        assert torch.equal(factors["node_bias_map"], torch.zeros(R, EMB))
        assert factors["emb"].std() > 0.5


@pytest.mark.parametrize("conditioning", ["gate", "core", "full", "embedding", "bias"])
def test_random_start_differs_from_node_to_node(conditioning):
    options = {"predictor": None, "target_modules": ["layer"], "init_weights": False, "conditioning": conditioning}
    model = get_peft_model(Holder(nn.Linear(4, 6)), STLoraConfig(num_nodes=N, **options))
    out = model(torch.ones(2, 3, N, 4))
    assert (out[:, :, 0] - out[:, :, 1]).abs().max() > 1e-4


def test_factors_take_dtype_of_the_layer_and_float32_beside_integers():
    half = new_factor("A", (2, 4), (4,), identity=True, like=torch.zeros(1, dtype=torch.bfloat16))
    whole = new_factor("A", (2, 4), (4,), identity=True, like=torch.zeros(1, dtype=torch.int8))
    assert half.dtype == torch.bfloat16
    assert whole.dtype == torch.float32


def test_conv_start_is_bounded_by_the_whole_kernel():
    factor = new_factor("A", (64, 4, 1, 9), (4, 1, 9), identity=True, like=torch.zeros(1))
    assert 0.9 / 6 < factor.abs().max() <= 1 / 6


def test_condition_of_shared_leaves_the_directions_as_they_are():
    u = torch.randn(2, 3)
    assert condition(u, {"A": u, "B": u}, None, 0, 1) is u


def test_condition_by_embedding_without_node_vectors_raises():
    u = torch.randn(2, 3)
    maps = {"A": u, "B": u, "gate_map": torch.randn(3, 4), "node_bias_map": torch.randn(3, 4)}
    with pytest.raises(ValueError, match="no node vectors") as error:
        condition(u, maps, None, 0, 1)
    assert str(error.value).splitlines() == [
        "an update with conditioning 'embedding' has no node vectors.",
        "  expected: the node table of its adapter",
        "  got:      none",
        "  to fix:   add the adapter with get_peft_model or add_adapter, which make the table",
    ]
