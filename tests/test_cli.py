import ast
import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from small_city import small_city
from typer.testing import CliRunner, Result

import stlora_peft.cli as cli
from stlora_peft.cli.adapt import Adapter
from stlora_peft.cli.files import read_list
from stlora_peft.cli.options import Reading, Training
from stlora_peft.data import City, load_city
from stlora_peft.evaluation import evaluate
from stlora_peft.methods import METHODS, frugal
from stlora_peft.storage import load_adapter, load_backbone
from stlora_peft.training import TrainingOptions
from stlora_peft.tuner.conditioning import CONDITIONINGS

COMMANDS = ["demo", "simulate", "convert", "pretrain", "adapt", "extend", "evaluate", "compare", "table", "forecast"]
QUICK = ["--epochs", "1", "--batch-size", "64"]
BRIEF = [*QUICK, "--refit-steps", "2"]


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="stlora")


def answer(*words: object) -> dict[str, Any]:
    """The JSON object of a command that succeeds."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def mistake(*words: object) -> list[str]:
    """The lines of a user's mistake."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cities, a backbone of the first and an adapter of the second."""
    folder = tmp_path_factory.mktemp("work")
    small_city(num_nodes=3, name="home").save(folder / "home.npz")
    small_city(num_nodes=4, seed=1, name="away").save(folder / "away.npz")
    pretrained = run("pretrain", folder / "home.npz", "--out", folder / "base", "--width", 4, *QUICK)
    assert pretrained.exit_code == 0, pretrained.output
    adapted = run(
        "adapt", folder / "away.npz", "--base", folder / "base", "--days", 8, "--out", folder / "adapter", *BRIEF
    )
    assert adapted.exit_code == 0, adapted.output
    return folder


@pytest.fixture
def loaded(work: Path) -> list[object]:
    """Words that name the second city, the backbone and the adapter."""
    return [work / "away.npz", "--base", work / "base", "--adapter", work / "adapter"]


# The whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_that_the_command_understands(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    example = getattr(cli, command).EXAMPLE
    assert example.startswith(f"Example:  stlora {command} ")
    assert " ".join(example.split()) in " ".join(result.stdout.split())
    used = set(re.findall(r"--[a-z-]+", example))
    shown = set(re.findall(r"--[a-z-]+", result.stdout.partition("Example:")[0]))
    assert used <= shown
    assert {"--json", "--debug"} <= shown


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert [command for command in COMMANDS if re.search(rf"│ {command}\b", result.stdout)] == COMMANDS


def test_version_is_printed() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout.split()[0]) == (0, "stlora-peft")


def test_modules_of_the_commands_import_nothing_slow_at_their_top() -> None:
    allowed = {"typer", "rich", *sys.stdlib_module_names}
    parts = ("cli", "differences", "errors", "files", "launch", "provenance", "reports")
    light = tuple(f"stlora_peft.{name}" for name in parts)
    package = Path(cli.__file__).parents[1]
    files = [
        *Path(cli.__file__).parent.glob("*.py"),
        *(package / f"{name}.py" for name in ("reports", "provenance", "differences", "launch")),
    ]
    assert len(files) > 10
    for file in files:
        for statement in ast.parse(file.read_text()).body:
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            names += [str(statement.module)] if isinstance(statement, ast.ImportFrom) else []
            slow = [name for name in names if name.split(".")[0] not in allowed and not name.startswith(light)]
            assert slow == [], file.name


def test_options_have_the_defaults_and_choices_of_the_package() -> None:
    known = TrainingOptions()
    assert Training().options() == known
    assert (Training().epochs, Training().patience) == (known.max_epochs, known.patience)
    hints = get_type_hints(Adapter)
    assert set(get_args(hints["conditioning"])) == {*CONDITIONINGS, "auto"}


def test_command_line_in_a_process_of_its_own_exits_with_2_and_writes_pure_json(work: Path, tmp_path: Path) -> None:
    def stlora(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stlora_peft.cli", *words]
        return subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)

    wrong = stlora("evaluate", "nowhere.npz", "--base", "base")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.splitlines()[-4:] == [
        "Error: city file 'nowhere.npz' is missing.",
        "  expected: a file",
        "  got:      nothing",
        "  to fix:   check the path",
    ]
    out = str(tmp_path / "adapter")
    right = stlora("adapt", "away.npz", "--base", "base", "--days", "8", "--out", out, *BRIEF, "--json")
    assert right.returncode == 0
    assert json.loads(right.stdout)["out"] == out
    assert "validation MAE" in right.stderr  # the progress bar


# Mistakes -----------------------------------------------------------------------------------------------------------


def test_a_mistake_is_four_lines_on_standard_error(work: Path) -> None:
    assert mistake("adapt", work / "away.npz", "--base", work / "base", "--days", 99, "--out", work / "new") == [
        "Error: the given days reach into the test part.",
        "  expected: days <= 12.7917, the first 80 % of 384 steps",
        "  got:      days=99",
        "  to fix:   give fewer days, or a longer record",
    ]
    assert not (work / "new").exists()


def test_a_mistake_with_debug_shows_the_traceback_and_exits_with_2(work: Path) -> None:
    result = run("evaluate", "nowhere.npz", "--base", work / "base", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "city file 'nowhere.npz' is missing." in result.stderr


@pytest.mark.parametrize("error", [ValueError("inside"), RuntimeError("inside"), ImportError("inside")])
def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(Reading, "city", fail)
    result = run("pretrain", "a.npz", "--out", "nowhere")
    assert result.exception is error
    assert result.exit_code == 1


def test_an_interruption_says_how_to_go_on_and_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Reading, "city", interrupt)
    result = run("pretrain", "a.npz", "--out", "nowhere")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted. The same command goes on from what is done."


def test_a_place_that_cannot_be_written_is_the_users_mistake(work: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = mistake("simulate", "--nodes", 2, "--days", 1, "--out", tmp_path / "file" / "city.npz")
    assert lines[0] == f"Error: '{tmp_path / 'file'}' cannot be used."
    assert lines[1] == "  expected: a place that can be read and written"
    assert lines[3] == "  to fix:   check the path and its permissions"


def test_an_unknown_option_value_exits_with_2() -> None:
    result = run("adapt", "a.npz", "--base", "b", "--out", "c", "--conditioning", "nodes")
    assert result.exit_code == 2
    assert "--conditioning" in result.stderr


@pytest.mark.parametrize("text", ["0,x", "", "1.5"])
def test_read_list_of_something_else_names_the_option(text: str) -> None:
    with pytest.raises(ValueError, match="option '--seeds' cannot be read") as error:
        read_list("--seeds", text, int)
    assert str(error.value).splitlines()[1:] == [
        "  expected: whole numbers between commas",
        f"  got:      {text!r}",
        "  to fix:   write for instance 0,1,2",
    ]


# Commands -----------------------------------------------------------------------------------------------------------


def test_simulate_writes_the_city_that_it_describes(tmp_path: Path) -> None:
    out = tmp_path / "city.npz"
    found = answer(
        "simulate", "--nodes", 3, "--days", 1, "--seed", 4, "--measure", "both", "--start", "2024-05-06", "--out", out
    )
    city = load_city(out)
    assert (found["num_nodes"], found["num_steps"], found["quantity"]) == (3, 288, city.quantity)
    assert city.values.shape == (288, 3, 2)
    assert city.start == datetime(2024, 5, 6)
    assert found["missing"] == np.isnan(city.values).mean()


def test_simulate_over_a_file_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "city.npz"
    out.write_text("mine")
    words = ["simulate", "--nodes", 2, "--days", 1, "--out", out]
    assert mistake(*words) == [
        f"Error: '{out}' exists already.",
        "  expected: a new place for the result",
        "  got:      a file of 4 bytes",
        "  to fix:   give another --out, or --force to overwrite it",
    ]
    assert out.read_text() == "mine"
    assert run(*words, "--force").exit_code == 0
    assert load_city(out).num_nodes == 2


def test_pretrain_writes_a_backbone_of_the_asked_sizes_and_no_checkpoints(work: Path, tmp_path: Path) -> None:
    words = ["--backbone", "lstm", "--width", 5, "--window", 6, "--horizon", 4, "--time-features", "week"]
    found = answer("pretrain", work / "home.npz", "--out", tmp_path / "base", *words, *QUICK)
    saved = load_backbone(tmp_path / "base")
    backbone = saved.backbone
    assert (backbone.name, backbone.window, backbone.horizon, saved.time_features) == ("lstm", 6, 4, "week")
    assert backbone.hyperparameters["hidden_size"] == 5
    assert found["parameters"] == sum(parameter.numel() for parameter in backbone.parameters())
    assert set(found["test"]) == {"persistence", "lstm"}
    assert set(found["test"]["lstm"]) == {"3", "average"}
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_pretrain_shows_errors_beside_persistence_and_the_next_command(work: Path, tmp_path: Path) -> None:
    result = run("pretrain", work / "home.npz", "--out", tmp_path / "base", "--width", 4, *QUICK, "--quantity", "m/s")
    assert "Test errors on home; m/s" in result.stdout
    heading = next(line for line in result.stdout.splitlines() if "horizon" in line)
    assert heading.split() == ["horizon", "persistence", "stgcn"]
    for name in ("MAE", "RMSE", "MAPE %", "180 min", "360 min", "720 min", "average"):
        assert name in result.stdout
    next_command = result.stdout.splitlines()[-1].strip()
    assert next_command.startswith(f"stlora adapt OTHER-CITY.npz --base {tmp_path / 'base'} --days 3 --out ")
    assert load_backbone(tmp_path / "base").quantity == "m/s"


def test_pretrain_unknown_backbone_is_refused_before_training(work: Path, tmp_path: Path) -> None:
    lines = mistake("pretrain", work / "home.npz", "--out", tmp_path / "base", "--backbone", "gpt")
    assert lines[0] == "Error: backbone 'gpt' is unknown."
    assert list(tmp_path.iterdir()) == []


def test_pretrain_over_a_backbone_needs_force(work: Path) -> None:
    lines = mistake("pretrain", work / "home.npz", "--out", work / "base")
    assert lines[0] == f"Error: '{work / 'base' / 'backbone.json'}' exists already."


def test_pretrain_goes_on_after_an_interruption(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["pretrain", work / "home.npz", "--width", 4, "--epochs", 3, "--batch-size", 64]
    whole = answer(*words, "--out", tmp_path / "whole")
    import stlora_peft.callbacks

    real = stlora_peft.callbacks.ProgressBar.on_evaluate

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if round(state.epoch) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(stlora_peft.callbacks.ProgressBar, "on_evaluate", interrupt)
    out = tmp_path / "base"
    assert run(*words, "--out", out).exit_code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.unfinished", "whole"]
    monkeypatch.setattr(stlora_peft.callbacks.ProgressBar, "on_evaluate", real)
    again = run(*words, "--out", out, "--json")
    assert f"Going on from '{out}.unfinished'; --force starts again." in again.stderr
    assert json.loads(again.stdout)["test"] == whole["test"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "whole"]


def test_adapt_says_what_was_trained_and_what_it_weighs(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    words = ["--conditioning", "core", "--rank", 2, "--no-predictor", "--days", 8, *BRIEF]
    found = answer("adapt", work / "away.npz", "--base", work / "base", "--out", out, *words)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["conditioning"], config["r"], config["lora_alpha"]) == ("core", 2, 4)
    assert config["predictor"] is None
    model = load_adapter(load_backbone(work / "base").backbone, out)
    assert found["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert found["trainable_parameters"] < sum(parameter.numel() for parameter in model.parameters())
    assert found["training"]["best_val_mae"] <= found["val_mae_before"]
    assert found["refit"]["history"][-1]["train_mae"] > 0
    assert found["refit"]["best_val_mae"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_adapt_frugal_has_the_settings_of_a_small_adapter(work: Path, tmp_path: Path) -> None:
    words = ["adapt", work / "away.npz", "--base", work / "base", "--days", 8, *BRIEF, "--frugal"]
    found = answer(*words, "--out", tmp_path / "small")
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    expected = frugal(load_backbone(work / "base").backbone)
    assert {name: config[name] for name in ("r", "lora_alpha", "emb_size")} == {"r": 1, "lora_alpha": 8, "emb_size": 8}
    assert {name: config["predictor"][name] for name in expected["predictor"]} == expected["predictor"]
    assert found["trainable_parameters"] < answer(*words[:-1], "--out", tmp_path / "usual")["trainable_parameters"] / 5


def test_adapt_frugal_with_what_it_decides_itself_is_refused(work: Path, tmp_path: Path) -> None:
    words = ["adapt", work / "away.npz", "--base", work / "base", "--out", tmp_path / "small", "--frugal"]
    assert mistake(*words, "--rank", 4, "--alpha", 8, "--no-predictor") == [
        "Error: --frugal has a rank, an alpha and a predictor of its own.",
        "  expected: --frugal alone",
        "  got:      --frugal with --rank, --alpha, --no-predictor",
        "  to fix:   leave out --frugal, or --rank, --alpha, --no-predictor",
    ]


def test_adapt_and_evaluate_part_by_part(work: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "adapter", ["--nodes-per-step", 3, "--hops", 4]
    found = answer("adapt", work / "away.npz", "--base", work / "base", "--out", out, "--days", 8, *BRIEF, *parts)
    assert found["training"]["best_val_mae"] <= found["val_mae_before"]
    rated = [work / "away.npz", "--base", work / "base", "--adapter", out]
    in_parts, whole = answer("evaluate", *rated, *parts)["test"], answer("evaluate", *rated)["test"]
    assert in_parts["persistence"]["average"] == pytest.approx(whole["persistence"]["average"])
    assert in_parts["with adapter"]["average"] == pytest.approx(whole["with adapter"]["average"], rel=1e-4)


def test_adapt_without_options_takes_the_defaults_of_the_configuration(work: Path) -> None:
    config = json.loads((work / "adapter" / "adapter_config.json").read_text())
    expected = {"conditioning": "embedding", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "emb_size": 16}
    assert expected | {"emb_noise": 0.8} == {name: config[name] for name in (*expected, "emb_noise")}
    assert config["predictor"] is not None


def test_adapt_without_training_writes_an_adapter_that_knows_the_history(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    words = ["adapt", work / "away.npz", "--base", work / "base", "--days", 8, "--out", out, "--no-training"]
    from stlora_peft.comparison import adaptation_data

    found = answer(*words)
    assert found["training"] is None
    shown = run(*words, "--force").stdout
    assert "none: the predictor was fitted in closed form" in shown
    saved, city = load_backbone(work / "base"), load_city(work / "away.npz")
    data = adaptation_data(saved, city, 8)
    model = load_adapter(saved.backbone, out, city)
    zero = METHODS["zero-shot"].build(saved.backbone, data).model
    assert evaluate(model, data.test, data).mae < 0.9 * evaluate(zero, data.test, data).mae


def test_adapt_repeats_the_options_that_read_the_city_in_the_next_command(work: Path, tmp_path: Path) -> None:
    words = ["--days", 8, *BRIEF, "--zeros-missing", "--quantity", "speed (mph)"]
    result = run("adapt", work / "away.npz", "--base", work / "base", "--out", tmp_path / "adapter", *words)
    assert result.stdout.splitlines()[-1].endswith("--quantity 'speed (mph)' --zeros-missing")


def test_adapt_into_a_folder_with_other_files_is_refused_even_with_force(work: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    lines = mistake("adapt", work / "away.npz", "--base", work / "base", "--out", tmp_path, "--force")
    assert lines == [
        f"Error: '{tmp_path}' exists already.",
        "  expected: a new or empty folder for the adapter",
        "  got:      something that is no adapter",
        "  to fix:   give another --out",
    ]


def test_evaluate_gives_the_numbers_of_the_python_api(work: Path, loaded: list[object]) -> None:
    from stlora_peft.comparison import adaptation_data

    found = answer("evaluate", *loaded)
    saved, city = load_backbone(work / "base"), load_city(work / "away.npz")
    data = adaptation_data(saved, city, 8)  # the scaler that the adapter was trained with
    model = load_adapter(saved.backbone, work / "adapter", city)
    assert found["test"]["with adapter"] == evaluate(model, data.test, data).to_dict()
    alone = METHODS["zero-shot"].build(saved.backbone, data).model
    assert found["test"]["backbone alone"] == evaluate(alone, data.test, data).to_dict()
    assert list(found["test"]) == ["persistence", "backbone alone", "with adapter"]


def test_evaluate_backbone_at_home_repeats_the_numbers_of_pretraining(work: Path, tmp_path: Path) -> None:
    words = ["--width", 4, *QUICK]
    pretrained = answer("pretrain", work / "home.npz", "--out", tmp_path / "base", *words)
    found = answer("evaluate", work / "home.npz", "--base", tmp_path / "base")
    assert found["test"] == {
        "persistence": pretrained["test"]["persistence"],
        "backbone alone": pretrained["test"]["stgcn"],
    }


def test_evaluate_adapter_of_another_city_names_both(work: Path) -> None:
    lines = mistake("evaluate", work / "home.npz", "--base", work / "base", "--adapter", work / "adapter")
    assert lines[0] == "Error: stlora adapter 'default' belongs to other nodes."
    assert lines[1:3] == ["  expected: 4 nodes", "  got:      3 nodes"]


def test_evaluate_city_with_other_channels_says_how_to_choose(work: Path, tmp_path: Path) -> None:
    city = small_city(num_nodes=3)
    known = {field.name: getattr(city, field.name) for field in fields(City)}
    City(**{**known, "values": np.concatenate([city.values, city.values], axis=2)}).save(tmp_path / "two.npz")
    lines = mistake("evaluate", tmp_path / "two.npz", "--base", work / "base")
    assert lines == [
        "Error: city 'small' does not fit the backbone, which was trained on home.",
        "  expected: 1 channel: speed",
        "  got:      2 channels",
        "  to fix:   choose with --channels",
    ]
    assert run("evaluate", tmp_path / "two.npz", "--base", work / "base", "--channels", 0).exit_code == 0


def test_compare_writes_rows_table_and_figure_and_resumes(work: Path, tmp_path: Path) -> None:
    words = ["compare", work / "away.npz", "--base", work / "base", "--days", 8, "--out", tmp_path / "c", *BRIEF]
    words += ["--learning-rates", "0.001"]
    first = answer(*words, "--methods", "zero-shot,head", "--seeds", "0,1")
    rows = json.loads((tmp_path / "c" / "results.json").read_text())
    assert first["rows"] == rows
    assert [(one["method"], one["seed"]) for one in rows] == [
        ("zero-shot", 0),
        ("zero-shot", 1),
        ("head", 0),
        ("head", 1),
    ]
    assert (tmp_path / "c" / "results.png").read_bytes().startswith(b"\x89PNG")
    again = run(*words, "--methods", "persistence,head", "--seeds", "1")
    assert again.exit_code == 0
    assert "--force measures everything again." in again.stderr
    page = (tmp_path / "c" / "results.md").read_text()
    for name in ("zero-shot", "head", "persistence"):
        assert f"| `{name}` |" in page  # the page is of all rows in the folder
    assert page.index("| `zero-shot` |") < page.index("| `persistence` |") < page.index("| `head` |")
    assert "zero-shot" not in again.stdout
    assert json.loads((tmp_path / "c" / "results.json").read_text())[:4] == rows


def test_compare_without_matplotlib_writes_the_rest(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["compare", work / "away.npz", "--base", work / "base", "--days", 8, "--out", tmp_path, *BRIEF]
    result = run(*words, "--methods", "persistence", "--seeds", 0)
    assert result.exit_code == 0
    assert "No figure: pip install 'stlora-peft[figures]'" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_forecast_continues_the_record_in_the_citys_units(loaded: list[object], tmp_path: Path) -> None:
    out, plot = tmp_path / "f.csv", tmp_path / "f.png"
    found = answer("forecast", *loaded, "--out", out, "--plot", plot)
    rows = read_table(out)
    assert list(rows[0]) == ["time", "node_id", "horizon_minutes", "forecast", "unit"]
    assert len(rows) == 4 * 12
    assert [row["time"] for row in rows[:2]] == ["2024-03-20T00:00", "2024-03-20T01:00"]
    assert [row["horizon_minutes"] for row in rows[:12]] == [str(60 * step) for step in range(1, 13)]
    assert [row["node_id"] for row in rows[::12]] == [f"away-{node}" for node in range(4)]
    assert all(10 < float(row["forecast"]) < 90 for row in rows)
    assert {row["unit"] for row in rows} == {"speed"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (found["last_step"], found["last_time"]) == (383, "2024-03-19 23:00")


@pytest.mark.parametrize("at", ["350", "2024-03-18T14:00", "2024-03-18T14:59"])
def test_forecast_inside_of_the_record_equals_the_forecast_of_that_window(
    work: Path, loaded: list[object], tmp_path: Path, at: str
) -> None:
    from stlora_peft.comparison import adaptation_data
    from stlora_peft.evaluation import forecast

    answer("forecast", *loaded, "--out", tmp_path / "f.csv", "--at", at)
    saved, city = load_backbone(work / "base"), load_city(work / "away.npz")
    data = adaptation_data(saved, city, 8)
    model = load_adapter(saved.backbone, work / "adapter", city)
    expected = forecast(model, data.test.inputs(torch.tensor([350 - 11])), data)[0, :, :, 0].T.flatten()
    written = torch.tensor([float(row["forecast"]) for row in read_table(tmp_path / "f.csv")])
    torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("at", ["5", "384", "2024-03-04T03:00", "-1"])
def test_forecast_where_there_is_no_window_says_where_there_are(loaded: list[object], tmp_path: Path, at: str) -> None:
    lines = mistake("forecast", *loaded, "--out", tmp_path / "f.csv", "--at", at)
    assert lines[0] == "Error: city 'away' has no window of 12 steps that ends there."
    assert lines[1] == "  expected: a step from 11 to 383, 2024-03-04 11:00 to 2024-03-19 23:00"
    assert lines[2].startswith("  got:      ")
    assert lines[3] == "  to fix:   give another --at, or a longer record"


def test_forecast_of_a_city_without_times_counts_steps(work: Path, tmp_path: Path) -> None:
    timeless = replace(small_city(num_nodes=3, name="home"), start=None)
    timeless.save(tmp_path / "home.npz")
    words = [tmp_path / "home.npz", "--base", work / "base", "--out", tmp_path / "f.csv"]
    assert mistake("forecast", *words, "--at", "2024-01-01") == [
        "Error: option '--at' cannot be read.",
        "  expected: the number of a step",
        "  got:      '2024-01-01'",
        "  to fix:   say with --start when the record begins",
    ]
    assert answer("forecast", *words, "--at", "99")["last_time"] is None
    rows = read_table(tmp_path / "f.csv")
    assert next(iter(rows[0])) == "step"
    assert [row["step"] for row in rows[:2]] == ["100", "101"]
    assert answer("forecast", *words, "--force", "--start", "2024-01-01")["last_time"] == "2024-01-16 23:00"


def test_forecast_of_two_channels_names_the_channel(tmp_path: Path) -> None:
    run("simulate", "--nodes", 2, "--days", 2, "--measure", "both", "--interval", 30, "--out", tmp_path / "c.npz")
    words = ["--backbone", "lstm", "--width", 2, "--window", 4, "--horizon", 2, *QUICK]
    assert run("pretrain", tmp_path / "c.npz", "--out", tmp_path / "base", *words).exit_code == 0
    answer("forecast", tmp_path / "c.npz", "--base", tmp_path / "base", "--out", tmp_path / "f.csv")
    rows = read_table(tmp_path / "f.csv")
    assert [(row["horizon_minutes"], row["channel"]) for row in rows[:4]] == [
        ("30", "0"),
        ("60", "0"),
        ("30", "1"),
        ("60", "1"),
    ]


def test_force_replaces_an_adapter(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "adapter", tmp_path / "adapter")
    words = ["adapt", work / "away.npz", "--base", work / "base", "--days", 8, "--out", tmp_path / "adapter", *BRIEF]
    assert mistake(*words)[3] == "  to fix:   give another --out, or --force to overwrite it"
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert run(*words, "--seed", 1, "--force").exit_code == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != before
