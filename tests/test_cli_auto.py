import json
import sys
from pathlib import Path
from typing import Any

import pytest
from small_city import small_city
from typer.testing import CliRunner, Result

import stlora_peft.cli as cli
from stlora_peft import selection
from stlora_peft.comparison import compare
from stlora_peft.data import CityData, load_city
from stlora_peft.methods import FORMS
from stlora_peft.storage import load_adapter, load_backbone
from stlora_peft.training import TrainingOptions

BRIEF = ["--days", 8, "--epochs", 1, "--batch-size", 64, "--refit-steps", 2]
ERRORS = {"embedding": 2.5, "predictor": 2.25, "gate": 2.125, "core": 3.0}


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="stlora")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cities, and a backbone of the first."""
    folder = tmp_path_factory.mktemp("work")
    small_city(num_nodes=3, name="home").save(folder / "home.npz")
    small_city(num_nodes=4, seed=1, name="away").save(folder / "away.npz")
    words = [
        "pretrain",
        folder / "home.npz",
        "--out",
        folder / "base",
        "--width",
        4,
        "--epochs",
        1,
        "--backbone",
        "lstm",
    ]
    assert run(*words, "--batch-size", 64).exit_code == 0
    return folder


@pytest.fixture
def words(work: Path) -> list[object]:
    return [work / "away.npz", "--base", work / "base", *BRIEF]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, TrainingOptions, dict[str, Any]]]:
    """Errors that are known beforehand in place of the trainings: what each of these was asked for."""
    calls = []

    def error(backbone: Any, fold: CityData, options: TrainingOptions, settings: dict[str, Any], bars: Any) -> float:
        name = next(name for name, form in reversed(FORMS.items()) if form.items() <= settings.items())
        calls.append((name, options, settings))
        return ERRORS[name] + (0.125, 0.0, -0.125)[(len(calls) - 1) % 3]

    monkeypatch.setattr(selection, "_fold_error", error)
    return calls


def test_adapt_auto_trains_and_saves_the_form_that_is_best_and_shows_all(
    words: list[object], tmp_path: Path, asked: list[Any]
) -> None:
    more = ["--conditioning", "auto", "--rank", 2, "--seed", 5, "--out", tmp_path / "adapter"]
    result = run("adapt", *words, *more)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "MAE on given days that were held back; speed" in result.stdout
    assert ["form", "mean", "fold", "1", "fold", "2", "fold", "3"] in lines
    for name, error in ERRORS.items():
        assert [name, *(f"{one:.3f}" for one in (error, error + 0.125, error, error - 0.125))] in lines
    assert "Chosen: gate, by 3 trainings of 200 steps for each form, " in result.stdout
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["conditioning"], config["r"], config["target_modules"] != []) == ("gate", 2, True)
    assert [name for name, _, _ in asked] == [name for name in ERRORS for _ in range(3)]
    for _, options, settings in asked:
        assert (options.seed, options.learning_rate, options.max_steps, options.patience) == (5, 3e-3, 200, None)
        assert settings["r"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_adapt_auto_says_in_json_what_each_was_worth_and_goes_on_from_an_interruption(
    words: list[object], tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapter"
    more = ["--conditioning", "auto", "--no-predictor", "--out", out]

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stlora_peft.training.train", interrupted)
        assert run("adapt", *words, *more).exit_code == 130
    file = tmp_path / "adapter.unfinished" / "choice.json"
    assert file.exists()
    count = len(asked)
    again = run("adapt", *words, *more, "--json")
    assert again.exit_code == 0, again.output
    assert f"Going on from '{file}'; --force starts again." in again.stderr
    assert len(asked) == count  # nothing was tried twice
    choice = json.loads(again.stdout)["choice"]
    assert (choice["chosen"], choice["errors"], choice["steps"], choice["left_out"]) == ("gate", ERRORS, 200, {})
    assert choice["folds"] == {name: [error + 0.125, error, error - 0.125] for name, error in ERRORS.items()}
    assert not file.exists()
    other = [*words, *more[:2], "--out", out, "--force", "--json"]  # with the predictor
    assert json.loads(run("adapt", *other).stdout)["choice"]["chosen"] == "gate"
    assert len(asked) == 2 * count


def test_adapt_auto_says_what_is_left_out(
    words: list[object], tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = selection._fold_error

    def refused(*arguments: Any) -> float:
        error = known(*arguments)
        if asked[-1][0] == "gate":
            raise ValueError("gates [are]\n  not known")
        return error

    monkeypatch.setattr(selection, "_fold_error", refused)
    result = run("adapt", *words, "--conditioning", "auto", "--out", tmp_path / "adapter")
    assert "gate is left out: gates [are]; not known" in result.stdout
    assert "Chosen: predictor, " in result.stdout
    model = load_adapter(load_backbone(words[2]).backbone, tmp_path / "adapter")
    assert model.targeted_module_names == []


@pytest.mark.parametrize("other", ["--frugal", "--no-training"])
def test_adapt_auto_with_nothing_to_choose_is_refused(words: list[object], tmp_path: Path, other: str) -> None:
    result = run("adapt", *words, "--conditioning", "auto", other, "--out", tmp_path / "adapter")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"Error: --conditioning auto has nothing to choose with {other}.",
        "  expected: one of the two options",
        f"  got:      --conditioning auto {other}",
        f"  to fix:   leave out {other}, or --conditioning",
    ]


def test_compare_auto_searches_the_rate_once_and_chooses_with_each_seed(
    words: list[object], tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # a figure takes seconds
    out = tmp_path / "compare"
    more = ["--methods", "st-lora-auto", "--seeds", "0,1", "--learning-rates", "0.01,0.02"]
    result = run("compare", *words, *more, "--out", out)
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "results.json").read_text())
    rate = rows[0]["learning_rate"]
    assert [(options.seed, options.learning_rate) for _, options, _ in asked] == [(0, rate)] * 12 + [(1, rate)] * 12
    for row in rows:
        assert (row["choice"]["chosen"], row["choice"]["errors"]) == ("gate", ERRORS)
        assert row["best_val_mae"] is None  # the search was that of another form
    assert "MAE on given days that were held back; speed" in result.stdout
    assert ["gate", "2.125", "2.125"] in [line.split() for line in result.stdout.splitlines()]
    assert "st-lora-auto, seed 1: gate is chosen" in result.stdout
    page = (out / "results.md").read_text()
    words_of_it = "the one of embedding, predictor, gate, core with the lowest error on given days that are held back"
    assert f"- `st-lora-auto`: {words_of_it} in turn; seed 0 chose gate; seed 1 chose gate" in page


def test_compare_auto_without_a_last_training_tests_the_chosen_form_that_validated(
    words: list[object], asked: list[Any]
) -> None:
    plan = {"days": 8, "seeds": [0], "refit_steps": 0, "learning_rates": [1e-2]}
    options = TrainingOptions(max_epochs=1, batch_size=64, progress=False)
    methods = ["st-lora-gate", "st-lora-auto"]
    gate, auto = compare(load_backbone(words[2]), load_city(words[0]), **plan, methods=methods, options=options)
    for key in ("mae", "best_val_mae", "best_epoch", "learning_rate"):
        assert auto[key] == gate[key] is not None
