"""Cities forecast together equal cities forecast one after the other."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
import torch
from cities import SIZES, WINDOW, furthest, make_cities, make_readings
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from toys import ALL_BACKBONES, CONDITIONINGS, pristine, raised, randomised

from stlora_peft import MultiCity, PredictorConfig, STLoraConfig
from stlora_peft.data import time_encoding

CLOSE = 1e-5
MIXING = {
    "agcrn": "a node hears more than its edges tell",
    "evolvegcnh": "a node hears more than its edges tell",
    "aagcn": "node-bound",
    "astgcn": "node-bound",
    "d2stgnn": "node-bound",
    "dnntsp": "node-bound",
    "gman": "a node hears more than its edges tell",
    "gwnet": "node-bound",
    "mtgnn": "node-bound",
    "staeformer": "node-bound",
}
"""Backbones whose cities are served alone, and why."""


@pytest.mark.parametrize("name", ALL_BACKBONES)
def test_every_backbone_is_served_and_joined_unless_it_mixes_nodes(name):
    cities, readings = make_cities(name), make_readings()
    served = cities.served()
    assert furthest(served.forecast(readings), cities.one_by_one(readings)) < CLOSE
    for row in served.report():
        assert MIXING.get(name, "") in row.alone
        assert bool(row.alone) == (name in MIXING)


@pytest.mark.parametrize("predictor", ["auto", None])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("name", ["stgcn", "lstm", "dcrnn", "gconvgru", "gwnet", "agcrn", "staeformer"])
def test_forecast_equals_the_set_adapter_loop(name, conditioning, predictor):
    cities, readings = make_cities(name, conditioning=conditioning, predictor=predictor), make_readings()
    served = cities.served()
    found, expected = served.forecast(readings), cities.one_by_one(readings)
    assert furthest(found, expected) < CLOSE
    others = make_readings({key: size + 1 for key, size in SIZES.items()})
    assert furthest(expected, cities.one_by_one({key: others[key][:, 1:] for key in SIZES})) > 1e-3


def test_comparison_notices_two_adapters_that_were_swapped():
    cities = make_cities("stgcn", {"ara": 5, "bor": 5})
    readings = make_readings({"ara": 5, "bor": 5})
    found = cities.served().forecast(readings)
    assert furthest({"ara": found["bor"], "bor": found["ara"]}, cities.one_by_one(readings)) > 1e-3


@pytest.mark.parametrize("name", ["stgcn", "agcrn"])
def test_gaps_longer_records_and_the_clock_are_those_of_one_city(name):
    cities, start = make_cities(name), datetime(2024, 3, 4, 7)
    served = cities.served()
    for steps in (WINDOW, WINDOW + 3, 3 * WINDOW):
        readings = make_readings(steps=steps, gaps=True)
        readings["bor"][-WINDOW:, 0] = torch.nan
        assert furthest(served.forecast(readings), cities.one_by_one(readings)) < CLOSE
        assert furthest(served.forecast(readings, start=start), cities.one_by_one(readings, start)) < CLOSE
    later = served.forecast(readings, start={"ara": start + timedelta(hours=5), "bor": "2024-03-04T07:00"})
    assert furthest({"bor": later["bor"]}, {"bor": cities.alone("bor", readings["bor"], start)}) < CLOSE
    assert not torch.allclose(later["ara"], cities.alone("ara", readings["ara"], start))


def test_a_backbone_that_reads_no_clock_needs_none():
    cities = make_cities("lstm", backbone_options={"in_channels": 1})
    served, readings = cities.served(time_features="none"), make_readings(gaps=True)
    found = served.forecast(readings)
    assert furthest(found, cities.one_by_one(readings)) < CLOSE
    assert all(
        torch.equal(found[name], value) for name, value in served.forecast(readings, start="2024-03-04").items()
    )


def test_several_windows_of_a_city_are_several_forecasts_and_cities_may_have_different_numbers_of_them():
    cities, start = make_cities("stgcn"), datetime(2024, 3, 4, 7)
    record = make_readings(steps=3 * WINDOW, gaps=True)
    starts = [start + timedelta(hours=hours) for hours in (0, 4, 6)]
    windows = {name: torch.stack([values[i : i + 2 * WINDOW] for i in (0, 4, 6)]) for name, values in record.items()}
    windows["cim"] = windows["cim"][:1]
    found = cities.served().forecast(windows, start={"ara": starts, "bor": starts, "cim": start})
    for name, values in windows.items():
        expected = [cities.alone(name, each, moment) for each, moment in zip(values, starts, strict=False)]
        assert furthest({name: found[name]}, {name: torch.stack(expected)}) < CLOSE


def test_adapters_of_different_forms_ranks_and_widths_are_served_side_by_side():
    each = {
        "ara": {"conditioning": "gate", "r": 2},
        "bor": {"conditioning": "embedding", "r": 2, "emb_size": 5},
        "cim": {"conditioning": "embedding", "r": 2, "emb_size": 3, "lora_alpha": 1},
        "dol": {"conditioning": "core", "r": 3},
        "els": {"conditioning": "full", "r": 2, "predictor": None},
        "fin": {"conditioning": "shared", "rank_pattern": {"conv_1": 5}},
        "gor": {"conditioning": "bias", "r": 2, "use_rslora": True},
        "hex": {"conditioning": "gate", "r": 2, "target_modules": ["head.output"]},
        "ino": {"conditioning": "gate", "r": 2, "predictor": PredictorConfig(history_channels=3)},
    }
    sizes = {name: 4 + 3 * i for i, name in enumerate(each)}
    cities, readings = make_cities("stgcn", sizes, each), make_readings(sizes)
    served = cities.served()
    assert furthest(served.forecast(readings), cities.one_by_one(readings)) < CLOSE
    assert not any(row.alone for row in served.report())
    together = [[member.name for member in group.members] for group in served._state.groups]
    assert ["ino"] in together
    assert ["ara", "bor", "cim", "gor"] in together  # one computation once the node vectors have been read


def test_a_city_with_layers_that_were_trained_whole_is_served_alone():
    cities, readings = make_cities("lstm", target_modules=["lstm"], modules_to_save=["head"]), make_readings()
    served = cities.served()
    assert furthest(served.forecast(readings), cities.one_by_one(readings)) == 0
    assert {row.alone for row in served.report()} == {"its 'head' is trained whole (modules_to_save)"}
    with torch.no_grad():
        for parameter in cities.model.parameters():
            parameter.add_(1.0)
    assert furthest(served.forecast(readings), cities.one_by_one(readings)) > 1e-3  # it has copies of its own


@pytest.mark.parametrize("max_nodes", [1, 40, 2048])
def test_cities_are_cut_into_forwards_of_at_most_so_many_nodes(max_nodes):
    cities, readings = make_cities("dcrnn"), make_readings()
    served = cities.served(max_nodes=max_nodes)
    assert len(served._state.groups) == {1: 3, 40: 2, 2048: 1}[max_nodes]
    assert furthest(served.forecast(readings), cities.one_by_one(readings)) < CLOSE


@settings(max_examples=10, deadline=None)
@given(names=st.permutations(list(SIZES)))
def test_order_of_adding_and_of_asking_does_not_matter(names):
    cities, readings = _once()
    served = MultiCity(cities.backbone)
    for name in names:
        cities.add_to(served, name)
    asked = {name: readings[name] for name in reversed(names)}
    assert list(served.forecast(asked)) == list(asked)
    assert furthest(served.forecast(readings), cities.one_by_one(readings)) < CLOSE


@settings(max_examples=8, deadline=None)
@given(names=st.sets(st.sampled_from(list(SIZES)), min_size=1))
def test_some_of_the_cities_can_be_forecast(names):
    cities, readings = _once()
    served = cities.served()
    asked = {name: readings[name] for name in sorted(names)}
    assert furthest(served.forecast(asked), cities.one_by_one(asked)) < CLOSE
    assert served.forecast({}) == {}


def test_half_precision_backbone_keeps_its_adapters_in_float32():
    cities, readings = make_cities("lstm"), make_readings()
    backbone = cities.backbone.to(torch.bfloat16)
    served, clock = MultiCity(backbone), time_encoding(WINDOW, 60, None, "day")[:, None]
    expected = {}
    for name, size in SIZES.items():
        config = STLoraConfig(num_nodes=size, scaler=cities.scalers[name].to_dict())
        model = randomised(get_peft_model(pristine(backbone), config)).eval()
        served.add(name, model, **cities.around(name))
        scaled = cities.scalers[name].transform(readings[name])
        x = torch.cat([scaled, clock.expand(-1, size, -1)], 2)[None].bfloat16()
        own = cities.around(name)
        expected[name] = cities.scalers[name].inverse(model(x, own["edge_index"], own["edge_weight"]).float())[0]
    assert {factors.tensors["B"].dtype for factors in served._state.members["ara"].parts.layers.values()} == {
        torch.float32
    }
    assert furthest(served.forecast(readings), expected) < 2e-2


def test_frozen_weights_are_kept_once_and_are_not_the_callers():
    cities = make_cities("stgcn")
    served = cities.served(max_nodes=1)
    served.forecast(make_readings())
    pointers = {group.network.net.head.hidden.base_layer.weight.data_ptr() for group in served._state.groups}
    assert len(pointers) == 1
    before = served.forecast(make_readings())
    with torch.no_grad():
        for parameter in (*cities.backbone.parameters(), *cities.model.parameters()):
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in served.forecast(make_readings()).items())


@pytest.mark.parametrize(
    ("readings", "got"),
    [
        (torch.zeros(WINDOW, 4, 1), "shape (9, 4, 1)"),
        (torch.zeros(WINDOW - 1, 5, 1), "shape (8, 5, 1)"),
        (torch.zeros(WINDOW, 5, 2), "shape (9, 5, 2)"),
        (torch.zeros(WINDOW, 5), "shape (9, 5)"),
        (torch.zeros(0, WINDOW, 5, 1), "shape (0, 9, 5, 1)"),
    ],
)
def test_readings_that_do_not_fit_are_refused_before_anything_is_computed(readings, got):
    served = make_cities("lstm").served()
    lines = raised(lambda: served.forecast(make_readings() | {"ara": readings}))
    assert lines["where"] == "the readings of city 'ara' do not fit it"
    assert "n=5, c=1 and at least 9 steps" in lines["expected"]
    assert lines["got"] == got


def test_unknown_cities_and_times_are_refused():
    served, readings = make_cities("lstm").served(), make_readings()
    assert raised(lambda: served.forecast({"xyz": readings["ara"]}))["where"] == "there is no city 'xyz'"
    assert raised(lambda: served.forecast(readings, start="noon"))["expected"].startswith("an ISO time")
    lines = raised(lambda: served.forecast(readings, start=[datetime(2024, 3, 4)] * 2))
    assert (lines["expected"], lines["got"]) == ("1 times, one for each window", "2")


_cache = []


def _once():
    """One set of cities for all examples of a property."""
    if not _cache:
        _cache.append((make_cities("stgcn"), make_readings()))
    return _cache[0]
