"""``stlora convert`` and ``stlora table``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from small_city import small_city
from test_cli import answer, mistake, run

from stlora_peft.data import load_city
from stlora_peft.files import read_json

BUDGET = ["--backbones", "lstm", "--quick", "--epochs", 1, "--batch-size", 64, "--seeds", 1, "--time-features", "day"]


@pytest.fixture(scope="module")
def cities(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two city files between commas."""
    folder = tmp_path_factory.mktemp("cities")
    for name, nodes in (("here", 4), ("there", 3)):
        small_city(num_nodes=nodes, num_days=8, name=name).save(folder / f"{name}.npz")
    return f"{folder / 'here.npz'}, {folder / 'there.npz'}"


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as PEMS03 is published, with its names and its distances."""
    folder = tmp_path_factory.mktemp("pems")
    data = np.arange(2 * 3 * 288, dtype=np.float64).reshape(288, 3, 2) % 7
    np.savez(folder / "PEMS03.npz", data=data)
    (folder / "PEMS03.txt").write_text("316\n317\n400\n")
    (folder / "PEMS03.csv").write_text("from,to,distance\n316,317,100.0\n400,316,250.0\n")
    return folder


# -- convert ------------------------------------------------------------------------------------------------


def test_convert_puts_readings_names_graph_and_clock_into_one_file(pems: Path, tmp_path: Path) -> None:
    out = tmp_path / "pems03.npz"
    given = ["--graph", pems / "PEMS03.csv", "--ids", pems / "PEMS03.txt", "--channels", 0, "--zeros-missing"]
    named = ["--start", "2018-09-01T00:00", "--quantity", "flow (vehicles per 5 min)"]
    found = answer("convert", pems / "PEMS03.npz", *given, *named, "--out", out)
    city = load_city(out)
    assert (city.name, city.node_ids, city.interval_minutes) == ("pems03", ("316", "317", "400"), 5)
    assert (str(city.start), city.quantity) == ("2018-09-01 00:00:00", "flow (vehicles per 5 min)")
    expected = np.load(pems / "PEMS03.npz")["data"][..., :1]
    np.testing.assert_array_equal(city.values, np.where(expected == 0, np.nan, expected))
    assert sorted(map(tuple, city.edge_index.T.tolist())) == [(0, 1), (2, 0)]
    missing = float((expected == 0).mean())
    assert found == {
        "out": str(out),
        "num_nodes": 3,
        "num_edges": 2,
        "num_steps": 288,
        "interval_minutes": 5,
        "start": "2018-09-01T00:00:00",
        "quantity": "flow (vehicles per 5 min)",
        "missing": pytest.approx(missing),
    }
    again = mistake("convert", pems / "PEMS03.npz", *given, "--out", out)
    assert again[0] == f"Error: '{out}' exists already."


def test_convert_says_what_it_wrote_and_what_comes_next(cities: str, tmp_path: Path) -> None:
    shown = run("convert", cities.split(",")[0], "--out", tmp_path / "copy.npz").stdout
    assert "copy: 4 sensors, 4 edges, 192 steps of 60 minutes from 2024-03-04T00:00:00, speed" in shown
    assert f"stlora pretrain {tmp_path / 'copy.npz'} --backbone stgcn --out runs/copy" in shown


# -- table --------------------------------------------------------------------------------------------------


def test_table_writes_rows_pages_figure_and_models_and_reads_them_again(cities: str, tmp_path: Path) -> None:
    words = ["table", "--cities", cities, *BUDGET, "--baselines", "ha", "--out", tmp_path]
    found = answer(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "models",
        "results.json",
        "results.md",
        "results.png",
        "results.tex",
    ]
    assert found["rows"] == read_json(tmp_path / "results.json")
    labels = {(row["city"], row["regime"], row["model"], row["stlora"]) for row in found["rows"]}
    assert len(labels) == 2 * (3 + 4)
    page = (tmp_path / "results.md").read_text()
    assert "| stride | 4 |" in page
    assert "max_epochs: 1;" in page
    assert "hidden_size: 32" in page
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("rows.json")}
    again = run(*words)
    assert again.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("rows.json")} == times
    shown = again.stdout
    for text in ("here, joint: ", "there, adapt: ", "lstm+", "lstm-longer", "Δ longer", "180 min", "results.tex"):
        assert text in shown


def test_table_of_one_regime_without_baselines_and_without_matplotlib(
    cities: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    only = ["--baselines", "", "--regimes", "joint", "--cities", cities.split(",")[0]]
    result = run("table", *BUDGET, *only, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "No figure: pip install 'stlora-peft[figures]'" in result.stderr
    assert "results.png" not in (tmp_path / "results.md").read_text()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["model"], row["stlora"], row["regime"]) for row in rows] == [
        ("lstm", False, "joint"),
        ("lstm", True, "joint"),
    ]


@pytest.mark.parametrize(
    ("words", "where", "got"),
    [
        (["--backbones", "wavenet"], "backbone in a table cannot be used", "wavenet"),
        (["--backbones", " , "], "table cannot be used", "none"),
        (["--regimes", "both"], "regime in a table cannot be used", "both"),
        (["--baselines", "ha,mean"], "baseline in a table cannot be used", "mean"),
        (["--seeds", "0"], "table cannot be used", "none"),
        (["--seeds", "one"], "option '--seeds' cannot be read", "'one'"),
        (["--shares", "0.6"], "option '--shares' cannot be read", "'0.6'"),
        (["--shares", "0.6,much"], "option '--shares' cannot be read", "'0.6,much'"),
        (["--shares", "0.9,0.2"], "shares of the parts are out of range", "train_share=0.9, val_share=0.2"),
    ],
)
def test_table_mistakes_are_named(cities: str, tmp_path: Path, words: list[str], where: str, got: str) -> None:
    lines = mistake("table", "--cities", cities, *BUDGET, *words, "--out", tmp_path / "t")
    assert (lines[0], lines[2]) == (f"Error: {where}.", f"  got:      {got}")
    assert not (tmp_path / "t").exists()


def test_table_with_equal_shares_is_read_as_two(cities: str, tmp_path: Path) -> None:
    only = ["--baselines", "ha", "--regimes", "joint", "--cities", cities.split(",")[0], "--shares", "0.3,0.3"]
    assert run("table", *BUDGET, *only, "--out", tmp_path).exit_code == 0
    assert "| shares | 0.3, 0.3 |" in (tmp_path / "results.md").read_text()


def test_table_takes_a_number_of_seeds_or_a_list(cities: str, tmp_path: Path) -> None:
    only = ["--baselines", "ha", "--regimes", "joint", "--cities", cities.split(",")[0]]
    for given, expected in (("2", [0, 1]), ("3,1", [3, 1])):
        rows = answer("table", *BUDGET, *only, "--seeds", given, "--out", tmp_path)["rows"]
        assert [row["seed"] for row in rows if row["model"] == "ha"] == expected


def test_table_with_another_budget_in_the_same_folder_is_refused(cities: str, tmp_path: Path) -> None:
    words = ["table", "--cities", cities.split(",")[0], *BUDGET, "--baselines", "", "--out", tmp_path]
    assert run(*words).exit_code == 0
    lines = mistake(*words, "--learning-rate", 0.5)
    assert lines[0] == f"Error: rows '{tmp_path}/models/here/lstm-seed0/rows.json' cannot be continued."
