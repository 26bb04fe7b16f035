import copy
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_city import small_city, small_data
from torch import nn
from toys import raised
from transformers import TrainerCallback

from stlora_peft.backbones import build_backbone
from stlora_peft.checkpoints import trainable_state
from stlora_peft.data import CityData, Windows
from stlora_peft.evaluation import evaluate
from stlora_peft.metrics import masked_mae
from stlora_peft.training import TrainingOptions, train

QUIET = TrainingOptions(max_epochs=2, progress=False, learning_rate=3e-3)


@pytest.fixture(scope="module")
def data() -> CityData:
    return small_data()


def lstm(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_backbone("lstm", in_channels=3, hidden_size=4)


def lora(seed: int = 0) -> PeftModel:
    return get_peft_model(lstm(seed), LoraConfig(r=2, target_modules=["head"], lora_dropout=0.1))


class Normed(nn.Module):
    """A frozen norm, one that is trained, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.free, self.layer = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.Linear(3, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, *edges: torch.Tensor) -> torch.Tensor:
        forecast: torch.Tensor = self.layer(self.free(self.frozen(x)))
        return forecast


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("make", [lstm, lora])
def test_train_with_the_same_seed_is_bit_identical(data: CityData, make: type[nn.Module]) -> None:
    one, other = make(), make()
    first = train(one, data, QUIET)
    torch.rand(7)  # what the caller draws in between does not matter
    second = train(other, data, QUIET)
    assert same(one, other)
    assert first.history == second.history


def test_train_with_another_seed_differs(data: CityData) -> None:
    one, other = lstm(), lstm()
    train(one, data, QUIET)
    train(other, data, TrainingOptions(max_epochs=2, progress=False, learning_rate=3e-3, seed=1))
    assert not same(one, other)


@pytest.mark.parametrize("max_grad_norm", [5.0, 1e-8])  # the second is of the size of AdamW's epsilon, so it shows
def test_train_first_step_is_adamw_on_the_masked_mae_in_city_units(data: CityData, max_grad_norm: float) -> None:
    model, reference = lstm(), lstm()
    batch = data.train.__getitems__(list(range(len(data.train))))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=3e-3, weight_decay=0.0)
    scaled = reference(batch["x"], data.edge_index, data.edge_weight)
    loss = masked_mae(scaled * data.scaler.std[0] + data.scaler.mean[0], batch["y"])
    loss.backward()
    nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
    optimizer.step()

    options = replace(QUIET, max_epochs=1, batch_size=len(data.train), max_grad_norm=max_grad_norm, ema_decay=0.0)
    result = train(model, data, options)
    assert result.best_epoch == 1
    assert result.history[1]["train_mae"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=2e-6)


def test_train_lowers_the_validation_error_and_returns_the_best(data: CityData) -> None:
    model = lstm()
    result = train(model, data, TrainingOptions(max_epochs=6, progress=False, learning_rate=1e-2))
    errors = [entry["val_mae"] for entry in result.history]
    assert result.best_val_mae == min(errors) < 0.95 * errors[0]
    assert errors[result.best_epoch] == min(errors)
    assert evaluate(model, data.val, data).mae == pytest.approx(result.best_val_mae, rel=1e-9)
    assert not model.training


def test_train_that_only_harms_returns_the_start_bit_for_bit(data: CityData) -> None:
    model, start = lstm(), lstm()
    result = train(model, data, TrainingOptions(max_epochs=20, patience=2, progress=False, learning_rate=1e4))
    assert same(model, start)
    assert result.best_epoch == 0
    assert result.epochs == 2  # early stopping: patience ran out
    assert result.best_val_mae == result.history[0]["val_mae"]


def test_train_that_diverges_to_nan_returns_the_start(data: CityData) -> None:
    model, start = lstm(), lstm()
    train(model, data, TrainingOptions(max_epochs=2, progress=False, learning_rate=1e36, max_grad_norm=0.0))
    assert same(model, start)


class Steps(TrainerCallback):
    """Copies what is trained after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def copy(self, model: nn.Module) -> None:
        self.states.append({name: tensor.clone() for name, tensor in trainable_state(model).items()})

    def on_train_begin(self, *args: object, **kwargs: Any) -> None:
        self.copy(kwargs["model"])

    def on_step_end(self, *args: object, **kwargs: Any) -> None:
        self.copy(kwargs["model"])


@pytest.mark.parametrize("ema_decay", [0.5, 0.0])
def test_train_validates_and_keeps_the_moving_average_of_the_steps(data: CityData, ema_decay: float) -> None:
    model, steps = Normed(), Steps()
    options = replace(QUIET, max_epochs=3, ema_decay=ema_decay, batch_size=16)
    result = train(model, data, options, callbacks=[steps])

    per_epoch = -(-len(data.train) // 16)
    averages = [steps.states[0]]
    for step, state in enumerate(steps.states[1:], start=1):
        decay = min(ema_decay, (1 + step) / (10 + step))
        kept = {
            name: decay * averages[-1][name].double() + (1 - decay) * tensor.double()
            if tensor.is_floating_point()
            else tensor
            for name, tensor in state.items()
        }
        averages.append(kept)
    assert result.best_epoch > 0
    best = averages[result.best_epoch * per_epoch]
    for name, tensor in trainable_state(model).items():
        torch.testing.assert_close(tensor, best[name].to(tensor.dtype), rtol=0, atol=1e-6 if ema_decay else 0.0)
    assert evaluate(model, data.val, data).mae == pytest.approx(result.best_val_mae, rel=1e-9)


def test_train_without_validation_takes_every_given_window_and_ends_in_the_average(data: CityData) -> None:
    model, other, steps = Normed(), Normed(), Steps()
    options = replace(QUIET, patience=None, max_steps=5, ema_decay=0.5, batch_size=16)
    result = train(model, data, options, callbacks=[steps])
    assert len(steps.states) == 6
    assert (result.best_val_mae, result.best_epoch, result.seconds_to_best) == (math.inf, 0, 0.0)
    assert not any("val_mae" in entry for entry in result.history)
    average = steps.states[0]["layer.weight"].double()
    for step, state in enumerate(steps.states[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * state["layer.weight"].double()
    torch.testing.assert_close(model.layer.weight, average.float(), rtol=0, atol=1e-6)
    assert not model.training

    # the validation part takes part: other truths there, another model
    changed = data.train.targets.clone()
    changed[data.split.val.start : data.split.val.stop] += 5.0
    parts = {name: replace_targets(getattr(data, name), changed) for name in ("train", "val", "test")}
    other.load_state_dict(Normed().state_dict())
    whole = replace(options, batch_size=len(data.given), max_steps=1)
    before, after = (trained_weight(city, whole) for city in (data, replace(data, **parts)))
    assert not torch.equal(before, after)


def replace_targets(windows: Windows, targets: torch.Tensor) -> Windows:
    return Windows(windows.series, targets, windows.starts, window=windows.window, horizon=windows.horizon)


def trained_weight(data: CityData, options: TrainingOptions) -> torch.Tensor:
    model = lstm()
    train(model, data, options)
    return model.head.weight.detach()


def test_given_windows_are_all_that_fit_into_the_given_steps(data: CityData) -> None:
    given = data.split.given
    assert data.given.starts.tolist() == list(range(given.start, given.stop - 24 + 1))
    assert set(data.train.starts.tolist()) | set(data.val.starts.tolist()) < set(data.given.starts.tolist())


def test_train_without_validation_that_diverges_raises_and_leaves_no_nan(data: CityData) -> None:
    options = replace(QUIET, patience=None, max_steps=60, learning_rate=1e37, max_grad_norm=0.0)
    error = raised(lambda: train(Normed(), data, options))
    assert error == {
        "where": "the training has diverged",
        "expected": "finite numbers in everything that was trained",
        "got": "NaN or infinity in 'free.weight' with learning_rate=1e+37",
        "fix": "give a smaller learning rate, or look for readings that are out of scale",
    }


def test_train_without_validation_resumed_equals_uninterrupted(data: CityData, tmp_path: Path) -> None:
    options = replace(QUIET, patience=None, max_steps=2 * -(-len(data.given) // 32))
    whole, first, second = lora(), lora(), lora()
    train(whole, data, options)
    train(first, data, replace(options, max_steps=options.max_steps // 2), output_dir=tmp_path)
    train(second, data, options, output_dir=tmp_path)
    assert same(second, whole)
    assert not same(first, whole)


def test_seconds_to_best_are_those_until_the_best_epoch(data: CityData) -> None:
    result = train(lstm(), data, replace(QUIET, max_epochs=3))
    assert 0 < result.seconds_to_best < result.seconds


def test_train_of_an_adapter_changes_the_adapter_only(data: CityData) -> None:
    model, start = lora(), lora()
    train(model, data, QUIET)
    before, after = start.state_dict(), model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_train_keeps_the_statistics_of_a_frozen_norm(data: CityData) -> None:
    model = Normed()
    start = copy.deepcopy(model)
    assert train(model, data, QUIET).best_epoch > 0
    assert same(model.frozen, start.frozen)
    assert not torch.equal(model.free.running_mean, start.free.running_mean)


@pytest.mark.parametrize("make", [lstm, lora])
def test_train_resumed_equals_uninterrupted(data: CityData, make: type[nn.Module], tmp_path: Path) -> None:
    whole, broken, resumed = make(), make(), make()
    options = TrainingOptions(max_epochs=3, patience=1, progress=False, learning_rate=3e-3)
    expected = train(whole, data, options)
    assert expected.best_epoch == 3  # so patience never runs out, unless resuming used some of it up
    train(broken, data, replace(options, max_epochs=1), output_dir=tmp_path)
    result = train(resumed, data, options, output_dir=tmp_path)
    assert same(whole, resumed)
    assert result.history == expected.history
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{3 * -(-len(data.train) // 32)}"]


def test_train_finished_before_is_not_trained_again(data: CityData, tmp_path: Path) -> None:
    first, again = lstm(), lstm()
    options = TrainingOptions(max_epochs=20, patience=1, progress=False, learning_rate=1e4)
    expected = train(first, data, options, output_dir=tmp_path)
    steps: list[str] = sorted(path.name for path in tmp_path.iterdir())
    result = train(again, data, options, output_dir=tmp_path)
    assert (result.history, result.epochs) == (expected.history, 1)
    assert same(first, again)
    assert sorted(path.name for path in tmp_path.iterdir()) == steps


def test_train_from_the_checkpoint_of_another_training_raises(data: CityData, tmp_path: Path) -> None:
    train(lstm(), data, QUIET, output_dir=tmp_path)
    with pytest.raises(ValueError, match="belongs to another training") as error:
        train(lstm(), data, TrainingOptions(max_epochs=3, progress=False, learning_rate=1e-3), output_dir=tmp_path)
    lines = str(error.value).splitlines()
    assert lines[1] == "  expected: the same model, city and options as when it was written"
    assert lines[2] == "  got:      other options (learning_rate 0.003 -> 0.001)"
    assert lines[3] == "  to fix:   give another output folder, or delete this one to start again"


def test_train_without_output_dir_writes_nothing(
    data: CityData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(lstm(), data, QUIET)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("progress", "shows"), [(True, True), (False, False)])
def test_train_prints_one_bar_or_nothing(
    data: CityData, progress: bool, shows: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    train(lstm(), data, TrainingOptions(max_epochs=1, progress=progress))
    out, err = capfd.readouterr()
    assert out == ""
    assert ("validation MAE" in err) is shows
    assert shows or err == ""
    assert "{" not in err


def test_train_in_bf16_leaves_a_model_that_can_be_copied(data: CityData) -> None:
    model = lora()
    result = train(model, data, TrainingOptions(max_epochs=2, progress=False, mixed_precision="bf16"))
    assert result.best_epoch > 0
    assert "forward" not in vars(model)
    assert same(copy.deepcopy(model), model)


def test_train_in_bf16_is_in_bf16_where_the_backbone_was_trained_before(data: CityData) -> None:
    options = replace(QUIET, patience=None, max_steps=3, mixed_precision="bf16")
    fresh, again = lora(), lora()
    backbone = again.get_base_model()
    train(backbone.requires_grad_(True), data, replace(options, mixed_precision="no"))
    again.load_state_dict(fresh.state_dict())
    for name, parameter in again.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert "_is_accelerate_prepared" not in vars(backbone)
    assert train(again, data, options).history == train(fresh, data, options).history
    assert same(again, fresh)
    backbone._is_accelerate_prepared = True  # as after a loop of the user's own, on accelerate
    again, fresh = copy.deepcopy(again), copy.deepcopy(fresh)
    assert train(again, data, options).history == train(fresh, data, options).history


def test_train_with_foreign_data_raises_before_any_change(data: CityData) -> None:
    model = build_backbone("lstm", in_channels=3, hidden_size=4, window=6)
    start = copy.deepcopy(model)
    with pytest.raises(ValueError, match="expected: window=6\n  got:      window=12"):
        train(model, data, QUIET)
    assert same(model, start)


def test_train_of_a_frozen_model_raises(data: CityData) -> None:
    with pytest.raises(ValueError, match="nothing to train") as error:
        train(lstm().requires_grad_(False), data, QUIET)
    assert str(error.value).splitlines() == [
        "nothing to train.",
        "  expected: at least one parameter that requires gradients",
        "  got:      a model whose parameters are all frozen",
        "  to fix:   add an adapter with get_peft_model, or call requires_grad_(True) on what shall be trained",
    ]


def test_train_without_a_validation_truth_raises() -> None:
    data = small_data(small_city())
    data.val.targets[min(data.val.starts) :] = torch.nan
    with pytest.raises(ValueError, match="no validation window of city 'small' has a truth to compare with"):
        train(lstm(), data, QUIET)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", 0.0, "learning_rate > 0"),
        ("weight_decay", -0.1, "weight_decay >= 0"),
        ("max_epochs", 0, "max_epochs >= 1"),
        ("patience", 0, "patience >= 1, or None"),
        ("max_steps", 0, "max_steps >= 1, or None"),
        ("batch_size", 0, "batch_size >= 1"),
        ("eval_batch_size", 0, "eval_batch_size >= 1"),
        ("max_grad_norm", -1.0, "max_grad_norm >= 0"),
        ("ema_decay", 1.0, "0 <= ema_decay < 1"),
        ("ema_decay", -0.1, "0 <= ema_decay < 1"),
        ("seed", -1, "seed >= 0"),
        ("mixed_precision", "int8", "'no', 'bf16' or 'fp16'"),
    ],
)
def test_options_out_of_range_raise(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match="out of range") as error:
        TrainingOptions(**{name: value})
    assert str(error.value).splitlines() == [
        f"training option '{name}' is out of range.",
        f"  expected: {expected}",
        f"  got:      {name} = {value!r}",
        f"  to fix:   give another {name}",
    ]
