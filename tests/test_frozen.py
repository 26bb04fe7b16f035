"""What is kept of the frozen part: the same forecasts and gradients from fewer computations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from small_city import small_data
from torch import Tensor, nn
from toys import ALL_BACKBONES, assert_same, graph, raised, randomised, small_backbone, windows

from stlora_peft import STLoraConfig
from stlora_peft.frozen import FrozenActivations
from stlora_peft.training import TrainingOptions, train

N, COUNT = 5, 7
STARTS = torch.tensor([3, 0, 9, 4, 11, 6, 20])
"""What the windows are called, in no order."""


class Counted(nn.Linear):
    """A linear layer that counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def frozen(layer: nn.Module) -> Any:
    return layer.requires_grad_(False)


def kept(model: nn.Module, run: Callable[[Tensor], Any], x: Tensor, **options: Any) -> FrozenActivations:
    """Everything of the windows ``x``, called ``STARTS``."""
    activations = FrozenActivations(model, run, x[:3], **options)
    place = torch.full((int(STARTS.max()) + 1,), -1)
    place[STARTS] = torch.arange(len(STARTS))
    activations.fill(STARTS[: len(x)], lambda starts: x[place[starts]])
    return activations


def outputs_and_gradients(model: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def compare(model: nn.Module, run: Callable[[Tensor], Any], x: Tensor, **options: Any) -> FrozenActivations:
    """Forecasts and gradients of some windows in another order, with and without the store."""
    activations, rows = kept(model, run, x, **options), torch.tensor([5, 1, 2, 6])
    expected = outputs_and_gradients(model, run, x[rows])
    with activations.replaying(STARTS[rows]):
        found = outputs_and_gradients(model, run, x[rows])
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, tolerance=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())
    return activations


def calling(model: nn.Module) -> Callable[[Tensor], Any]:
    edge_index, edge_weight = graph(N)
    return lambda x: model(x, edge_index, edge_weight.float())


# -- every backbone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_BACKBONES)
def test_head_of_every_backbone_trains_on_what_is_kept_of_the_rest(name: str) -> None:
    model = small_backbone(name).requires_grad_(False).eval()
    for layer in model.stlora_spec.head:
        model.get_submodule(layer).requires_grad_(True)
    activations = compare(model, calling(model), windows(N, batch=COUNT))
    assert activations.modules
    assert activations.num_bytes > 0


@pytest.mark.parametrize("name", ALL_BACKBONES)
def test_predictor_alone_on_every_backbone(name: str) -> None:
    torch.manual_seed(0)
    config = STLoraConfig(num_nodes=N, target_modules=[], lora_dropout=0.0)
    model = randomised(get_peft_model(small_backbone(name), config)).eval()  # without dropout
    activations = compare(model, calling(model), windows(N, batch=COUNT))
    if not model.peft_config["default"].node_bound:
        assert activations.modules == [model.get_base_model()]


@pytest.mark.parametrize("name", ["lstm", "stgcn", "gwnet"])
def test_default_adapter_leaves_nothing_out(name: str) -> None:
    model = randomised(get_peft_model(small_backbone(name), STLoraConfig(num_nodes=N, lora_dropout=0.0))).eval()
    compare(model, calling(model), windows(N, batch=COUNT))


def test_recurrent_layer_behind_an_adapter_is_kept_and_only_what_is_read_of_it() -> None:
    model = randomised(get_peft_model(small_backbone("lstm"), STLoraConfig(num_nodes=N, lora_dropout=0.0))).eval()
    activations = compare(model, calling(model), windows(N, batch=COUNT))
    adapted = model.get_base_model().lstm
    assert activations.modules == [adapted.base_layer]
    assert activations.num_bytes == COUNT * N * adapted.hidden_size * 4  # the final state of each row, in float32


# -- what is kept, and what is not --------------------------------------------------------------------------


def x_of(*shape: int) -> Tensor:
    return torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(3))


def test_frozen_layers_are_not_called_again_and_what_only_they_read_is_not_stored() -> None:
    first, second, last = frozen(Counted(2, 64)), frozen(Counted(64, 3)), Counted(3, 1)
    model = nn.Sequential(first, nn.ReLU(), second, last)
    activations = kept(model, model, x_of(4, 2))
    before = first.calls, second.calls, last.calls
    with activations.replaying(STARTS[:2]):
        model(x_of(4, 2)[:2])
    assert (first.calls, second.calls, last.calls) == (before[0], before[1], before[2] + 1)
    assert activations.modules == [first, second]
    assert activations.num_bytes == COUNT * 4 * 3 * 4  # of the second alone, in float32


def test_nothing_is_kept_where_the_first_layer_is_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 3), frozen(nn.Linear(3, 1)))
    activations = compare(model, model, x_of(4, 2))
    assert (activations.modules, activations.still, activations.num_bytes) == ([], [], 0)


def test_what_a_normalisation_makes_of_a_batch_is_not_kept() -> None:
    norm, after = frozen(nn.BatchNorm1d(2)), frozen(nn.Linear(2, 3))
    before = frozen(nn.Linear(2, 2))
    model = nn.Sequential(before, norm, after, nn.Linear(3, 1))
    assert kept(model, model, x_of(2)).modules == [before]
    norm.eval()  # as it is with frozen weights in a training
    assert kept(model, model, x_of(2)).modules == [before, norm, after]
    without = frozen(nn.BatchNorm1d(2, affine=False, track_running_stats=False))
    model = nn.Sequential(without, after, nn.Linear(3, 1)).eval()
    assert kept(model, model, x_of(2)).modules == []


class TimeFirst(nn.Module):
    """Windows that do not lie one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = frozen(nn.Linear(2, 3)), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.inner(x.transpose(0, 1).flatten(0, 1))  # [(t b) c]
        out: Tensor = self.last(rows)
        return out


def test_windows_that_are_folded_behind_the_steps_are_computed() -> None:
    model = TimeFirst()
    assert kept(model, model, x_of(4, 2)).modules == []


class Memory(nn.Module):
    """Calls a cell again and again, an LSTM with its states, and a matrix that knows no windows."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.lstm = frozen(nn.GRUCell(2, 3)), frozen(nn.LSTM(3, 4, batch_first=True))
        self.table, self.last = frozen(nn.Linear(4, 4)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 3)
        states = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        out, (last, _) = self.lstm(torch.stack(states, 1))
        trained = self.last(out[:, -1] @ self.table(torch.eye(4)) + last[0])
        found: Tensor = trained + self.cell(x[:, 0], trained.expand(-1, 3)).sum(-1, keepdim=True)
        return found


def test_repeated_calls_states_and_tables_come_back_in_their_places() -> None:
    model = Memory()
    activations = compare(model, model, x_of(6, 2))
    assert activations.modules == [model.cell, model.lstm, model.table]
    states = COUNT * (6 * 4 + 4)  # the LSTM's output and hidden state; nothing reads its memory
    assert activations.num_bytes == 4 * (states + 4 * 4)


def test_dropout_inside_the_frozen_part_stays_off_and_adapters_train() -> None:
    backbone = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 4), nn.Linear(4, 1))
    body = nn.Sequential(backbone[:3], backbone[3])
    config = STLoraConfig(num_nodes=4, target_modules="1", predictor=None, conditioning="gate", lora_dropout=0.5)
    model = get_peft_model(body, config).train()
    x = x_of(4, 2)
    activations = FrozenActivations(model, model, x[:3])
    assert set(activations.still) == {body[0], *body[0]}
    place = torch.arange(COUNT)
    activations.fill(place, lambda starts: x[starts])
    assert all(part.training for part in activations.still)  # the trainer switches them
    with activations.replaying(place), model.disable_adapter():
        assert_same(model(x), body.eval()(x), tolerance=1e-6)


def test_more_than_the_limit_lies_in_a_file_that_is_deleted() -> None:
    model = nn.Sequential(frozen(nn.Linear(2, 3)), nn.Linear(3, 1))
    size = COUNT * 4 * 3 * 4
    assert compare(model, model, x_of(4, 2), limit=size)._folder is None
    activations = compare(model, model, x_of(4, 2), limit=size - 1)
    assert activations._folder is not None
    folder = Path(activations._folder.name)
    assert sum(file.stat().st_size for file in folder.iterdir()) == size
    del activations
    assert not folder.exists()


@pytest.mark.parametrize("start", [1, 21, -4])  # between those that were filled, behind the last, before the first
def test_a_window_that_was_not_filled_is_refused(start: int) -> None:
    model = nn.Sequential(frozen(nn.Linear(2, 3)), nn.Linear(3, 1))
    activations = kept(model, model, x_of(4, 2))

    def replay() -> None:
        with activations.replaying(torch.tensor([3, start])):
            raise AssertionError("nothing of this window is kept")

    assert raised(replay) == {
        "where": "nothing is kept of some windows",
        "expected": "windows that fill() was given",
        "got": f"[{start}]",
        "fix": "fill them, or forecast them outside replaying()",
    }


def test_nothing_can_be_replayed_before_it_was_filled() -> None:
    model = nn.Sequential(frozen(nn.Linear(2, 3)), nn.Linear(3, 1))
    activations = FrozenActivations(model, model, x_of(4, 2)[:3])
    assert activations.num_bytes == 0  # what the frozen part was found with is forgotten
    with pytest.raises(ValueError, match="nothing is kept of some windows"), activations.replaying(torch.tensor([0])):
        pass


# -- in a training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "stgcn", "gconvgru", "gwnet"])
@pytest.mark.parametrize("days", [{"patience": 3, "max_epochs": 2}, {"patience": None, "max_steps": 9}])
def test_training_is_the_same_with_and_without_the_store(name: str, days: dict[str, Any]) -> None:
    data, found = small_data(), []
    for cache in (True, False):
        torch.manual_seed(0)
        config = STLoraConfig(num_nodes=data.city.num_nodes, target_modules=[])
        model = get_peft_model(small_backbone(name, num_nodes=data.city.num_nodes, window=12, horizon=12), config)
        options = TrainingOptions(learning_rate=1e-2, progress=False, cache_frozen=cache)
        result = train(model, data, replace(options, **days))
        state = {name: value for name, value in model.state_dict().items() if "nall" in name}
        found.append((result, state))
    (with_store, state), (without, expected) = found
    assert with_store.best_epoch == without.best_epoch
    for one, other in zip(with_store.history, without.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert set(state) == set(expected)
    assert len(state) > 5
    for key, value in expected.items():
        assert_same(state[key], value, tolerance=1e-4)
