"""Cities come, change and go while others are served."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cities import SIZES, Cities, furthest, make_cities, make_readings
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from toys import error_lines, pristine, raised, small_backbone

from stlora_peft import MultiCity
from stlora_peft.storage import SavedBackbone, load_adapter, save_adapter

ROUNDING = 1e-6
"""A forward over more nodes may take another kernel, whose sums are rounded otherwise."""


def same(found: Any, expected: Any) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def cities() -> Cities:
    return make_cities("stgcn")


READINGS = make_readings()


def test_a_city_that_comes_changes_and_goes_leaves_the_others_as_they_were(cities):
    served = MultiCity(cities.backbone)
    others = {name: READINGS[name] for name in ("ara", "cim")}
    for name in others:
        cities.add_to(served, name)
    before = served.forecast(others)
    cities.add_to(served, "bor")
    expected = cities.one_by_one(READINGS)
    assert furthest({name: served.forecast(READINGS)[name] for name in others}, before) < ROUNDING
    assert same(served.forecast(others), before)  # the same cities, in a forward of their own
    cities.model.set_adapter("ara")
    served.replace("ara", cities.model, **cities.around("ara") | {"edge_weight": torch.ones(12)})
    after = served.forecast(READINGS)
    assert not torch.equal(after["ara"], expected["ara"])
    assert furthest({"cim": after["cim"]}, {"cim": before["cim"]}) < ROUNDING
    served.remove("ara")
    assert served.names == ("cim", "bor")
    assert furthest(served.forecast({"cim": READINGS["cim"]}), {"cim": before["cim"]}) < ROUNDING


def test_cities_of_another_forward_stay_bitwise_the_same(cities):
    served = MultiCity(cities.backbone, max_nodes=32)
    for name in ("ara", "cim"):
        cities.add_to(served, name)
    others = {name: READINGS[name] for name in ("ara", "cim")}
    before, kept = served.forecast(others), served._state.groups[0].network
    cities.add_to(served, "bor")
    found = served.forecast(READINGS)
    assert served._state.groups[0].network is kept
    assert same({name: found[name] for name in others}, before)
    served.remove("bor")
    assert same(served.forecast(others), before)


@settings(max_examples=6, deadline=None)
@given(name=st.sampled_from(list(SIZES)), max_nodes=st.sampled_from([1, 32, 2048]))
def test_adding_and_removing_a_city_is_the_identity(name, max_nodes):
    cities = _shared()
    others = {key: READINGS[key] for key in SIZES if key != name}
    served = MultiCity(cities.backbone, max_nodes=max_nodes)
    for key in others:
        cities.add_to(served, key)
    before = served.forecast(others)
    cities.add_to(served, name)
    assert len(served) == 3
    assert name in served
    served.remove(name)
    assert len(served) == 2
    assert name not in served
    assert same(served.forecast(others), before)


def test_a_city_can_come_from_its_folder(cities, tmp_path):
    served = MultiCity(cities.backbone)
    for name in SIZES:
        cities.model.set_adapter(name)
        save_adapter(tmp_path / name, cities.model)
        served.add(name, tmp_path / name, **cities.around(name))
    assert furthest(served.forecast(READINGS), cities.one_by_one(READINGS)) < 1e-5
    assert same(served.forecast(READINGS), cities.served().forecast(READINGS))


def test_a_city_alone_can_come_from_its_folder(tmp_path):
    cities = make_cities("agcrn")
    served = MultiCity(cities.backbone)
    for name in SIZES:
        cities.model.set_adapter(name)
        save_adapter(tmp_path / name, cities.model)
        served.add(name, str(tmp_path / name), **cities.around(name))
    assert furthest(served.forecast(READINGS), cities.one_by_one(READINGS)) < ROUNDING
    weights = {group.network.model.get_base_model().head.weight.data_ptr() for group in served._state.groups}
    assert weights == {served._state.backbone.head.weight.data_ptr()}  # kept once for all


def test_a_loaded_adapter_and_a_saved_backbone_are_taken(cities, tmp_path):
    cities.model.set_adapter("ara")
    save_adapter(tmp_path / "ara", cities.model)
    scaler = cities.scalers["ara"]
    saved = SavedBackbone(cities.backbone, scaler, "la", "speed", "day", "", {})
    served = MultiCity(saved)
    served.add("ara", load_adapter(cities.backbone, tmp_path / "ara"), **cities.around("ara"))
    asked = {"ara": READINGS["ara"]}
    assert furthest(served.forecast(asked), cities.one_by_one(asked)) < 1e-5
    assert "weeks" not in repr(served.report())
    with pytest.raises(ValueError, match="4 time encodings"):
        MultiCity(saved, time_features="week").add("ara", cities.model, **cities.around("ara"))


# -- what fails leaves everything as it was -----------------------------------------------------------------


def damaged(change: Callable[[Path], Any]) -> Callable[[Cities, Path], dict[str, Any]]:
    def prepare(cities: Cities, folder: Path) -> dict[str, Any]:
        change(folder)
        return {"adapter": folder}

    return prepare


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def other_backbone(cities: Cities, folder: Path) -> dict[str, Any]:
    return {"adapter": make_cities("stgcn", {"bor": 19}, seed=3).model}


def several_active(cities: Cities, folder: Path) -> dict[str, Any]:
    cities.model.base_model.set_adapter(["ara", "cim"])
    return {"adapter": cities.model}


def plain_lora(cities: Cities, folder: Path) -> dict[str, Any]:
    return {"adapter": get_peft_model(pristine(cities.backbone), LoraConfig(target_modules=["head.hidden"]))}


FAILURES: dict[str, tuple[Callable[[Cities, Path], dict[str, Any]], str, str]] = {
    "no folder": (lambda c, f: {"adapter": f / "none"}, "there is no adapter in folder", ""),
    "no weights": (damaged(lambda f: (f / "adapter_model.safetensors").unlink()), "adapter_model.safetensors", ""),
    "truncated": (damaged(truncate), "adapter_model.safetensors", ""),
    "no JSON": (damaged(lambda f: (f / "adapter_config.json").write_text("{")), "adapter_config.json", ""),
    "another backbone": (damaged(edit(base_fingerprint="0" * 64)), "belongs to another backbone", "fingerprint"),
    "another backbone, loaded": (other_backbone, "belongs to another backbone", "fingerprint"),
    "no scaler": (damaged(edit(scaler=None)), "city 'bor' is not added", "scaler=None"),
    "scaler of two channels": (
        damaged(edit(scaler={"mean": [1.0, 2.0], "std": [1.0, 1.0]})),
        "city 'bor' is not added",
        "2 channel(s)",
    ),
    "another number of nodes": (lambda c, f: {"num_nodes": 18}, "city 'bor' is not added", "18 nodes"),
    "other nodes": (lambda c, f: {"node_ids": ["a", "b"]}, "belongs to other nodes", "2 nodes"),
    "an edge to nowhere": (lambda c, f: {"edge_index": [[0], [19]]}, "city 'bor'", "from 0 to 19"),
    "edges of another shape": (lambda c, f: {"edge_index": torch.zeros(3, 2)}, "city 'bor'", "shape (3, 2)"),
    "too few weights": (lambda c, f: {"edge_weight": torch.ones(3)}, "city 'bor'", "shape (3,)"),
    "no step of time": (lambda c, f: {"interval_minutes": 0}, "city 'bor'", "0"),
    "several adapters": (several_active, "city 'bor' is not added", "'ara' (STLoraConfig), 'cim' (STLoraConfig)"),
    "plain LoRA": (plain_lora, "city 'bor' is not added", "LoraConfig"),
}


@pytest.mark.parametrize("change", ["add", "replace"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_change_leaves_everything_as_it_was(cities, tmp_path, case, change):
    prepare, where, got = FAILURES[case]
    cities.model.set_adapter("bor")
    save_adapter(tmp_path, cities.model)
    served = MultiCity(cities.backbone)
    for name in SIZES if change == "replace" else ("ara", "cim"):
        cities.add_to(served, name)
    known = {name: READINGS[name] for name in served.names}
    before, state = served.forecast(known), served._state
    arguments = {"adapter": tmp_path, **cities.around("bor"), **prepare(cities, tmp_path)}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        getattr(served, change)("bor", arguments.pop("adapter"), **arguments)
    lines = error_lines(caught.value)
    assert where in lines["where"]
    assert got in lines["got"]
    assert served._state is state
    assert same(served.forecast(known), before)


def test_names_that_are_taken_or_unknown_are_refused(cities):
    served = cities.served()
    cities.model.set_adapter("bor")
    again = raised(lambda: served.add("bor", cities.model, **cities.around("bor")))
    assert (again["where"], again["fix"]) == ("city 'bor' is not added", "call replace or remove")
    for action in (lambda: served.remove("xyz"), lambda: served.replace("xyz", cities.model)):
        assert raised(action)["expected"] == "one of 'ara', 'bor', 'cim'"
    assert raised(lambda: MultiCity(cities.backbone).remove("xyz"))["expected"] == "one of none yet"


def test_a_shared_adapter_for_any_number_of_nodes_says_that_it_needs_one():
    cities = make_cities("lstm", conditioning="shared")
    cities.model.set_adapter("ara")
    cities.model.peft_config["ara"].num_nodes = None
    served = MultiCity(cities.backbone)
    assert "num_nodes=" in raised(lambda: cities.add_to(served, "ara"))["fix"]
    served.add("ara", cities.model, **cities.around("ara"), num_nodes=5)
    asked = {"ara": READINGS["ara"]}
    assert furthest(served.forecast(asked), cities.one_by_one(asked)) < 1e-5


def test_a_backbone_that_does_not_say_its_window_is_refused():
    assert raised(lambda: MultiCity(torch.nn.Linear(2, 2)))["got"] == "a Linear without it"


# -- threads and costs --------------------------------------------------------------------------------------


def test_a_forecast_sees_the_old_or_the_new_cities_and_nothing_between(cities):
    served = cities.served()
    old = served.forecast(READINGS)
    changed = cities.around("bor") | {"edge_weight": torch.ones(cities.around("bor")["edge_index"].shape[1])}
    cities.model.set_adapter("bor")
    other = MultiCity(cities.backbone)
    for name in SIZES:
        cities.add_to(other, name)
    cities.model.set_adapter("bor")
    other.replace("bor", cities.model, **changed)
    new = other.forecast(READINGS)
    assert furthest(new, old) > 1e-4
    found, errors, stop = [], [], threading.Event()

    def forecasting() -> None:
        while not stop.is_set():
            try:
                found.append(served.forecast(READINGS))
            except Exception as error:  # to be shown by the test, not lost in the thread
                errors.append(error)

    threads = [threading.Thread(target=forecasting) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(6):
        served.replace("bor", cities.model, **(changed if i % 2 == 0 else cities.around("bor")))
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) > 2
    for forecasts in found:
        assert min(furthest(forecasts, old), furthest(forecasts, new)) < ROUNDING


def test_report_says_what_each_city_costs(cities):
    served = cities.served()
    rows = {row.name: row for row in served.report()}
    assert [(name, row.num_nodes) for name, row in rows.items()] == list(SIZES.items())
    assert all(row.seconds > 0 and row.num_bytes > 0 and row.stacked_bytes == 0 for row in rows.values())
    assert rows["bor"].num_bytes > rows["cim"].num_bytes
    config = cities.model.peft_config["ara"]
    own = sum(v.nbytes for n, v in cities.model.state_dict().items() if n.endswith(".ara") or ".ara." in n)
    assert rows["ara"].num_bytes == own, config.conditioning
    served.forecast(READINGS)
    assert all(row.stacked_bytes > 0 for row in served.report())


_cache: list[Cities] = []


def _shared() -> Cities:
    if not _cache:
        _cache.append(make_cities("lstm"))
    return _cache[0]


def test_small_backbone_of_another_seed_has_other_weights():
    assert not torch.equal(small_backbone("lstm").head.weight, small_backbone("lstm", seed=3).head.weight)
