import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from small_city import small_city

from stlora_peft import measurement
from stlora_peft.backbones import build_backbone
from stlora_peft.baselines import BASELINES
from stlora_peft.comparison import adaptation_data, compare
from stlora_peft.data import CityData, Scaler
from stlora_peft.evaluation import evaluate
from stlora_peft.measurement import Row, adapter_bytes
from stlora_peft.methods import METHODS, Candidate, build_adapter
from stlora_peft.storage import SavedBackbone, load_backbone, save_backbone
from stlora_peft.training import TrainingOptions, train

OPTIONS = TrainingOptions(max_epochs=2, progress=False)
STEPS = {"refit_steps": 5}
CITY = small_city(num_nodes=5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedBackbone:
    torch.manual_seed(0)
    backbone = build_backbone("stgcn", num_nodes=3, in_channels=3, hidden_channels=4, head_channels=4)
    folder = tmp_path_factory.mktemp("base")
    save_backbone(folder, backbone, scaler=Scaler(mean=(50.0,), std=(9.0,)), city="source")
    return load_backbone(folder)


@pytest.fixture(scope="module")
def rows(saved: SavedBackbone) -> dict[str, Row]:
    rates = (1e-3, 1e-2)
    methods = [name for name in METHODS if not name.startswith("st-lora-")]
    found = compare(saved, CITY, days=8, methods=methods, seeds=[1], options=OPTIONS, learning_rates=rates, **STEPS)
    return {row["method"]: row for row in found}


def test_compare_gives_a_row_of_every_method_that_json_can_hold(rows: dict[str, Row]) -> None:
    assert list(rows) == [name for name in METHODS if not name.startswith("st-lora-")]
    for row in rows.values():
        assert (row["days"], row["seed"]) == (8, 1)
        assert set(row["horizons"]) == {"3", "6", "12", "average"}
        assert row["horizons"]["average"] == {name: row[name] for name in ("mae", "rmse", "mape")}
        assert row["settings"] == rows["full"]["settings"]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_compare_trained_methods_take_a_rate_of_the_grid_and_validate_no_worse_than_the_start(
    rows: dict[str, Row], saved: SavedBackbone
) -> None:
    data = adaptation_data(saved, CITY, 8)
    start = evaluate(METHODS["full"].build(saved.backbone, data).model, data.val, data).mae
    for name in ("head", "full", "lora", "st-lora"):
        row = rows[name]
        assert row["learning_rate"] in (1e-3, 1e-2)
        assert row["best_val_mae"] <= start * (1 + 1e-5)
        assert 0 < row["seconds"] < row["search_seconds"]
        assert 0 < row["trainable_parameters"] <= row["total_parameters"]
        assert row["adapter_bytes"] > 4 * row["trainable_parameters"]


def test_compare_untrained_methods_store_and_train_nothing(rows: dict[str, Row], saved: SavedBackbone) -> None:
    for name in ("zero-shot", "persistence", "ha", "var", "svr"):
        row = rows[name]
        assert (row["trainable_parameters"], row["adapter_bytes"], row["seconds"]) == (0, 0, 0.0)
        assert row["learning_rate"] is None
    data = adaptation_data(saved, CITY, 8)
    model = METHODS["zero-shot"].build(saved.backbone, data).model
    assert rows["zero-shot"]["mae"] == evaluate(model, data.test, data).mae
    assert rows["persistence"]["total_parameters"] == 0
    assert rows["zero-shot+"]["adapter_bytes"] > 4 * 1000
    assert rows["zero-shot+"]["mae"] < 0.9 * rows["zero-shot"]["mae"]
    again = compare(saved, CITY, days=8, methods=["zero-shot+"], seeds=[2], options=OPTIONS, learning_rates=[1e-3])
    assert again[0]["mae"] == rows["zero-shot+"]["mae"]


@pytest.mark.parametrize("name", ["ha", "var", "svr"])
def test_compare_measures_a_baseline_that_is_fitted_on_the_given_days(
    rows: dict[str, Row], saved: SavedBackbone, name: str
) -> None:
    data = adaptation_data(saved, CITY, 8)
    baseline = BASELINES[name].fit(data)
    truth = data.test.__getitems__(list(range(len(data.test))))["y"]
    error = (baseline.forecast(data.test, torch.arange(len(data.test))) - truth).abs()
    assert rows[name]["mae"] == pytest.approx(error[truth.isfinite()].mean().item(), rel=1e-5)
    assert rows[name]["implementation"] == baseline.description
    assert rows[name]["best_val_mae"] is None


def test_compare_without_the_packages_of_a_baseline_raises_before_any_work(
    saved: SavedBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="SupportVectorRegression needs a package that is not installed"):
        compare(saved, CITY, days=8, methods=["full", "svr"], options=OPTIONS, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_compare_is_repeatable_whatever_ran_before_and_seeds_differ(saved: SavedBackbone) -> None:
    def run(methods: list[str], seeds: list[int]) -> list[Row]:
        return compare(
            saved, CITY, days=8, methods=methods, seeds=seeds, options=OPTIONS, learning_rates=[1e-2], refit_steps=0
        )

    _, after_another_method = run(["head", "st-lora"], [1])
    other_seed, after_another_seed = run(["st-lora"], [2, 1])
    for key in ("mae", "rmse", "mape", "best_val_mae", "best_epoch"):
        assert after_another_method[key] == after_another_seed[key]
    assert other_seed["mae"] != after_another_seed["mae"]


def test_compare_chooses_the_rate_on_validation_data(saved: SavedBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []
    real = measurement.evaluate

    def spy(model: torch.nn.Module, windows: object, data: object, **kwargs: int) -> object:
        parts.append("test" if windows is data.test else "other")  # type: ignore[attr-defined]
        return real(model, windows, data, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(measurement, "evaluate", spy)
    rates = (1e-4, 1e-2)
    plan = {"days": 8, "methods": ["head"], "seeds": [0], "options": OPTIONS, "refit_steps": 0}
    (row,) = compare(saved, CITY, **plan, learning_rates=rates)
    alone = [compare(saved, CITY, **plan, learning_rates=[rate])[0] for rate in rates]
    best = min(alone, key=lambda one: one["best_val_mae"])
    assert (row["learning_rate"], row["mae"]) == (best["learning_rate"], best["mae"])
    assert parts == ["test"] * 3  # once for each comparison, whatever the grid


def test_compare_tests_a_model_that_was_trained_anew_on_all_given_days_with_the_rate_that_validated_best(
    saved: SavedBackbone,
) -> None:
    plan = {"days": 8, "methods": ["st-lora"], "seeds": [3], "options": OPTIONS, "learning_rates": (1e-4, 1e-2)}
    (chosen,) = compare(saved, CITY, **plan, refit_steps=0)
    (row,) = compare(saved, CITY, **plan, refit_steps=7)
    for key in ("learning_rate", "best_val_mae", "best_epoch"):
        assert row[key] == chosen[key]
    assert row["search_seconds"] > chosen["search_seconds"] - chosen["seconds"]

    data = adaptation_data(saved, CITY, 8)
    assert len(data.given) > len(data.train) + len(data.val)
    torch.manual_seed(3)
    model = METHODS["st-lora"].build(saved.backbone, data).model
    how = replace(OPTIONS, learning_rate=row["learning_rate"], seed=3, patience=None, max_steps=7)
    train(model, data, how)
    assert evaluate(model, data.test, data).mae == row["mae"] != chosen["mae"]


def test_compare_searches_with_the_first_seed_and_takes_its_rate_with_the_others(saved: SavedBackbone) -> None:
    plan = {"days": 8, "methods": ["head"], "options": OPTIONS, "learning_rates": (1e-4, 1e-2), **STEPS}
    first, second = compare(saved, CITY, **plan, seeds=[3, 1])
    assert second["learning_rate"] == first["learning_rate"]
    assert first["best_val_mae"] is not None
    assert second["best_val_mae"] is None
    alone = compare(saved, CITY, **{**plan, "learning_rates": [first["learning_rate"]]}, seeds=[1])[0]
    assert second["mae"] == alone["mae"]


def test_compare_with_one_rate_trains_once_and_validates_nothing(saved: SavedBackbone) -> None:
    plan = {"days": 8, "methods": ["head"], "seeds": [0], "options": OPTIONS, "learning_rates": [1e-2]}
    (row,) = compare(saved, CITY, **plan, **STEPS)
    assert (row["best_val_mae"], row["best_epoch"], row["seconds_to_best"]) == (None, None, None)
    assert row["seconds"] == row["search_seconds"] > 0


def test_compare_rows_hold_the_errors_of_every_day(rows: dict[str, Row]) -> None:
    for row in rows.values():
        sums, counts = (sum(day[i] for day in row["daily"]) for i in (1, 2))
        assert sums / counts == pytest.approx(row["mae"], rel=1e-6)


def test_compare_resumes_and_writes_after_every_row(
    saved: SavedBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(methods: list[str], seeds: list[int]) -> list[Row]:
        return compare(
            saved,
            CITY,
            days=8,
            methods=methods,
            seeds=seeds,
            options=replace(OPTIONS, max_epochs=1),
            learning_rates=[1e-3],
            output_dir=tmp_path,
            **STEPS,
        )

    first = run(["zero-shot", "head"], [0])
    assert json.loads((tmp_path / "results.json").read_text()) == first
    trained: list[int] = []
    real = measurement.train

    def spy(model: torch.nn.Module, data: object, options: TrainingOptions, **kwargs: object) -> object:
        trained.append(options.seed)
        if options.seed == 2:
            raise KeyboardInterrupt
        return real(model, data, options, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(measurement, "train", spy)
    with pytest.raises(KeyboardInterrupt):
        run(["head"], [0, 1, 2])
    assert trained == [1, 2]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [(row["method"], row["seed"]) for row in stored] == [("zero-shot", 0), ("head", 0), ("head", 1)]
    assert run(["zero-shot", "head"], [0]) == first
    assert trained == [1, 2]


def test_compare_takes_known_rows_of_the_same_settings_and_recipe_and_no_others(
    saved: SavedBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"days": 8, "options": replace(OPTIONS, max_epochs=1), "learning_rates": [1e-3], **STEPS}
    measured = compare(saved, CITY, methods=["zero-shot", "head", "norm"], seeds=[0], **options)
    zero_shot, head, norm = ({**row, "mae": 1000.0 + number} for number, row in enumerate(measured))
    known = [zero_shot, head | {"recipe": "another"}, norm | {"settings": "others"}, norm | {"days": 4}]
    monkeypatch.setattr(measurement, "train", spy := Mock(wraps=measurement.train))
    found = compare(saved, CITY, methods=["head", "norm"], seeds=[0], known=known, output_dir=tmp_path, **options)
    assert [row["mae"] for row in found] == [row["mae"] for row in measured[1:]]
    assert spy.call_count == 2
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept == found
    again = compare(saved, CITY, methods=["head"], seeds=[0], known=[head], **options)
    assert again == [head]
    assert spy.call_count == 2


def test_compare_into_results_of_other_settings_raises(saved: SavedBackbone, tmp_path: Path) -> None:
    compare(saved, CITY, days=8, methods=["zero-shot"], seeds=[0], options=OPTIONS, output_dir=tmp_path)
    other = replace(OPTIONS, max_epochs=3)
    with pytest.raises(ValueError, match="cannot be continued") as error:
        compare(saved, CITY, days=8, methods=["zero-shot"], seeds=[0], options=other, output_dir=tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"results '{tmp_path / 'results.json'}' cannot be continued."
    assert lines[1].startswith("  expected: rows of the settings ")
    assert lines[2].startswith("  got:      rows of ")
    assert lines[3] == "  to fix:   give another output folder, or delete the file to measure everything again"


@pytest.mark.parametrize("change", [{"start": None}, {"interval_minutes": 30}], ids=["start", "interval"])
def test_compare_into_results_of_another_clock_raises(
    saved: SavedBackbone, tmp_path: Path, change: dict[str, int | None]
) -> None:
    compare(saved, CITY, days=8, methods=["zero-shot"], seeds=[0], options=OPTIONS, output_dir=tmp_path)
    other = replace(CITY, **change)
    days = 8 * CITY.steps_per_day / other.steps_per_day  # the same steps
    with pytest.raises(ValueError, match="cannot be continued"):
        compare(saved, other, days=days, methods=["zero-shot"], seeds=[0], options=OPTIONS, output_dir=tmp_path)


def test_compare_into_results_of_another_recipe_of_the_method_raises(
    saved: SavedBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*names: str) -> list[Row]:
        plan = {"days": 8, "seeds": [0], "options": OPTIONS, "learning_rates": [1e-3], **STEPS}
        return compare(saved, CITY, methods=names, **plan, output_dir=tmp_path)

    rows = run("head", "lora")
    before = (tmp_path / "results.json").read_bytes()

    def smaller(backbone: torch.nn.Module, data: CityData) -> Candidate:
        return Candidate(
            build_adapter(backbone, data, conditioning="shared", predictor=None, lora_dropout=0.0, r=2), "rank 2"
        )

    monkeypatch.setitem(METHODS, "lora", replace(METHODS["lora"], build=smaller))
    assert run("head") == rows[:1]  # what changed does not concern it
    with pytest.raises(ValueError, match="cannot be continued") as error:
        run("head", "lora")
    lines = str(error.value).splitlines()
    assert lines[0] == f"results '{tmp_path / 'results.json'}' cannot be continued."
    expected = "  expected: rows of 'lora' by the recipe "
    assert lines[1].startswith(expected)
    now = lines[1].removeprefix(expected).split(" ")[0]
    assert lines[1] == f"{expected}{now} (rank 2)"
    then = rows[1]["recipe"]
    assert now != then
    assert lines[2] == f"  got:      rows by {then} ({rows[1]['implementation']})"
    assert lines[3] == "  to fix:   give another output folder, or delete the file to measure everything again"
    assert (tmp_path / "results.json").read_bytes() == before


def test_compare_into_a_file_of_another_kind_raises(saved: SavedBackbone, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('[{"mae": 1.0}]')
    with pytest.raises(
        ValueError, match="a list of rows with the keys days, implementation, method, recipe, seed, settings"
    ):
        compare(saved, CITY, days=8, methods=["zero-shot"], seeds=[0], options=OPTIONS, output_dir=tmp_path)
    assert (tmp_path / "results.json").read_text() == '[{"mae": 1.0}]'


@pytest.mark.parametrize("name", ["seeds", "learning_rates"])
def test_compare_with_an_empty_list_raises(saved: SavedBackbone, name: str) -> None:
    arguments = {"seeds": [0], "learning_rates": [1e-3], name: []}
    with pytest.raises(ValueError, match=f"no {name} were given"):
        compare(saved, CITY, days=8, methods=["full"], **arguments)


def test_compare_shows_progress_on_standard_error(saved: SavedBackbone, capfd: pytest.CaptureFixture[str]) -> None:
    options = TrainingOptions(max_epochs=1, progress=True)
    (row,) = compare(saved, CITY, days=8, methods=["head"], seeds=[0], options=options, learning_rates=[1e-3], **STEPS)
    out, err = capfd.readouterr()
    assert out == ""
    assert "compare" in err
    assert f"head, seed 0: test MAE {row['mae']:.4g}" in err


def test_adapter_bytes_is_the_size_of_the_adapter_file(saved: SavedBackbone) -> None:
    data = adaptation_data(saved, CITY, 8)
    names = ("head", "full", "lora", "st-lora", "full+st-lora")
    sizes = {name: adapter_bytes(METHODS[name].build(saved.backbone, data).model) for name in names}
    assert sizes["full+st-lora"] > sizes["st-lora"] + 0.8 * sizes["full"]  # what trains with it is kept with it
    assert sizes["head"] < sizes["full"]
    assert sizes["lora"] < sizes["full"] + 10_000
