"""``stlora extend``: sensors that are new in an adapted city."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_cli import QUICK, answer, mistake, run

from stlora_peft.cli.extend import SHOWN, given_steps, nearest_table
from stlora_peft.cli.options import named
from stlora_peft.data import City, adaptation_split, load_city, simulate_city
from stlora_peft.extension import extend_adapter
from stlora_peft.storage import load_adapter, load_backbone

ADDED = (2, 5)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a city before and after it had new sensors, and an adapter from before."""
    folder = tmp_path_factory.mktemp("work")
    hourly = {"days": 8, "interval_minutes": 60}
    simulate_city(num_nodes=3, seed=0, name="home", **hourly).save(folder / "home.npz")
    now = simulate_city(num_nodes=6, seed=1, name="away", **hourly)
    now.save(folder / "now.npz")
    now.select_nodes(node for node in range(6) if node not in ADDED).save(folder / "before.npz")
    base = ["--base", folder / "base"]
    pretrained = run("pretrain", folder / "home.npz", "--out", folder / "base", "--width", 4, *QUICK)
    assert pretrained.exit_code == 0, pretrained.output
    short = ["--out", folder / "adapter", "--conditioning", "gate", *QUICK, "--refit-steps", 2]
    adapted = run("adapt", folder / "before.npz", *base, *short)
    assert adapted.exit_code == 0, adapted.output
    return folder


@pytest.fixture
def words(work: Path, tmp_path: Path) -> list[object]:
    """The command, as far as it has to be typed."""
    given = ["--base", work / "base", "--adapter", work / "adapter"]
    return ["extend", work / "now.npz", *given, "--out", tmp_path / "larger"]


def test_extend_writes_the_adapter_of_extend_adapter(work: Path, words: list[object], tmp_path: Path) -> None:
    found = answer(*words)
    backbone, city = load_backbone(work / "base").backbone, load_city(work / "now.npz")
    given = adaptation_split(city.num_steps, city.steps_per_day).given
    expected = extend_adapter(load_adapter(backbone, work / "adapter"), backbone, city, given=given)
    written = load_adapter(backbone, tmp_path / "larger", city)
    for key, value in expected.state_dict().items():
        assert torch.equal(written.state_dict()[key], value), key
    new = [city.node_ids[node] for node in ADDED]
    assert (found["old_sensors"], list(found["new_sensors"])) == (4, new)
    for shares in found["new_sensors"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert len(shares) == 1
        assert not set(shares) & set(new)
    assert found["adapter_bytes"] == (tmp_path / "larger" / "adapter_model.safetensors").stat().st_size
    assert {key: found[key] for key in ("out", "base", "adapter", "city", "days")} == {
        "out": str(tmp_path / "larger"),
        "base": str(work / "base"),
        "adapter": str(work / "adapter"),
        "city": "away",
        "days": None,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["larger"]


def test_extend_shows_the_new_sensors_and_a_next_command_that_runs(work: Path, words: list[object]) -> None:
    result = run(*words, "--neighbours", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "Extended the adapter of away: 4 sensors, and 2 new ones"
    city = load_city(work / "now.npz")
    rows = [line.split() for line in lines if line.strip()[-5:-2] == " 0." or line.endswith("1.00")]
    assert [row[0] for row in rows if len(row) == 3] == [city.node_ids[node] for node in ADDED]
    assert len(rows) == 4
    weights = [float(row[-1]) for row in rows]
    assert weights[0] + weights[1] == pytest.approx(1, abs=0.011)
    assert weights[0] >= weights[1]
    following = shlex.split(lines[-1])
    assert following[:2] == ["stlora", "evaluate"]
    evaluated = run(*following[1:])
    assert evaluated.exit_code == 0, evaluated.output
    assert "with adapter" in evaluated.stdout


def test_extend_with_an_option_of_reading_repeats_it_in_the_next_command(words: list[object]) -> None:
    assert run(*words, "--quantity", "km/h").stdout.splitlines()[-1].endswith("--quantity km/h")


def test_extend_over_an_adapter_needs_force_and_can_replace_the_one_that_it_reads(
    work: Path, words: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "larger"
    shutil.copytree(work / "adapter", out)
    assert mistake(*words) == [
        f"Error: '{out}' exists already.",
        "  expected: a new or empty folder for the adapter",
        "  got:      an adapter",
        "  to fix:   give another --out, or --force to overwrite it",
    ]
    before = load_file(out / "adapter_model.safetensors")
    words[words.index("--adapter") + 1] = out
    assert run(*words, "--force").exit_code == 0
    after = load_file(out / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    gate = next(key for key in after if key.endswith("nall_gate"))
    assert (len(before[gate]), len(after[gate])) == (4, 6)


def test_extend_of_a_city_without_new_sensors_writes_nothing(work: Path, words: list[object], tmp_path: Path) -> None:
    words[1] = work / "before.npz"
    assert mistake(*words)[-4:] == [
        "Error: city 'away' has no new node.",
        "  expected: nodes beside the 4 of stlora adapter 'default'",
        "  got:      its nodes alone",
        "  to fix:   use the adapter as it is, with the readings in its order of nodes",
    ]
    assert not list(tmp_path.iterdir())


def test_extend_with_days_compares_these_days_alone(work: Path, words: list[object], tmp_path: Path) -> None:
    city = load_city(work / "now.npz")
    values = city.values.copy()
    values[: 7 * 24, ADDED[1]] = np.nan  # a sensor of the last day, which is in the test part
    dataclasses.replace(city, values=values, dead_sensors="error", where="").save(tmp_path / "late.npz")
    words[1] = tmp_path / "late.npz"
    name = city.node_ids[ADDED[1]]
    lines = mistake(*words)
    assert lines[-2:] == [
        f"  got:      no such step for '{name}' among {8 * 24 - round(0.2 * 8 * 24)} given steps",
        "  to fix:   give more steps (given, --days), or leave these nodes out until they have readings",
    ]
    assert name in answer(*words, "--days", 8)["new_sensors"]


@pytest.mark.parametrize("days", ["9", "0", "-1", "nan", "0.01"])
def test_days_that_are_no_part_of_the_record_are_refused(words: list[object], days: str) -> None:
    assert mistake(*words, "--days", days)[-4:] == [
        "Error: option '--days' is out of range.",
        "  expected: days above 0 and up to 8, the whole record",
        f"  got:      {float(days):g}",
        "  to fix:   give other days, or leave the option out",
    ]


def test_given_steps_leave_the_test_part_out_unless_days_reach_into_it(work: Path) -> None:
    city = load_city(work / "now.npz")
    split = adaptation_split(city.num_steps, city.steps_per_day)
    assert given_steps(city, None) == range(split.test.start)
    assert given_steps(city, 8) == range(city.num_steps)
    assert given_steps(city, 1.5) == range(36)


def test_extend_of_a_city_with_other_channels_is_refused(work: Path, words: list[object], tmp_path: Path) -> None:
    city = load_city(work / "now.npz")
    two = City(
        np.tile(city.values, (1, 1, 2)), city.edge_index, city.edge_weight, 60, city.node_ids, city.start, name="away"
    )
    two.save(tmp_path / "two.npz")
    words[1] = tmp_path / "two.npz"
    assert mistake(*words)[-4] == "Error: city 'away' does not fit the backbone, which was trained on home."


def test_table_shows_the_first_sensors_of_many_and_names_with_brackets_whole() -> None:
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(nearest_table({f"[{node}]": {"[old]": 1.0} for node in range(SHOWN + 2)}))
    text = capture.get()
    assert f"[{SHOWN - 1}]" in text
    assert f"[{SHOWN}]" not in text
    assert text.count("[old]") == SHOWN
    assert "and 2 more, which --json lists" in text


def test_the_citys_name_may_hold_brackets(work: Path, words: list[object], tmp_path: Path) -> None:
    named(load_city(work / "now.npz"), name="[bold]").save(tmp_path / "odd.npz")
    words[1] = tmp_path / "odd.npz"
    assert run(*words).stdout.startswith("Extended the adapter of [bold]: 4 sensors")
