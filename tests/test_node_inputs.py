"""Shifts of the input against loops over batch, steps, nodes and channels, and what training them changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_city import small_city, small_data
from torch import Tensor, nn
from toys import assert_same, call, graph, raised, small_backbone, windows

from stlora_peft.backbones import build_backbone
from stlora_peft.checkpoints import trainable_state
from stlora_peft.data import CityData
from stlora_peft.evaluation import evaluate
from stlora_peft.measurement import adapter_bytes
from stlora_peft.methods.node_inputs import (
    InputShift,
    NodeEmbedding,
    NodeInputs,
    NodePrompt,
    node_embedding,
    node_prompt,
)
from stlora_peft.tensorfiles import load_tensors, save_tensors
from stlora_peft.training import TrainingOptions, train

N, WINDOW, CHANNELS = 5, 9, 3  # of the small backbones
BUILDERS = [node_embedding, node_prompt]
Builder = Callable[..., NodeInputs]


@pytest.fixture(scope="module")
def data() -> CityData:
    return small_data(small_city(num_nodes=N))


def randomised(model: NodeInputs, seed: int = 1) -> NodeInputs:
    """Give the shift random values, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.shift.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def entry(shift: InputShift, t: int, n: int, c: int, out_channels: int) -> Tensor:
    """One number of the shift, from the formulas."""
    if isinstance(shift, NodeEmbedding):
        return shift.embedding[n, t, c]
    if c >= out_channels:
        return torch.zeros((), dtype=torch.float64)
    column = t * out_channels + c
    return sum(shift.U[n, m] * shift.V[m, column] for m in range(shift.U.shape[1]))


def shifted(x: Tensor, shift: InputShift, out_channels: int) -> Tensor:
    out = x.clone()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for n in range(x.shape[2]):
                for c in range(x.shape[3]):
                    out[b, t, n, c] = x[b, t, n, c] + entry(shift, t, n, c, out_channels)
    return out


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("name", ["lstm", "stgcn", "agcrn", "gwnet", "staeformer"])
def test_forward_at_the_start_equals_the_backbone_bitwise(build: Builder, name: str) -> None:
    backbone = small_backbone(name).eval().requires_grad_(False)  # frozen: torch may round otherwise where it is not
    model = build(copy.deepcopy(backbone), N)
    assert torch.equal(call(model, N), call(backbone, N))


@pytest.mark.parametrize("out_channels", [1, 2])
@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("name", ["lstm", "stgcn"])
def test_forward_equals_the_backbone_on_the_shifted_input(build: Builder, name: str, out_channels: int) -> None:
    backbone = small_backbone(name, out_channels=out_channels).double().eval()
    model = randomised(build(copy.deepcopy(backbone), N))
    x, edges = windows(N).double(), graph(N)
    expected = backbone(shifted(x, model.shift, out_channels), *edges)
    assert_same(model(x, *edges), expected)
    assert (expected - backbone(x, *edges)).abs().max() > 0.1


def test_prompt_of_more_outputs_than_inputs_shifts_every_channel() -> None:
    prompt = NodePrompt(num_nodes=2, window=3, in_channels=1, out_channels=4)
    assert prompt.V.shape == (6, 3)
    assert prompt().shape == (3, 2, 1)


def test_forward_of_two_nodes_matches_hand_computed_values() -> None:
    prompt = NodePrompt(num_nodes=2, window=2, in_channels=2, out_channels=1, rank=1)
    with torch.no_grad():
        prompt.U.copy_(torch.tensor([[1.0], [-2.0]]))
        prompt.V.copy_(torch.tensor([[3.0, 5.0]]))
    expected = [[[3.0, 0.0], [-6.0, 0.0]], [[5.0, 0.0], [-10.0, 0.0]]]  # [t n c]
    assert prompt().tolist() == expected
    embedding = NodeEmbedding(num_nodes=2, window=2, in_channels=2)
    with torch.no_grad():
        embedding.embedding.copy_(torch.tensor([[[3.0, 0.0], [5.0, 0.0]], [[-6.0, 0.0], [-10.0, 0.0]]]))  # [n t c]
    assert embedding().tolist() == expected


def test_prompt_starts_with_one_random_factor() -> None:
    prompt = NodePrompt(num_nodes=3, window=400, in_channels=1, out_channels=1, rank=50)
    assert not prompt.U.any()
    assert prompt.V.std().item() == pytest.approx(50**-0.5, rel=0.02)
    assert prompt.V.mean().item() == pytest.approx(0.0, abs=0.01)


def test_backward_at_the_start_reaches_the_shift_only() -> None:
    for build, moving in ((node_embedding, "embedding"), (node_prompt, "U")):
        model = build(small_backbone("stgcn"), N)
        call(model, N).square().sum().backward()
        for name, parameter in model.shift.named_parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) is (name == moving), name
        assert (getattr(model.shift, moving).grad != 0).flatten(1).any(1).all()  # every node
        assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_backward_after_a_step_reaches_the_second_factor() -> None:
    model = node_prompt(small_backbone("lstm"), N)
    optimizer = torch.optim.SGD(model.shift.parameters(), lr=0.1)
    call(model, N).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    call(model, N).square().sum().backward()
    assert model.shift.V.grad.any()


@pytest.mark.parametrize("build", BUILDERS)
def test_permuting_nodes_and_their_rows_permutes_the_forecast(build: Builder) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    model = randomised(build(small_backbone("lstm").double(), N))
    other = copy.deepcopy(model)
    with torch.no_grad():
        rows = other.shift.U if isinstance(other.shift, NodePrompt) else other.shift.embedding
        rows.copy_(rows[order])
    x, edges = windows(N).double(), graph(N)  # an LSTM does not read the edges
    assert_same(other(x[:, :, order], *edges), model(x, *edges)[:, :, order])
    assert (model(x[:, :, order], *edges) - model(x, *edges)[:, :, order]).abs().max() > 0.1


@pytest.mark.parametrize(("rank", "out_channels"), [(6, 1), (2, 2)])
def test_parameter_counts_equal_the_formulas(rank: int, out_channels: int) -> None:
    backbone = small_backbone("lstm", out_channels=out_channels)
    embedding, prompt = node_embedding(backbone, N).shift, node_prompt(backbone, N, rank=rank).shift
    assert sum(parameter.numel() for parameter in embedding.parameters()) == N * WINDOW * CHANNELS
    assert sum(parameter.numel() for parameter in prompt.parameters()) == N * rank + rank * WINDOW * out_channels


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("name", ["lstm", "stgcn"])
def test_train_changes_the_shift_only(data: CityData, build: Builder, name: str) -> None:
    sizes: dict[str, Any] = {"lstm": {"hidden_size": 4}, "stgcn": {"num_nodes": N, "hidden_channels": 4}}[name]
    model = build(build_backbone(name, in_channels=3, residual=False, **sizes), N)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    result = train(model, data, TrainingOptions(max_epochs=1, progress=False, learning_rate=3e-2, batch_size=8))
    assert result.best_epoch == 1
    assert result.best_val_mae < result.history[0]["val_mae"]
    assert evaluate(model, data.val, data).mae == pytest.approx(result.best_val_mae, rel=1e-9)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert changed == {key for key in start if key.startswith("shift.")}  # nor do running statistics drift


def test_train_of_other_data_raises_with_the_backbones_name(data: CityData) -> None:
    model = node_prompt(build_backbone("lstm", in_channels=2, window=6), N)
    assert raised(lambda: train(model, data))["where"] == "the data do not fit the backbone 'lstm'"
    assert raised(lambda: train(model, data))["got"] == "window=12, in_channels=3"


@pytest.mark.parametrize("build", BUILDERS)
def test_state_round_trip_is_bitwise(build: Builder, tmp_path: Path) -> None:
    model = randomised(build(small_backbone("stgcn"), N))
    other = randomised(build(small_backbone("stgcn", seed=1), N), seed=2)
    assert not torch.equal(call(model.eval(), N), call(other.eval(), N))
    save_tensors(tmp_path / "state.safetensors", model.state_dict())
    other.load_state_dict(load_tensors(tmp_path / "state.safetensors"))
    assert torch.equal(call(model, N), call(other, N))
    assert torch.equal(call(model, N), call(copy.deepcopy(model), N))


@pytest.mark.parametrize(
    ("build", "names", "numbers"),
    [(node_embedding, ["shift.embedding"], N * 9 * 3), (node_prompt, ["shift.U", "shift.V"], 6 * (N + 9))],
)
def test_trainable_state_is_the_shift(build: Builder, names: list[str], numbers: int) -> None:
    model = build(small_backbone("lstm"), N)
    assert list(trainable_state(model)) == names
    assert 4 * numbers < adapter_bytes(model) < 4 * numbers + 300


def test_shift_has_the_type_of_the_backbone() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = node_prompt(small_backbone("lstm").to(dtype), N)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model(windows(N).to(dtype), *graph(N)).dtype == dtype


def test_attributes_are_those_of_the_backbone() -> None:
    model = node_embedding(small_backbone("lstm"), N)
    assert (model.window, model.horizon, model.in_channels, model.out_channels, model.name) == (9, 4, 3, 1, "lstm")
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = model.nothing_of_that_name


def test_class_freezes_nothing() -> None:
    model = NodeInputs(small_backbone("lstm"), NodeEmbedding(N, WINDOW, CHANNELS))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("build", "title"), [(node_embedding, "node embedding"), (node_prompt, "node prompt")])
@pytest.mark.parametrize(
    ("shape", "problem", "expected", "got", "fix"),
    [
        (
            (9, 5, 3),
            "wrong number of axes",
            "4 axes 'b t n c'",
            "3 axes: (9, 5, 3)",
            "give x one axis for each of batch, steps, nodes and channels, also where its length is 1",
        ),
        (
            (2, 8, 5, 3),
            "wrong number of input steps",
            "window=9 on axis 't' of 'b t n c'",
            "window=8 from an input of shape (2, 8, 5, 3)",
            "give windows of the length that the backbone was trained on",
        ),
        (
            (2, 9, 1, 3),
            "wrong number of nodes",
            "num_nodes=5 on axis 'n' of 'b t n c'",
            "num_nodes=1 from an input of shape (2, 9, 1, 3)",
            "give the nodes that it was built for, or build it with num_nodes=1",
        ),
        (
            (2, 9, 5, 1),
            "wrong number of channels",
            "in_channels=3 on axis 'c' of 'b t n c'",
            "in_channels=1 from an input of shape (2, 9, 5, 1)",
            "give the channels that the backbone was trained on",
        ),
    ],
)
def test_forward_of_an_input_that_does_not_fit_raises(
    build: Builder, title: str, shape: tuple[int, ...], problem: str, expected: str, got: str, fix: str
) -> None:
    model = build(small_backbone("lstm"), N)  # shapes of 1 would broadcast
    assert raised(lambda: model(torch.zeros(shape), *graph(N))) == {
        "where": f"{title}: {problem}",
        "expected": expected,
        "got": got,
        "fix": fix,
    }


@pytest.mark.parametrize(
    ("build", "sizes", "title", "name"),
    [
        (node_embedding, {"num_nodes": 0}, "node embedding", "num_nodes"),
        (node_prompt, {"num_nodes": 0}, "node prompt", "num_nodes"),
        (node_prompt, {"num_nodes": 5, "rank": 0}, "node prompt", "rank"),
    ],
)
def test_sizes_out_of_range_raise(build: Builder, sizes: dict[str, int], title: str, name: str) -> None:
    assert raised(lambda: build(small_backbone("lstm"), **sizes)) == {
        "where": f"{title}: {name} out of range",
        "expected": f"{name} >= 1",
        "got": f"{name} = 0",
        "fix": f"give a larger {name}",
    }


def test_backbone_without_sizes_raises_before_it_is_frozen() -> None:
    backbone = nn.Linear(3, 1)
    backbone.window = 12
    assert raised(lambda: node_prompt(backbone, N)) == {
        "where": "backbone 'Linear' does not say the size of its input",
        "expected": "attributes window, in_channels, out_channels",
        "got": "no in_channels, out_channels",
        "fix": "set them in the class, or leave node-embedding and node-prompt out",
    }
    assert backbone.weight.requires_grad
