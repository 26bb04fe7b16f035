"""The paper's table: which trainings its rows come from, resuming, and the reports."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_city import small_city
from toys import raised

from stlora_peft.backbones import new_backbone
from stlora_peft.baselines import BASELINES
from stlora_peft.evaluation import evaluate
from stlora_peft.reports import Spread
from stlora_peft.storage import load_adapter, load_backbone
from stlora_peft.table import PAPER_BACKBONES, Plan, make_table, runs
from stlora_peft.table.figure import draw_table
from stlora_peft.table.reports import CityLabel, lines_of, write_latex, write_markdown
from stlora_peft.training import TrainingOptions

CITY, OTHER = (small_city(num_nodes=n, num_days=8, seed=n, name=name) for n, name in ((4, "here"), (3, "there")))
PLAN = Plan(
    backbones=("lstm", "stgcn"),
    baselines=("ha",),
    seeds=(0, 3),
    sizes={"lstm": {"hidden_size": 4}, "stgcn": {"hidden_channels": 4, "head_channels": 4}},
    time_features="day",
    stride=2,
    options=TrainingOptions(max_epochs=2, learning_rate=0.01, batch_size=16, progress=False),
)
LSTM = replace(PLAN, backbones=("lstm",), baselines=(), seeds=(0,))
Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    return make_table([CITY, OTHER], PLAN, folder)


def chosen(rows: list[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def errors_of(row: Row) -> Row:
    return {name: row[name] for name in ("mae", "rmse", "mape")}


# -- rows ---------------------------------------------------------------------------------------------------


def test_table_has_one_row_for_each_city_regime_model_and_seed(rows: list[Row], folder: Path) -> None:
    models = [("ha", False)] + [(name, plus) for name in ("lstm", "stgcn") for plus in (False, True)]
    longer = [("lstm-longer", False), ("stgcn-longer", False)]
    expected = {
        (city, regime, model, plus, seed)
        for city in ("here", "there")
        for regime in ("joint", "adapt")
        for model, plus in models + longer * (regime == "adapt")
        for seed in (0, 3)
    }
    found = [tuple(row[key] for key in ("city", "regime", "model", "stlora", "seed")) for row in rows]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert json.loads((folder / "results.json").read_text()) == rows
    for row in rows:
        assert all(list(row[name]) == ["3", "6", "12", "average"] for name in ("mae", "rmse", "mape"))


def test_backbone_alone_is_one_training_that_both_regimes_show(rows: list[Row]) -> None:
    for row in chosen(rows, regime="joint", model="lstm", stlora=False):
        (same,) = chosen(rows, regime="adapt", model="lstm", stlora=False, city=row["city"], seed=row["seed"])
        assert same == row | {"regime": "adapt"}


@pytest.mark.parametrize("name", ["lstm", "stgcn"])
def test_saved_backbone_and_adapter_give_the_rows_of_their_regime_again(
    rows: list[Row], folder: Path, name: str
) -> None:
    place, data = folder / "models" / "there" / f"{name}-seed3", PLAN.data(OTHER)
    backbone = load_backbone(place).backbone
    models = {False: backbone, True: load_adapter(backbone, place / "adapter", OTHER)}
    for plus, model in models.items():
        (row,) = chosen(rows, city="there", regime="adapt", model=name, stlora=plus, seed=3)
        assert evaluate(model, data.test, data).mae == pytest.approx(row["mae"]["average"], rel=1e-6)


def test_what_is_trained_in_each_regime(rows: list[Row]) -> None:
    for name in ("lstm", "stgcn"):
        (alone,) = chosen(rows, city="here", regime="joint", model=name, stlora=False, seed=0)
        (joint,) = chosen(rows, city="here", regime="joint", model=name, stlora=True, seed=0)
        (adapt,) = chosen(rows, city="here", regime="adapt", model=name, stlora=True, seed=0)
        (longer,) = chosen(rows, city="here", regime="adapt", model=f"{name}-longer", seed=0)
        assert alone["trainable_parameters"] == alone["parameters"] == longer["trainable_parameters"]
        bound = 2 * 2 * 4 if name == "stgcn" else 0  # the adapter's own copies train in their place
        assert joint["trainable_parameters"] == alone["parameters"] + adapt["trainable_parameters"] - bound
        assert adapt["parameters"] >= joint["trainable_parameters"]
        assert errors_of(joint) != errors_of(alone)


def test_control_takes_as_many_epochs_as_the_adapter_and_starts_from_the_trained_backbone(rows: list[Row]) -> None:
    for longer in chosen(rows, regime="adapt", model="lstm-longer"):
        same = {"city": longer["city"], "seed": longer["seed"], "model": "lstm"}
        (plus,) = chosen(rows, regime="adapt", stlora=True, **same)
        (alone,) = chosen(rows, regime="adapt", stlora=False, **same)
        assert longer["epochs"] == plus["epochs"]
        assert max(longer["best_val_mae"], plus["best_val_mae"]) <= alone["best_val_mae"] * (1 + 1e-6)


def test_adapter_that_gives_up_early_bounds_its_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watch_trainings(monkeypatch)
    plan = replace(LSTM, options=replace(LSTM.options, max_epochs=6, patience=1, learning_rate=1.0, ema_decay=0.0))
    (row,) = chosen(make_table([CITY], plan, tmp_path), model="lstm", regime="adapt", stlora=True)
    assert row["epochs"] < 6
    assert (asked[-1].max_epochs, asked[-1].patience) == (row["epochs"], row["epochs"])


def test_joint_starts_from_the_first_weights_of_the_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    real = runs.train

    def train(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        starts.append({name.replace("base_layer.", ""): value.clone() for name, value in model.state_dict().items()})
        return real(model, *args, **kwargs)

    monkeypatch.setattr(runs, "train", train)
    make_table([CITY], replace(LSTM, regimes=("joint",), seeds=(5,)), tmp_path)
    alone, joint = starts
    first = new_backbone("lstm", LSTM.data(CITY), seed=5, hidden_size=4).state_dict()
    for name, value in first.items():
        assert torch.equal(alone[name], value)
        assert torch.equal(joint[f"base_model.model.{name}"], value)


def test_baseline_is_fitted_once_on_the_training_part(rows: list[Row]) -> None:
    data = PLAN.data(CITY)
    assert data.split.given == data.split.train
    found = chosen(rows, city="here", model="ha")
    assert len(found) == 4
    assert all(errors_of(row) == errors_of(found[0]) for row in found)
    baseline = BASELINES["ha"].fit(data)
    error = (baseline.forecast(data.test, torch.arange(len(data.test))) - windows_truth(data.test)).abs()
    assert found[0]["mae"]["average"] == pytest.approx(float(error.nanmean()), rel=1e-5)


def windows_truth(windows: Any) -> torch.Tensor:
    truth: torch.Tensor = windows.__getitems__(list(range(len(windows))))["y"]
    return truth


def test_stride_thins_training_and_validation_and_leaves_the_test_part_whole() -> None:
    whole, thin = replace(PLAN, stride=1).data(CITY), replace(PLAN, stride=3).data(CITY)
    assert torch.equal(thin.train.starts, whole.train.starts[::3])
    assert torch.equal(thin.val.starts, whole.val.starts[::3])
    assert torch.equal(thin.test.starts, whole.test.starts)
    assert thin.split.train == range(round(0.6 * CITY.num_steps))


# -- resuming -----------------------------------------------------------------------------------------------


def watch_trainings(monkeypatch: pytest.MonkeyPatch, stop_at: int = 99) -> list[TrainingOptions]:
    """Options of the trainings that follow; the one numbered ``stop_at`` breaks off after its first epoch."""
    asked: list[TrainingOptions] = []
    real = runs.train

    def train(model: Any, data: Any, options: TrainingOptions, **kwargs: Any) -> Any:
        asked.append(options)
        if len(asked) == stop_at:
            real(model, data, replace(options, max_epochs=1), **kwargs)
            raise KeyboardInterrupt
        return real(model, data, options, **kwargs)

    monkeypatch.setattr(runs, "train", train)
    return asked


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_interrupted_table_goes_on_and_gives_the_same_rows(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    with monkeypatch.context() as patch:
        watch_trainings(patch, stop_at)
        with pytest.raises(KeyboardInterrupt):
            make_table([CITY], LSTM, tmp_path)
    asked = watch_trainings(monkeypatch)
    found = make_table([CITY], LSTM, tmp_path)
    assert len(asked) == 5 - stop_at
    for row in found:
        label = {key: row[key] for key in ("city", "regime", "model", "stlora", "seed")}
        (expected,) = chosen(rows, **label)
        assert errors_of(row) == errors_of(expected)
    assert not list(tmp_path.rglob("*.unfinished"))


def test_programs_with_other_backbones_fill_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stgcn", "lstm"):
        make_table([CITY], replace(PLAN, backbones=(name,), baselines=(), seeds=(0,)), tmp_path)
    asked = watch_trainings(monkeypatch)
    together = make_table([CITY], replace(PLAN, baselines=(), seeds=(0,)), tmp_path)
    assert not asked
    assert list(dict.fromkeys(row["model"] for row in together)) == ["lstm", "lstm-longer", "stgcn", "stgcn-longer"]


@pytest.mark.parametrize(
    "change",
    [
        {"options": replace(LSTM.options, learning_rate=0.02)},
        {"stride": 3},
        {"time_features": "none"},
        {"shares": (0.5, 0.2)},
        {"sizes": {"lstm": {"hidden_size": 5}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_rows_of_other_settings_are_refused(folder: Path, rows: list[Row], change: dict[str, Any]) -> None:
    file = folder / "models" / "here" / "lstm-seed0" / "rows.json"
    before, settings = file.read_bytes(), chosen(rows, model="lstm", city="here")[0]["settings"]
    plan = replace(LSTM, **change)
    assert raised(lambda: make_table([CITY], plan, folder)) == {
        "where": f"rows '{file}' cannot be continued",
        "expected": f"rows of the settings {plan.settings(plan.data(CITY), 'lstm')} (city, sizes, options)",
        "got": f"rows of {settings}",
        "fix": f"give another output folder, or delete '{file.parent}' to measure it again",
    }
    assert file.read_bytes() == before


def test_first_training_that_was_interrupted_is_not_continued_under_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        watch_trainings(patch, stop_at=1)
        with pytest.raises(KeyboardInterrupt):
            make_table([CITY], LSTM, tmp_path)
    nodes = torch.arange(4)
    graph = replace(CITY, edge_index=torch.stack([nodes, nodes.roll(2)]).numpy())
    error = raised(lambda: make_table([graph], LSTM, tmp_path))
    assert error["where"].endswith("rows.json' cannot be continued")


def test_training_that_was_not_measured_yet_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_table([CITY], LSTM, tmp_path)
    starts = list((tmp_path / "models" / "here" / "lstm-seed0" / "backbone.unfinished").glob("checkpoint-*"))
    assert len(starts) == 1
    assert len(make_table([CITY], LSTM, tmp_path)) == 5


def test_a_network_that_the_plan_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    plan = replace(LSTM, backbones=("lstm", "stgcn"), window=6, sizes={})
    error = raised(lambda: make_table([CITY], plan, tmp_path))
    assert error["where"].startswith("backbone 'stgcn'")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("content", ["[]", '{"settings": "abc"}'])
def test_a_file_of_other_content_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    asked, file = watch_trainings(monkeypatch), tmp_path / "models" / "there" / "lstm-seed0" / "rows.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    error = raised(lambda: make_table([CITY, OTHER], LSTM, tmp_path))
    assert (error["where"], error["got"]) == (f"rows '{file}' cannot be continued", "something else")
    assert not asked


def test_progress_bar_and_evaluation_batches_are_no_other_settings(folder: Path, rows: list[Row]) -> None:
    plan = replace(LSTM, options=replace(LSTM.options, progress=True, eval_batch_size=7))
    assert hashed(plan, CITY) == hashed(LSTM, CITY)
    assert len(rows) > 0


def hashed(plan: Plan, city: Any, model: str = "lstm") -> str:
    return plan.settings(plan.data(city), model)


def test_settings_know_the_readings_the_clock_and_the_sizes_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    other = [OTHER, replace(CITY, start=None), replace(CITY, interval_minutes=30)]
    wider = replace(LSTM, sizes={"lstm": {"hidden_size": 4, "num_layers": 2}})
    hashes = [hashed(LSTM, CITY), *(hashed(LSTM, city) for city in other), hashed(wider, CITY)]
    assert len(set(hashes)) == 5
    same = replace(LSTM, sizes={"lstm": {"hidden_size": 4, "num_layers": 1}})  # its default
    assert hashed(same, CITY) == hashes[0]
    assert hashed(LSTM, CITY, "ha") == hashed(replace(LSTM, stride=5), CITY, "ha")  # a baseline reads every step
    monkeypatch.setattr("stlora_peft.tuner.config.LARGE", 1)
    assert hashed(LSTM, CITY) != hashes[0]  # the rank that is trained, not the one that was left open


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "where", "expected", "got"),
    [
        ({"backbones": ("lstm", "wavenet")}, "backbone in a table", "of a3tgcn, ", "wavenet"),
        ({"baselines": ("arima",)}, "baseline in a table", "of ha, var, svr", "arima"),
        ({"regimes": ("adapted",)}, "regime in a table", "of joint, adapt", "adapted"),
        ({"backbones": ()}, "table", "at least one backbone", "none"),
        ({"regimes": ()}, "table", "at least one regime of joint, adapt", "none"),
        ({"seeds": ()}, "table", "at least one seed", "none"),
        ({"stride": 0}, "stride of a table", "stride >= 1", "stride = 0"),
        ({"backbones": ("lstm", "lstm")}, "backbone in a table", "each once", "lstm, lstm"),
        ({"regimes": ("joint", "joint")}, "regime in a table", "each once", "joint, joint"),
        ({"seeds": (0, 0)}, "seed in a table", "each once", "[0, 0]"),
        ({"sizes": {"wavenet": {}}}, "sizes in a table", "of a3tgcn, ", "wavenet"),
    ],
)
def test_plan_refuses_what_it_cannot_do(change: dict[str, Any], where: str, expected: str, got: str) -> None:
    error = raised(lambda: Plan(**change))
    assert (error["where"], error["got"]) == (f"{where} cannot be used", got)
    assert error["expected"].startswith(expected)
    assert error["fix"] == "correct the plan of the table"


@pytest.mark.parametrize(("cities", "where"), [([], "a table needs a city"), ([CITY, CITY], "cities of a table")])
def test_cities_without_names_of_their_own_are_refused(cities: list[Any], where: str, tmp_path: Path) -> None:
    error = raised(lambda: make_table(cities, LSTM, tmp_path))
    assert error["where"].startswith(where)
    assert error["got"] == (", ".join(city.name for city in cities) or "none")
    assert not list(tmp_path.iterdir())


def test_a_size_that_the_backbone_does_not_have_is_refused(tmp_path: Path) -> None:
    plan = replace(LSTM, sizes={"lstm": {"hidden_channels": 4}})
    error = raised(lambda: make_table([CITY], plan, tmp_path))
    assert error["where"] == "backbone 'lstm' has no size hidden_channels"
    assert error["got"] == "hidden_channels = 4"


def test_missing_package_of_a_baseline_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="scikit-learn"):
        make_table([CITY], replace(LSTM, baselines=("svr",)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_paper_table_is_the_default() -> None:
    plan = Plan()
    assert tuple(plan.backbones) == PAPER_BACKBONES == ("lstm", "stgcn", "gwnet", "agcrn", "staeformer", "d2stgnn")
    assert (plan.shares, plan.window, plan.horizon, plan.time_features) == ((0.6, 0.2), 12, 12, "week")
    assert tuple(plan.seeds) == (0, 1, 2, 3, 4)


# -- reports ------------------------------------------------------------------------------------------------


def row_of(model: str, seed: int, mae: float | None, *, regime: str = "adapt", stlora: bool = False) -> Row:
    """A row whose RMSE is twice, and whose MAPE is ten times its MAE, with two steps."""
    return {
        "city": "town",
        "regime": regime,
        "model": model,
        "stlora": stlora,
        "seed": seed,
        "mae": {"3": mae, "average": mae},
        "rmse": {"3": mae and 2 * mae, "average": mae and 2 * mae},
        "mape": {"3": mae and 10 * mae, "average": mae and 10 * mae},
    }


MADE_UP = [
    *(row_of("ha", seed, 4.0) for seed in (0, 1)),
    row_of("lstm", 0, 2.0),
    row_of("lstm-longer", 0, 1.5),
    row_of("lstm", 0, 1.25, stlora=True),
    row_of("lstm", 1, 3.0),
    row_of("lstm-longer", 1, 2.5),
    row_of("lstm", 1, 2.75, stlora=True),
]
LABELS = {"town": CityLabel("flow, 100 % & more^3", 5)}


def test_lines_follow_the_papers_order_and_differences_are_taken_seed_by_seed() -> None:
    lines = lines_of(MADE_UP, "town", "adapt")
    assert [line.name for line in lines] == ["ha", "lstm", "lstm-longer", "lstm+", "Δ", "Δ longer"]
    assert [line.difference for line in lines] == [False, False, False, False, True, True]
    spreads = [line.errors["mae"]["average"] for line in lines]
    assert spreads[0] == Spread(4.0)  # a baseline has no seeds
    assert [spread.mean for spread in spreads[1:]] == [2.5, 2.0, 2.0, -0.5, 0.0]
    differences = torch.tensor([[1.25 - 2.0, 2.75 - 3.0], [1.25 - 1.5, 2.75 - 2.5]], dtype=torch.float64)
    assert [spread.std for spread in spreads[4:]] == pytest.approx(differences.std(1).tolist())
    assert lines[4].cells() == [
        "-0.500 ± 0.354",
        "-1.000 ± 0.707",
        "-5.00 ± 3.54",
        "-0.500 ± 0.354",
        "-1.000 ± 0.707",
        "-5.00 ± 3.54",
    ]


def test_a_difference_that_is_worse_has_a_plus_and_one_that_is_not_finite_a_dash() -> None:
    worse = [row_of("lstm", 0, 1.0), row_of("lstm", 0, 1.5, stlora=True)]
    assert lines_of(worse, "town", "adapt")[2].cells()[0] == "+0.500"
    lost = [row_of("lstm", 0, 1.0), row_of("lstm", 0, None, stlora=True)]
    assert [line.cells()[0] for line in lines_of(lost, "town", "adapt")] == ["1.000", "-", "-"]


def test_markdown_has_every_number_with_its_spread(tmp_path: Path) -> None:
    write_markdown(tmp_path / "t.md", MADE_UP, LABELS, {"seeds": [0, 1], "training": {"rate": 0.1}}, "t.png")
    page = (tmp_path / "t.md").read_text().splitlines()
    assert "## town, adapt: backbone trained, then frozen under the adapter" in page
    assert "MAE and RMSE: flow, 100 % & more^3." in page
    head = page.index(
        "| model | MAE 15 min | RMSE 15 min | MAPE % 15 min | MAE average | RMSE average | MAPE % average |"
    )
    assert page[head + 1 : head + 4] == [
        "|---|---:|---:|---:|---:|---:|---:|",
        "| ha | 4.000 | 8.000 | 40.00 | 4.000 | 8.000 | 40.00 |",
        "| lstm | 2.500 ± 0.707 | 5.000 ± 1.414 | 25.00 ± 7.07 | 2.500 ± 0.707 | 5.000 ± 1.414 | 25.00 ± 7.07 |",
    ]
    assert page[head + 6].startswith("| *Δ* | *-0.500 ± 0.354* |")
    assert "| seeds | 0, 1 |" in page
    assert "| training | rate: 0.1 |" in page
    assert any(line.startswith("| torch | ") for line in page)


def test_markdown_names_the_commits_that_measured_the_rows(tmp_path: Path) -> None:
    rows = [row | {"commit": commit} for row, commit in zip(MADE_UP, "babbaaab", strict=True)]
    write_markdown(tmp_path / "t.md", rows, LABELS, {})
    assert "| commit | a, b |" in (tmp_path / "t.md").read_text()


def test_latex_has_the_same_numbers_and_escapes_what_is_a_command(tmp_path: Path) -> None:
    write_latex(tmp_path / "t.tex", MADE_UP, LABELS)
    text = (tmp_path / "t.tex").read_text().splitlines()
    assert r"\caption{Test errors on town, adapt: backbone trained, then frozen under the adapter. " in text[1]
    assert text[1].endswith(r"MAE and RMSE: flow, 100 \% \& more\^{}3.}")
    assert r" & \multicolumn{3}{c}{15 min} & \multicolumn{3}{c}{average} \\" in text
    assert r"\cmidrule(lr){2-4}\cmidrule(lr){5-7}" in text
    assert r"ha & 4.000 & 8.000 & 40.00 & 4.000 & 8.000 & 40.00 \\" in text
    start = r"$\Delta$ & -0.500 $\pm$ 0.354 & -1.000 $\pm$ 0.707 & -5.00 $\pm$ 3.54 & "
    assert any(line.startswith(start) for line in text)
    rules = [text[place + 1].split(" ")[0] for place, line in enumerate(text) if line == r"\midrule"]
    assert rules == ["ha", "lstm"]
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 1
    columns = 1 + 6
    assert all(line.count("&") in (2, columns - 1) for line in text if line.endswith(r"\\") and r"\&" not in line)


def test_figure_shows_the_change_in_percent_for_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("stlora_peft.figures.save_figure", lambda figure, path: drawn.append(figure))
    joint = [row | {"regime": "joint"} for row in MADE_UP if "longer" not in row["model"]]
    draw_table(tmp_path / "t.png", joint + MADE_UP)
    (axes,) = drawn[0].axes
    dots = [collection.get_offsets().tolist() for collection in axes.collections]
    assert [[point[0] for point in seeds] for seeds in dots] == [
        pytest.approx([-37.5, -100 / 12]),
        pytest.approx([-37.5, -100 / 12]),
        pytest.approx([-100 / 6, 10.0]),
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lstm"]
    assert axes.get_title() == "town"


def test_figure_of_a_real_table_is_a_picture(rows: list[Row], tmp_path: Path) -> None:
    draw_table(tmp_path / "t.png", rows)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
