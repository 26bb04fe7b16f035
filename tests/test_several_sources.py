"""One backbone trained on several cities: each batch is one city's, and so is what is bound to its nodes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from small_city import small_city, small_data
from torch import Tensor, nn
from toys import small_backbone
from transformers import TrainerCallback
from typer.testing import CliRunner

import stlora_peft.cli as cli
import stlora_peft.sources as sources
from stlora_peft import STLoraConfig, node_subset, rebuild
from stlora_peft.backbones import new_backbone
from stlora_peft.data import CityData, load_city, prepare, pretraining_split
from stlora_peft.evaluation import evaluate
from stlora_peft.sampling import PartBatches, city_parts
from stlora_peft.sampling.sources import SourceBatches, SourcesTrainer
from stlora_peft.sources import backbone_of, described, in_deviations, nodes_of
from stlora_peft.storage import load_backbone, save_backbone
from stlora_peft.training import TrainingOptions, train
from stlora_peft.tuner.subset import node_tensors

SIZES = [3, 5]
N = sum(SIZES)
OPTIONS = TrainingOptions(max_epochs=2, progress=False, learning_rate=3e-3, batch_size=32, max_grad_norm=0.0)


@pytest.fixture(scope="module")
def first() -> CityData:
    return small_data(small_city(SIZES[0], 10, seed=1, name="first"), days=4)


@pytest.fixture(scope="module")
def second() -> CityData:
    return small_data(small_city(SIZES[1], 8, seed=2, name="second"), days=3)


def backbone(name: str = "stgcn", num_nodes: int = N, **options: Any) -> nn.Module:
    return small_backbone(name, num_nodes, window=12, horizon=12, **options)


def scaled_loss(model: nn.Module, data: CityData) -> Tensor:
    """Masked mean absolute error over all training windows, in standard deviations, in the model's dtype."""
    dtype = next(model.parameters()).dtype
    batch = data.train.__getitems__(list(range(len(data.train))))
    forecast = model(batch["x"].to(dtype), data.edge_index, data.edge_weight.to(dtype))
    truth = (batch["y"].double() - data.scaler.mean[0]) / data.scaler.std[0]
    seen = truth.isfinite()
    return (forecast[seen] - truth[seen]).abs().sum() / seen.sum()


class Gradients(TrainerCallback):
    """Keeps the gradients of every step, and which city it was of."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {name: parameter.grad for name, parameter in kwargs["model"].named_parameters()}
        self.steps.append({name: grad.to_dense().clone() for name, grad in found.items() if grad is not None})


def order_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that fills with the city of each batch that is trained on."""
    found: list[int] = []
    own = SourcesTrainer._forecast_batch

    def spy(self: SourcesTrainer, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        found.append(int(inputs["part"]))
        return own(self, model, inputs)

    monkeypatch.setattr(SourcesTrainer, "_forecast_batch", spy)
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# Batches and gradients ----------------------------------------------------------------------------------------------


def test_a_pass_meets_every_window_of_every_city_once(first: CityData, second: CityData) -> None:
    cities = [PartBatches(one.train, city_parts(one, 9, 0), batch_size=20, seed=3) for one in (first, second)]
    batches = SourceBatches(cities, [1, 1])
    assert len(batches) == sum(-(-len(one.train) // 20) for one in (first, second))
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        items = [batches.__getitems__([index]) for index in range(len(batches))]
        for number, one in enumerate((first, second)):
            own = [item for item in items if int(item["part"]) == number]
            assert sorted(torch.cat([item["start"] for item in own]).tolist()) == one.train.starts.tolist()
            assert all(item["x"].shape[2] == SIZES[number] for item in own)
        orders.append([item["start"].tolist() for item in items])
    assert orders[0] == orders[2] != orders[1]
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("name", ["lstm", "stgcn", "gwnet", "staeformer"])
def test_gradients_of_a_batch_are_those_of_its_city_alone(
    first: CityData, second: CityData, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = {"dropout": 0.0} if name in ("gwnet", "staeformer") else {}
    model, cities, order = backbone(name, **still), [first, second], order_of(monkeypatch)
    start, gradients = copy.deepcopy(model), Gradients()
    train(model, cities, replace(OPTIONS, max_epochs=1, batch_size=999, learning_rate=1e-12), callbacks=[gradients])
    assert sorted(order) == [0, 1]
    axes = {tensor.value.data_ptr(): tensor.axis for tensor in node_tensors(start)}
    parameters = dict(start.named_parameters())
    for number, found in zip(order, gradients.steps, strict=True):
        alone = backbone_of(start, SIZES, number).train()
        if name != "staeformer":  # it finds a step's place in the day by rounding, another one in float64
            alone = alone.double()
        scaled_loss(alone, cities[number]).backward()
        for key, parameter in alone.named_parameters():
            if parameter.grad is None:
                assert key not in found or not found[key].any()
                continue
            expected = parameter.grad
            axis = axes.get(parameters[key].data_ptr())
            if axis is not None:
                whole = torch.zeros(parameters[key].shape, dtype=expected.dtype)
                expected = whole.index_copy(axis, nodes_of(SIZES, number), expected)
            torch.testing.assert_close(found[key].to(expected), expected, rtol=2e-3, atol=1e-6, msg=f"{number} {key}")


def test_a_step_moves_the_rows_of_its_own_city_alone(
    first: CityData, second: CityData, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, order = backbone(), order_of(monkeypatch)
    before = [tensor.value.detach().clone() for tensor in node_tensors(model)]
    train(model, [first, second], replace(OPTIONS, patience=None, max_steps=1))
    own = torch.isin(torch.arange(N), nodes_of(SIZES, order[0]))
    for tensor, old in zip(node_tensors(model), before, strict=True):
        assert (tensor.value != old).tolist() == own.tolist(), tensor.what


def test_what_is_bound_to_the_nodes_learns_of_every_city(first: CityData, second: CityData) -> None:
    model = backbone()
    before = [tensor.value.detach().clone() for tensor in node_tensors(model)]
    result = train(model, [first, second], replace(OPTIONS, learning_rate=1e-2))
    assert result.best_val_mae < result.history[0]["val_mae"]
    assert all((tensor.value != old).all() for tensor, old in zip(node_tensors(model), before, strict=True))


def test_an_adapter_trains_on_several_cities(first: CityData, second: CityData) -> None:
    torch.manual_seed(0)
    model = get_peft_model(backbone(), STLoraConfig(num_nodes=N, conditioning="gate", r=2, lora_dropout=0.0))
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    result = train(model, [first, second], replace(OPTIONS, learning_rate=1e-2))
    assert result.best_val_mae < result.history[0]["val_mae"]
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)


# The whole training -------------------------------------------------------------------------------------------------


def test_a_list_of_one_city_trains_as_the_city(first: CityData) -> None:
    one, other = backbone(num_nodes=SIZES[0]), backbone(num_nodes=SIZES[0])
    assert train(one, [first], OPTIONS).history == train(other, first, OPTIONS).history
    assert same(one, other)


def test_a_city_twice_trains_as_twice_as_long_on_it(first: CityData) -> None:
    """One batch a pass, so that the order of the windows is none; ``lstm`` has nothing that is bound to a node."""
    options = replace(OPTIONS, batch_size=999, weight_decay=0.1, max_grad_norm=0.3)
    twice, once = backbone("lstm"), backbone("lstm")
    found = train(twice, [first, first], options)
    expected = train(once, in_deviations(first), replace(options, max_epochs=4))
    assert [line["val_mae"] for line in found.history] == pytest.approx(
        [line["val_mae"] for line in expected.history[::2]], rel=1e-5
    )
    for one, other in zip(twice.state_dict().values(), once.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_unit_of_a_city_does_not_matter(first: CityData, second: CityData) -> None:
    city = replace(second.city, values=1024 * second.city.values)
    larger = prepare(city, second.split, window=12, horizon=12)
    one, other = backbone(), backbone()
    found, expected = (train(model, [first, data], OPTIONS) for model, data in ((one, larger), (other, second)))
    assert found.best_val_mae == pytest.approx(expected.best_val_mae, rel=1e-5)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_validation_is_the_mean_over_the_cities_in_deviations(first: CityData, second: CityData) -> None:
    model, cities = backbone(), [first, second]
    start = copy.deepcopy(model)
    errors = [
        evaluate(backbone_of(start, SIZES, number), data.val, data).mae / data.scaler.std[0]
        for number, data in enumerate(cities)
    ]
    assert train(model, cities, OPTIONS).history[0]["val_mae"] == pytest.approx(sum(errors) / 2, rel=1e-5)


def test_the_batches_of_the_cities_are_mixed_by_the_seed(
    first: CityData, second: CityData, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, models, orders = order_of(monkeypatch), [], []
    for seed in (0, 0, 1):
        models.append(backbone("lstm"))
        train(models[-1], [first, second], replace(OPTIONS, batch_size=8, seed=seed, patience=None))
        orders.append(order.copy())
        order.clear()
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    half = len(orders[0]) // 2
    assert sorted(orders[0][:half]) == sorted(orders[0][half:])
    assert orders[0][:half] != orders[0][half:]
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_resumed_equals_uninterrupted(first: CityData, second: CityData, tmp_path: Path) -> None:
    whole, broken, resumed = (backbone() for _ in range(3))
    expected = train(whole, [first, second], OPTIONS)
    train(broken, [first, second], replace(OPTIONS, max_epochs=1), output_dir=tmp_path)
    result = train(resumed, [first, second], OPTIONS, output_dir=tmp_path)
    assert result.history == expected.history
    assert same(resumed, whole)
    with pytest.raises(ValueError, match="belongs to another training") as error:
        train(backbone(), [second, first], OPTIONS, output_dir=tmp_path)
    assert str(error.value).splitlines()[2] == "  got:      other city, scaler"


def test_parts_as_large_as_the_cities_change_nothing_and_smaller_ones_little(
    first: CityData, second: CityData
) -> None:
    whole, large, small = (backbone() for _ in range(3))
    expected = train(whole, [first, second], OPTIONS)
    assert train(large, [first, second], replace(OPTIONS, nodes_per_step=9)).history == expected.history
    assert same(large, whole)
    found = train(small, [first, second], replace(OPTIONS, nodes_per_step=2, hops=5, max_epochs=1))
    assert found.history[0]["val_mae"] == pytest.approx(expected.history[0]["val_mae"], rel=1e-5)
    assert found.best_val_mae < found.history[0]["val_mae"]


# The backbone afterwards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "stgcn", "agcrn", "staeformer"])
@pytest.mark.parametrize("number", [0, 1])
def test_the_backbone_of_one_city_forecasts_with_its_own_rows(
    first: CityData, second: CityData, name: str, number: int
) -> None:
    data, model = (first, second)[number], backbone(name).eval()
    own = backbone_of(model, SIZES, number)
    x = data.train.inputs(data.train.starts[:2])
    with torch.no_grad(), node_subset(model, nodes_of(SIZES, number)):
        expected = model(x, data.edge_index, data.edge_weight)
    with torch.no_grad():
        assert torch.equal(own(x, data.edge_index, data.edge_weight), expected)


def test_a_new_city_gets_the_mean_over_the_nodes_of_all_cities() -> None:
    model = backbone()
    new = rebuild(model, 6)
    norm, rebuilt = model.block1._batch_norm, new.block1._batch_norm
    torch.testing.assert_close(rebuilt.weight, norm.weight.mean().expand(6))


def test_new_backbone_counts_the_nodes_of_all_cities(first: CityData, second: CityData) -> None:
    assert new_backbone("stgcn", [first, second], seed=0).hyperparameters["num_nodes"] == N
    assert same(new_backbone("stgcn", [first], seed=0), new_backbone("stgcn", first, seed=0))


def test_a_saved_backbone_knows_all_its_cities(first: CityData, second: CityData, tmp_path: Path) -> None:
    flow = replace(second, city=replace(second.city, quantity="flow"))
    save_backbone(tmp_path / "two", backbone(), **described([first, flow]))
    found = load_backbone(tmp_path / "two")
    assert (found.city, found.quantity, found.scaler) == ("first + second", "speed + flow", first.scaler)
    assert [(one.city, one.quantity, one.num_nodes) for one in found.sources] == [
        ("first", "speed", 3),
        ("second", "flow", 5),
    ]
    assert [one.scaler for one in found.sources] == [first.scaler, second.scaler]
    save_backbone(tmp_path / "one", backbone(), **described([first]))
    assert load_backbone(tmp_path / "one").sources == ()
    assert "sources" not in json.loads((tmp_path / "one" / "backbone.json").read_text())


# Refusals -----------------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, cities: list[CityData]) -> list[str]:
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="expected:") as error:
        train(model, cities, OPTIONS)
    assert same(model, before)
    return str(error.value).splitlines()


FIX = "  to fix:   prepare all cities with the same window, horizon and time_features, and give the same channels at "


@pytest.mark.parametrize(
    ("other", "expected", "got"),
    [
        ({"window": 9}, "window=12", "window=9"),
        (
            {"horizon": 6, "time_features": "none"},
            "horizon=12, time_features='day'",
            "horizon=6, time_features='none'",
        ),
    ],
)
def test_cities_cut_otherwise_are_refused(
    first: CityData, second: CityData, other: dict[str, Any], expected: str, got: str
) -> None:
    changed = prepare(second.city, second.split, **{"window": 12, "horizon": 12, **other})
    assert refusal(backbone(), [first, changed]) == [
        "cities 'first' and 'second' cannot be trained on together.",
        f"  expected: {expected}, as 'first' has",
        f"  got:      {got}",
        FIX + "the same interval",
    ]


def test_other_channels_and_another_interval_are_refused(first: CityData, second: CityData) -> None:
    city = replace(second.city, values=second.city.values.repeat(2, axis=2), interval_minutes=30)
    lines = refusal(backbone(), [first, prepare(city, second.split, 12, 12)])
    assert lines[1:3] == [
        "  expected: channels=1, interval_minutes=60, as 'first' has",
        "  got:      channels=2, interval_minutes=30",
    ]


def test_a_city_without_a_clock_is_refused_where_the_clock_is_read(first: CityData, second: CityData) -> None:
    blind = prepare(replace(second.city, start=None), second.split, 12, 12)
    assert refusal(backbone(), [first, blind]) == [
        "city 'second' has no clock, so it cannot be trained on together with others.",
        "  expected: the time of the first step in every city, for time_features='day'",
        "  got:      start=None in 'second'",
        "  to fix:   give the time with City(start=...) or 'stlora convert --start', or take time_features='none'",
    ]
    timeless = [prepare(data.city, data.split, 12, 12, "none") for data in (first, blind)]
    assert train(backbone("lstm", in_channels=1), timeless, replace(OPTIONS, max_epochs=1)).epochs == 1


def test_a_backbone_of_one_city_is_refused(first: CityData, second: CityData) -> None:
    assert refusal(backbone(num_nodes=3), [first, second]) == [
        "the model is not bound to the nodes of all cities.",
        "  expected: N=8 nodes: 3 of 'first' and 5 of 'second', in this order",
        "  got:      N=3 in weight of 'block1._batch_norm'",
        "  to fix:   build it with new_backbone(name, [data, ...], seed=...), or take rebuild(backbone, 8)",
    ]


def test_numbers_of_pairs_of_nodes_are_refused_by_name(first: CityData, second: CityData) -> None:
    lines = refusal(backbone("astgcn"), [first, second])
    assert lines[0] == "node-bound module 'block1._temporal_attention' cannot be cut to some of the nodes."
    assert lines[1].startswith("  expected: nn.BatchNorm1d, ")
    assert lines[2].startswith("  got:      TemporalAttention, whose numbers belong to pairs of nodes")
    assert lines[3].startswith("  to fix:   train on the whole graph of one city, ")


def test_no_city_is_refused() -> None:
    assert refusal(backbone(), []) == [
        "there is nothing to train on.",
        "  expected: a city, or a list of at least one",
        "  got:      an empty list",
        "  to fix:   give what prepare(city, split) returns",
    ]


def test_several_processes_are_refused(first: CityData, second: CityData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "process_count", lambda: 2)
    assert refusal(backbone(), [first, second]) == [
        "several cities cannot be trained by several processes.",
        "  expected: one process where there is more than one city",
        "  got:      2 processes, 2 cities",
        "  to fix:   start it without 'accelerate launch', or train on one city",
    ]
    sources.check_sources(backbone(num_nodes=3), [first])


# The commands -------------------------------------------------------------------------------------------------------


def answer(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [*map(str, words), "--json"], prog_name="stlora")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three cities, and a backbone of two of them."""
    folder = tmp_path_factory.mktemp("work")
    for seed, (name, size) in enumerate({"ara": 3, "bor": 4, "cim": 5}.items()):
        small_city(size, 10, seed=seed, name=name).save(folder / f"{name}.npz")
    cities = [folder / "ara.npz", folder / "bor.npz"]
    quick = ["--width", 4, "--epochs", 1, "--batch-size", 64]
    return folder, answer("pretrain", *cities, "--out", folder / "base", *quick)


def test_pretrain_on_two_cities_measures_each_at_home(work: tuple[Path, dict[str, Any]]) -> None:
    folder, found = work
    assert (found["city"], found["quantity"]) == ("ara + bor", "speed")
    assert [(one["city"], one["num_nodes"]) for one in found["sources"]] == [("ara", 3), ("bor", 4)]
    assert not (folder / "base.unfinished").exists()
    for one in found["sources"]:
        again = answer("evaluate", folder / f"{one['city']}.npz", "--base", folder / "base")
        assert again["test"]["backbone alone"] == one["test"]["stgcn"]
        assert again["test"]["persistence"] == one["test"]["persistence"]


def test_a_backbone_of_two_cities_is_that_of_python(work: tuple[Path, dict[str, Any]]) -> None:
    folder, found = work
    cities = [load_city(folder / f"{name}.npz") for name in ("ara", "bor")]
    prepared = [prepare(city, pretraining_split(city.num_steps), 12, 12) for city in cities]
    model = new_backbone("stgcn", prepared, seed=0, hidden_channels=4)
    result = train(model, prepared, TrainingOptions(max_epochs=1, batch_size=64, progress=False))
    assert found["training"]["best_val_mae"] == result.best_val_mae
    assert same(model, load_backbone(folder / "base").backbone)


def test_a_third_city_is_adapted_and_forecast(work: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = work
    brief = ["--epochs", 1, "--batch-size", 64, "--refit-steps", 2]
    loaded = [folder / "cim.npz", "--base", folder / "base"]
    answer("adapt", *loaded, "--days", 4, "--out", folder / "adapter", *brief)
    errors = answer("evaluate", *loaded, "--adapter", folder / "adapter")["test"]
    assert set(errors) == {"persistence", "backbone alone", "with adapter"}
    assert answer("forecast", *loaded, "--adapter", folder / "adapter", "--out", folder / "cim.csv")["num_nodes"] == 5
    found = answer("compare", *loaded, "--days", 4, "--methods", "zero-shot", "--seeds", 0, "--out", folder / "rows")
    assert found["rows"][0]["mae"] > 0
    assert "stgcn of ara + bor, fingerprint" in (folder / "rows" / "results.md").read_text()


def test_options_of_one_city_are_refused_for_several(work: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = work
    words = ["pretrain", folder / "ara.npz", folder / "bor.npz", "--out", folder / "new", "--graph", "graph.csv"]
    result = CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="stlora")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "Error: option '--graph' belongs to one city.",
        "  expected: 2 files that hold everything about their cities",
        "  got:      --graph",
        "  to fix:   make such a file of each city first: stlora convert CITY --graph ... --out CITY.npz",
    ]


def test_options_of_all_cities_are_taken_for_each(work: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = work
    words = [folder / "ara.npz", folder / "bor.npz", "--width", 4, "--epochs", 1, "--quantity", "m/s"]
    found = answer("pretrain", *words, "--out", tmp_path / "base", "--zeros-missing", "--backbone", "lstm")
    assert [one["quantity"] for one in found["sources"]] == ["m/s", "m/s"]
