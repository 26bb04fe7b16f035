from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import stlora_peft.cli as cli
from stlora_peft import demo
from stlora_peft.comparison import adaptation_data
from stlora_peft.demo import DemoSettings, Places, RoundTrip
from stlora_peft.evaluation import evaluate
from stlora_peft.storage import load_adapter, load_backbone
from stlora_peft.training import TrainingOptions

SMALL = DemoSettings(
    source_nodes=5,
    source_days=2,
    target_nodes=4,
    target_days=2,
    days=1,
    width=4,
    pretraining=TrainingOptions(max_epochs=1, batch_size=64, progress=False),
    adaptation=TrainingOptions(patience=None, max_steps=3, batch_size=64),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """The folder of a small demo, what it showed, and what it found."""
    from stlora_peft.files import read_json

    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DemoSettings", lambda: SMALL)
        result = CliRunner().invoke(cli.app, ["demo", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder, result.stdout, read_json(folder / "demo.json")


def test_demo_writes_everything_that_it_names(written: tuple[Path, str, dict[str, Any]]) -> None:
    folder, screen, _ = written
    places = Places(folder)
    results = [places.comparison / name for name in ("results.json", "results.md", "results.png")]
    for path in (places.source, places.target, places.base, places.adapter, places.picture, *results):
        assert path.exists(), path
    for path in (places.source, places.base, places.adapter, places.picture, *results[1:]):
        assert str(path) in screen
    assert places.picture.read_bytes().startswith(b"\x89PNG")


def test_demo_shows_every_method_and_the_identity(written: tuple[Path, str, dict[str, Any]]) -> None:
    _, screen, found = written
    assert [row["method"] for row in found["rows"]] == ["zero-shot", "persistence", "head", "full", "lora", "st-lora"]
    for row in found["rows"]:
        assert row["method"] in screen
    assert found["identical"] is True
    assert found["largest_difference"] == 0
    assert "identical bit for bit, largest difference 0" in screen
    assert "One seed and one learning rate" in screen


def test_demo_saves_the_adapter_whose_error_is_in_the_table(written: tuple[Path, str, dict[str, Any]]) -> None:
    from stlora_peft.data import load_city

    folder, _, found = written
    places = Places(folder)
    saved, city = load_backbone(places.base), load_city(places.target)
    data = adaptation_data(saved, city, SMALL.days)
    model = load_adapter(saved.backbone, places.adapter, city)
    assert evaluate(model, data.test, data).mae == found["rows"][-1]["mae"] == found["loaded_mae"]


def test_demo_cities_differ_in_size_and_graph(written: tuple[Path, str, dict[str, Any]]) -> None:
    from stlora_peft.data import load_city

    places = Places(written[0])
    source, target = load_city(places.source), load_city(places.target)
    assert (source.num_nodes, target.num_nodes) == (5, 4)
    assert set(source.node_ids).isdisjoint(target.node_ids)


def test_demo_runs_again_over_its_own_folder_but_not_over_another(
    written: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    from stlora_peft.cli.demo import check_folder

    check_folder(written[0])
    check_folder(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        f"Error: '{tmp_path}' holds something that is not of the demo.",
        "  expected: a new or empty folder, or one with 'demo.json' of an earlier demo in it",
        "  got:      a folder with other files",
        "  to fix:   give another --out",
    ]


def test_round_trip_with_one_other_forecast_is_not_identical() -> None:
    forecasts = torch.zeros(2, 3, 4, 1)
    other = forecasts.clone()
    other[1, 2, 3, 0] = 0.25
    assert RoundTrip(forecasts, forecasts.clone(), forecasts, mae=0.0).identical
    trip = RoundTrip(forecasts, other, forecasts, mae=0.0)
    assert not trip.identical
    assert trip.difference == 0.25


def test_demo_that_was_interrupted_can_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "simulate", interrupt)
    words = ["demo", "--out", str(tmp_path / "out")]
    for _ in range(2):
        result = CliRunner().invoke(cli.app, words)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "Interrupted.")
