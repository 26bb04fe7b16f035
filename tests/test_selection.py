import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_city import small_city
from toys import raised

from stlora_peft import STLoraConfig, selection
from stlora_peft.backbones import Forecaster, build_backbone
from stlora_peft.data import CityData, adaptation_split, prepare
from stlora_peft.data.folds import Fold, held_out_folds
from stlora_peft.evaluation import forecast_batches
from stlora_peft.methods import DEFAULT_FORM, FORMS, build_adapter
from stlora_peft.selection import Choice, choose_conditioning
from stlora_peft.training import TrainingOptions, train

OPTIONS = TrainingOptions(learning_rate=1e-2, progress=False, seed=3)
Error = Callable[..., float]


@pytest.fixture(scope="module")
def data() -> CityData:
    city = small_city()
    return prepare(city, adaptation_split(city.num_steps, city.steps_per_day, 2), window=4, horizon=3)


@pytest.fixture(scope="module")
def backbone() -> Forecaster:
    torch.manual_seed(0)
    return build_backbone("lstm", in_channels=3, hidden_size=4, window=4, horizon=3)


def choose(backbone: Forecaster, data: CityData, options: TrainingOptions = OPTIONS, **others: Any) -> Choice:
    return choose_conditioning(backbone, data, options, **{"steps": 3, **others})


@pytest.fixture(scope="module")
def choice(backbone: Forecaster, data: CityData) -> Choice:
    return choose(backbone, data, candidates=["predictor", "core"])


def table(errors: dict[str, list[float]]) -> Error:
    """Stands in for the trainings: the errors of each form, fold by fold."""
    left = {name: iter(one) for name, one in errors.items()}
    names = {tuple(sorted((key, str(value)) for key, value in form.items())): name for name, form in FORMS.items()}

    def error(backbone: Any, fold: Fold, options: Any, settings: dict[str, Any], callbacks: Any) -> float:
        return next(left[names[tuple(sorted((key, str(value)) for key, value in settings.items()))]])

    return error


# What is chosen -----------------------------------------------------------------------------------------------------


def test_choice_is_the_lowest_of_errors_that_were_found_by_hand(
    choice: Choice, backbone: Forecaster, data: CityData
) -> None:
    settings = {
        "embedding": {"conditioning": "embedding"},
        "predictor": {"target_modules": []},
        "core": {"conditioning": "core"},
    }
    found = {}
    for name, form in settings.items():
        errors = []
        for fold in held_out_folds(data):
            torch.manual_seed(3)
            model = build_adapter(backbone, fold, **form)
            how = TrainingOptions(learning_rate=1e-2, patience=None, max_steps=3, seed=3, progress=False)
            train(model, fold, how)
            ((forecast, truth),) = forecast_batches(model, fold.val, fold, batch_size=1000)
            errors.append((forecast - truth).abs().double()[truth.isfinite()].mean().item())
        found[name] = errors
    assert list(choice.folds) == list(found)
    for name, errors in found.items():
        assert choice.folds[name] == pytest.approx(errors, rel=1e-5)
    means = {name: sum(errors) / len(errors) for name, errors in found.items()}
    assert choice.errors == pytest.approx(means, rel=1e-5)
    assert choice.name == min(means, key=means.__getitem__)
    assert len(set(choice.errors.values())) == 3
    assert choice.left_out == {}


def test_choice_follows_from_the_seed_and_leaves_the_backbone(
    choice: Choice, backbone: Forecaster, data: CityData
) -> None:
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    again = choose(backbone, data, candidates=[])
    assert again.folds == {"embedding": choice.folds["embedding"]}
    other = choose(backbone, data, TrainingOptions(learning_rate=1e-2, progress=False, seed=4), candidates=[])
    assert other.folds["embedding"] != again.folds["embedding"]
    for name, value in before.items():
        assert torch.equal(backbone.state_dict()[name], value)


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        ({"embedding": [3, 3], "predictor": [4, 2], "gate": [3, 3.1], "core": [5, 5]}, "embedding"),
        ({"embedding": [3, 3], "predictor": [9, 1], "gate": [1, 4.5], "core": [0, 5]}, "core"),
        ({"embedding": [4, 4], "predictor": [2, 2], "gate": [1, 3], "core": [3, 1]}, "predictor"),
        ({"embedding": [1, 4], "predictor": [3, 3.1], "gate": [1, 3], "core": [9, 9]}, "gate"),
    ],
)
def test_choice_is_by_the_mean_of_the_folds_and_of_equal_ones_the_first(
    backbone: Forecaster,
    data: CityData,
    monkeypatch: pytest.MonkeyPatch,
    errors: dict[str, list[float]],
    chosen: str,
) -> None:
    monkeypatch.setattr(selection, "_fold_error", table(errors))
    found = choose(backbone, data)
    assert found.name == chosen
    assert found.settings == FORMS[chosen]
    assert found.folds == {name: tuple(one) for name, one in errors.items()}


def test_default_form_is_first_among_the_candidates_and_that_of_the_configuration(
    backbone: Forecaster, data: CityData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_fold_error", table({name: [1, 1] for name in FORMS}))
    assert list(choose(backbone, data, candidates=["core", "embedding", "core"]).errors) == ["embedding", "core"]
    assert next(iter(FORMS)) == DEFAULT_FORM == STLoraConfig(num_nodes=1).conditioning
    assert FORMS[DEFAULT_FORM] == {}


def test_choice_can_be_written_as_json(choice: Choice) -> None:
    found = json.loads(json.dumps(choice.to_dict(), allow_nan=False))
    assert found["chosen"] == choice.name
    assert found["errors"] == choice.errors
    assert {name: tuple(errors) for name, errors in found["folds"].items()} == choice.folds
    assert (found["left_out"], found["steps"]) == ({}, 3)
    assert found["seconds"] > 0


def test_choice_part_by_part_is_the_one_of_the_whole_graph(backbone: Forecaster, data: CityData) -> None:
    whole = TrainingOptions(learning_rate=1e-9, progress=False)
    parts = TrainingOptions(learning_rate=1e-9, progress=False, nodes_per_step=2, hops=4)
    found = [choose(backbone, data, options, candidates=[], steps=1).errors for options in (whole, parts)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# What is left out, and errors ---------------------------------------------------------------------------------------


def test_candidate_that_is_not_supported_is_left_out_by_name(backbone: Forecaster, data: CityData) -> None:
    found = choose(backbone, data, candidates=["predictor"], settings={"predictor": None}, steps=1)
    assert (found.name, list(found.errors), list(found.left_out)) == ("embedding", ["embedding"], ["predictor"])
    assert "target_modules" in found.left_out["predictor"]  # PEFT's words


def test_choice_where_every_candidate_is_refused_raises_the_error_of_the_default(
    backbone: Forecaster, data: CityData
) -> None:
    lines = raised(lambda: choose(backbone, data, settings={"r": 0}))
    assert lines["where"] == "STLoraConfig.r is out of range"


def test_unknown_candidate_is_refused(backbone: Forecaster, data: CityData) -> None:
    assert raised(lambda: choose(backbone, data, candidates=["gate", "bias", "all"])) == {
        "where": "unknown form of adapter to choose from",
        "expected": "names of embedding, predictor, gate, core",
        "got": "bias, all",
        "fix": "correct the list of candidates",
    }


# Interruption -------------------------------------------------------------------------------------------------------


def test_choice_goes_on_from_its_file_and_trains_what_is_missing_alone(
    choice: Choice, backbone: Forecaster, data: CityData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real, trained = tmp_path / "unfinished" / "choice.json", selection._fold_error, []

    def counted(*arguments: Any) -> float:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(1)
        return real(*arguments)

    monkeypatch.setattr(selection, "_fold_error", counted)
    with pytest.raises(KeyboardInterrupt):
        choose(backbone, data, candidates=["core"], file=file)
    trained[:] = [1, 1]  # room for one more
    again = choose(backbone, data, candidates=["core"], file=file)
    assert len(trained) == 3
    assert again.folds == {name: choice.folds[name] for name in ("embedding", "core")}
    more = choose(backbone, data, candidates=[], file=file)
    assert (more.name, more.folds) == ("embedding", {"embedding": choice.folds["embedding"]})


def test_choice_does_not_go_on_from_one_of_other_settings(
    backbone: Forecaster, data: CityData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "choice.json"
    monkeypatch.setattr(selection, "_fold_error", lambda *arguments: 1.0)
    choose(backbone, data, file=file)
    stored = json.loads(file.read_text())["settings"]
    choose(backbone, data, TrainingOptions(learning_rate=1e-2, seed=3, patience=1, progress=False), file=file)
    for change in ({"steps": 4}, {"settings": {"r": 2}}, {"options": TrainingOptions(seed=5, progress=False)}):
        lines = raised(lambda change=change: choose(backbone, data, file=file, **change))
        assert lines["where"] == f"choice '{file}' cannot be continued"
        assert lines["expected"].startswith("errors of the settings ")
        assert lines["expected"].endswith(" (backbone, city, given days, options)")
        assert lines["got"] == f"those of {stored}"
        assert lines["fix"] == "give another output folder, or delete the file to choose anew"
