import time

import numpy as np
import pytest

from stlora_peft.data import City, simulate_city
from stlora_peft.data.conditions import capacity_left, hourly_rules, rain, wander
from stlora_peft.data.detectors import missing_readings
from stlora_peft.data.roads import _neighbour_edges, build_roads
from stlora_peft.data.traffic import JAM_DENSITY, KINDS, LEAST_SPEED, day_profiles, demand, draw_traits, drive


def rng(seed=0):
    return np.random.default_rng(seed)


def street(num_nodes=3):
    """Nodes in a row whose traffic runs from the first to the last."""
    roads = build_roads(num_nodes, "grid", rng())
    nodes = np.arange(num_nodes - 1)
    one_way = np.stack([nodes, nodes + 1])
    return roads.__class__(
        position=np.stack([np.arange(num_nodes), np.zeros(num_nodes)], axis=1).astype(float),
        heading=np.tile([1.0, 0.0], (num_nodes, 1)),
        tidal=np.zeros(num_nodes),
        edge_index=one_way,
        length_km=np.full(num_nodes - 1, 1.5),
        turn_share=np.ones(num_nodes - 1),
    )


def traits_of(num_nodes, seed=0):
    return draw_traits(np.arange(num_nodes) % len(KINDS), rng(seed))


def drive_street(wanted_share, capacity_share=None, num_nodes=3):
    """Flow, density, traits and the inputs of a street under a demand given as a share of the capacity."""
    traits, roads = traits_of(num_nodes), street(num_nodes)
    wanted = wanted_share * traits.capacity
    capacity = np.broadcast_to(traits.capacity, wanted.shape) * (1 if capacity_share is None else capacity_share)
    free = np.broadcast_to(traits.free_speed, wanted.shape)
    flow, density = drive(wanted, capacity, free, traits, roads, 5)
    return flow, density, traits, roads, wanted, capacity, free


def same_city(first, second):
    names = ("values", "edge_index", "edge_weight", "coordinates")
    return all(np.array_equal(getattr(first, k), getattr(second, k), equal_nan=True) for k in names)


def test_simulate_city_same_seed_gives_the_same_city():
    assert same_city(simulate_city(12, 2, 3), simulate_city(12, 2, 3))
    assert not np.array_equal(simulate_city(12, 2, 3).values, simulate_city(12, 2, 4).values)


def test_simulate_city_leaves_global_randomness_alone():
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    simulate_city(5, 1, 0)
    assert np.random.random() == expected  # noqa: NPY002


@pytest.mark.parametrize(
    "change", [{"days": 5}, {"quantity": "flow"}, {"start": "2024-03-03"}, {"interval_minutes": 15}]
)
def test_simulate_city_roads_do_not_depend_on_the_record(change):
    base, other = simulate_city(15, 2, 1), simulate_city(**{"num_nodes": 15, "days": 2, "seed": 1, **change})
    np.testing.assert_array_equal(base.edge_index, other.edge_index)
    np.testing.assert_array_equal(base.edge_weight, other.edge_weight)
    assert base.node_ids == other.node_ids


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 7, 60])
@pytest.mark.parametrize("character", ["radial", "grid"])
def test_simulate_city_of_any_size_is_valid(num_nodes, character):
    city = simulate_city(num_nodes, 1, 0, character=character)
    assert (city.num_steps, city.num_nodes, city.num_channels) == (288, num_nodes, 1)
    assert len(city.edge_weight) == 0 or 0 < city.edge_weight.min() <= city.edge_weight.max() <= 1


def test_simulate_city_both_holds_speed_and_flow_of_the_same_traffic():
    both, speed, flow = (simulate_city(10, 2, 5, quantity=name) for name in ("both", "speed", "flow"))
    np.testing.assert_array_equal(both.values[..., :1], speed.values)
    np.testing.assert_array_equal(both.values[..., 1:], flow.values)
    assert (speed.quantity, flow.quantity) == ("speed (km/h)", "flow (vehicles per step)")
    assert both.quantity == "speed (km/h), flow (vehicles per step)"


def test_simulate_city_flow_is_in_whole_vehicles_and_speed_in_a_sensible_range():
    values = simulate_city(30, 7, 2, quantity="both").values
    speed, flow = values[np.isfinite(values).all(axis=-1)].T
    np.testing.assert_array_equal(flow, np.round(flow))
    assert flow.min() >= 0
    assert 0 <= speed.min() < 25
    assert 80 < speed.max() < 150


@pytest.mark.parametrize("interval", [1, 7, 15, 60])
def test_simulate_city_interval_keeps_the_mean_speed_and_scales_the_flow(interval):
    fine, coarse = (simulate_city(20, 4, 3, quantity="both", interval_minutes=m) for m in (5, interval))
    assert coarse.num_steps == round(4 * 1440 / interval)
    (speed, flow), (speed_2, flow_2) = (np.nanmean(city.values, axis=(0, 1)) for city in (fine, coarse))
    assert speed_2 == pytest.approx(speed, rel=0.03)
    assert flow_2 / interval == pytest.approx(flow / 5, rel=0.05)


def test_simulate_city_a_month_of_50_nodes_takes_less_than_two_seconds():
    seconds = []
    for seed in range(2):
        begin = time.process_time()
        simulate_city(50, 30, seed)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 2


def test_simulate_city_workdays_and_weekends_differ_as_the_calendar_says():
    city = simulate_city(30, 14, 0, quantity="flow", mix={"arterial": 1}, start="2024-01-03")  # a Wednesday
    days = np.nanmean(city.values[..., 0].reshape(14, 288, 30), axis=(1, 2))
    weekend = np.array([3, 4, 10, 11])
    assert days[weekend].max() < 0.9 * np.delete(days, weekend).min()


def test_simulate_city_nights_are_quiet_and_free():
    values = simulate_city(30, 5, 0, quantity="both").values.reshape(5, 24, 12, 30, 2)
    speed, flow = np.nanmean(values, axis=(0, 2, 3)).T
    assert flow[2:4].max() < 0.3 * flow[[8, 17]].min()
    assert speed[2:4].min() > 1.1 * speed[17]


def test_simulate_city_nodes_keep_their_own_day():
    values = simulate_city(30, 28, 0).values[..., 0]
    days = values.reshape(4, 7, 288, 30)[:, :5]  # workdays
    even, odd = (np.nanmean(part, axis=(0, 1)) for part in (days[0::2], days[1::2]))
    even, odd = even - np.nanmean(even, axis=0), odd - np.nanmean(odd, axis=0)
    agree = np.corrcoef(even.T, odd.T)[:30, 30:]
    assert np.median(np.diag(agree)) > 0.9  # a node with itself two weeks later
    assert np.median(agree[~np.eye(30, dtype=bool)]) < 0.6  # with the others


def test_simulate_city_mix_is_kept_to_the_node():
    one_kind = simulate_city(20, 2, 0, mix={"downtown": 3})
    assert np.nanmax(one_kind.values) < 1.3 * KINDS["downtown"].free_speed[1]
    assert np.nanmax(simulate_city(20, 2, 0, mix={"arterial": 1, "downtown": 1}).values) > 80


def test_simulate_city_some_readings_are_missing_in_every_month():
    missing = np.isnan(simulate_city(50, 28, 0).values[..., 0])
    assert 0.005 < missing.mean() < 0.1
    longest = missing.mean(axis=0)
    assert ((0.25 < longest) & (longest < 0.7)).sum() == 2  # one sensor of 25


OUT_OF_RANGE = [
    ({"num_nodes": 0}, "num_nodes", "at least 1", "0"),
    ({"days": 0}, "days", "at least one step of 5 minutes", "0"),
    ({"days": float("nan")}, "days", "at least one step of 5 minutes", "nan"),
    ({"seed": -1}, "seed", "at least 0", "-1"),
    ({"start": ""}, "start", "an ISO time", "''"),
    ({"mix": {"harbour": 1}}, "mix", "shares of arterial, downtown, residential, leisure", "'harbour'"),
    ({"mix": {"leisure": 0}}, "mix", "shares of at least 0 that are not all 0", "{'leisure': 0}"),
    (
        {"mix": {"leisure": -1, "arterial": 2}},
        "mix",
        "shares of at least 0 that are not all 0",
        "{'leisure': -1, 'arterial': 2}",
    ),
]


@pytest.mark.parametrize(("options", "name", "expected", "got"), OUT_OF_RANGE)
def test_simulate_city_option_out_of_range_names_it(options, name, expected, got):
    with pytest.raises(ValueError, match="out of range") as error:
        simulate_city(**{"num_nodes": 5, "days": 1, "seed": 0, **options})
    assert str(error.value).split("\n") == [
        f"simulated city: option '{name}' is out of range.",
        f"  expected: {expected}",
        f"  got:      {got}",
        f"  to fix:   give another {name}",
    ]


@pytest.mark.parametrize(
    ("name", "known"), [("quantity", "'speed', 'flow', 'both'"), ("character", "'radial', 'grid'")]
)
def test_simulate_city_unknown_choice_names_the_known_ones(name, known):
    with pytest.raises(ValueError, match="is unknown") as error:
        simulate_city(5, 1, 0, **{name: "round"})
    assert str(error.value).split("\n")[:3] == [
        f"option '{name}' is unknown.",
        f"  expected: one of {known}",
        "  got:      'round'",
    ]


def test_simulate_city_saved_and_loaded_is_the_same(tmp_path):
    city = simulate_city(8, 1, 0, quantity="both")
    city.save(tmp_path / "city.npz")
    assert same_city(City.load(tmp_path / "city.npz"), city)


@pytest.mark.parametrize("character", ["radial", "grid"])
@pytest.mark.parametrize("num_nodes", [2, 5, 40, 150])
def test_build_roads_network_is_connected_two_way_and_shared_out(character, num_nodes):
    roads = build_roads(num_nodes, character, rng())
    source, target = roads.edge_index
    pairs = set(zip(source.tolist(), target.tolist(), strict=True))
    assert pairs == {(b, a) for a, b in pairs}
    assert len(pairs) == len(source)
    reached, front = {0}, [0]
    while front:
        node = front.pop()
        new = {b for a, b in pairs if a == node} - reached
        reached |= new
        front += new
    assert reached == set(range(num_nodes))
    np.testing.assert_allclose(np.bincount(source, roads.turn_share, num_nodes), 1)
    np.testing.assert_allclose(np.linalg.norm(roads.heading, axis=1), 1)


def edges_by_all_distances(position):
    """Three nearest places, then the shortest edge between what is reached and what is not, until all is."""
    num_nodes = len(position)
    distance = np.linalg.norm(position[:, None] - position, axis=2)
    np.fill_diagonal(distance, np.inf)
    linked = np.zeros((num_nodes, num_nodes), dtype=bool)
    linked[np.arange(num_nodes)[:, None], np.argsort(distance, axis=1)[:, : min(3, num_nodes - 1)]] = True
    linked |= linked.T
    while True:
        reached = np.linalg.matrix_power((linked + np.eye(num_nodes)) / num_nodes, num_nodes)[0] > 0
        if reached.all():
            return np.stack(np.nonzero(linked))
        gap = np.where(reached[:, None] & ~reached, distance, np.inf)
        source, target = np.unravel_index(gap.argmin(), gap.shape)
        linked[source, target] = linked[target, source] = True


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 9, 30, 70])
@pytest.mark.parametrize("character", ["radial", "grid"])
def test_edges_are_those_of_all_distances(character, num_nodes):
    apart = 0
    for seed in range(12):
        roads = build_roads(num_nodes, character, rng(seed))
        np.testing.assert_array_equal(roads.edge_index, edges_by_all_distances(roads.position))
        apart += roads.edge_index.shape[1]
    assert apart or num_nodes == 1


def test_edges_join_far_groups_of_places():
    groups = rng().normal(0, 0.1, (3, 8, 2)) + np.array([[0, 0], [9, 1], [4, 7]])[:, None]
    edges = _neighbour_edges(groups.reshape(-1, 2))
    np.testing.assert_array_equal(edges, edges_by_all_distances(groups.reshape(-1, 2)))
    assert ((edges[0] // 8) != (edges[1] // 8)).sum() == 4  # two links, both ways


def test_roads_of_many_nodes_take_no_matrix_of_all_pairs():
    began = time.perf_counter()
    roads = build_roads(20_000, "radial", rng())
    assert time.perf_counter() - began < 10
    assert 3 * 20_000 <= roads.edge_index.shape[1] < 5 * 20_000


def test_drive_matches_a_loop_over_nodes():
    share = 0.9 + 0.5 * rng().random((60, 3))
    flow, density, traits, _roads, wanted, capacity, free = drive_street(share, 0.7 + 0.3 * rng(1).random((60, 3)))
    queue, served, full = np.zeros(3), np.ones((60, 3)), np.zeros((60, 3))
    for t in range(60):
        new = queue.copy()
        served_before, full_before = served.copy(), full.copy()
        for i in range(3):
            platoon, blocked = 1.0, 0.0
            if i > 0:
                lag = max(round(60 * 1.5 / traits.free_speed[i - 1] / 5), 1)
                past = served_before[max(t - lag, 0), i - 1]
                platoon = 1 - traits.upstream[i] + traits.upstream[i] * past
            if i < 2:
                lag = max(round(60 * 1.5 / 15 / 5), 1)
                past = full_before[max(t - lag, 0), i + 1]
                blocked = traits.spillback[i] * past**2
            room = 0.8 * JAM_DENSITY * traits.length_km[i]
            fullness = queue[i] / room
            arrive = wanted[t, i] * platoon * (1 - traits.diversion[i] * fullness)
            limit = capacity[t, i] * (1 - traits.capacity_drop[i] * min(4 * fullness, 1)) * (1 - blocked)
            out = min(limit, arrive + queue[i] * 12)
            new[i] = min(queue[i] + (arrive - out) / 12, room)
            load = min(out / traits.capacity[i], 1)
            moving = free[t, i] * (1 - (1 - traits.speed_at_capacity[i]) * load**2)
            assert flow[t, i] == pytest.approx(out, rel=1e-10)
            dense = min(out / moving + new[i] / traits.length_km[i], out / LEAST_SPEED)
            assert density[t, i] == pytest.approx(dense, rel=1e-10)
            served[t, i], full[t, i] = out / wanted[t, i], new[i] / room
        queue = new
    assert full.max() > 0.5  # the street was congested, so every term counted


def test_drive_light_traffic_passes_at_free_speed():
    flow, density, traits, *_, wanted, _, _ = drive_street(np.full((20, 3), 0.01))
    np.testing.assert_allclose(flow, wanted, rtol=1e-9)
    np.testing.assert_allclose(flow / density, np.broadcast_to(traits.free_speed, (20, 3)), rtol=1e-3)


def test_drive_bottleneck_spills_back_to_upstream_nodes_with_a_delay():
    share = np.full((48, 4), 0.85)
    closed = np.ones((48, 4))
    closed[6:, 3] = 0.2
    free_flow, free_density = drive_street(share, num_nodes=4)[:2]
    flow, density = drive_street(share, closed, num_nodes=4)[:2]
    slower = flow / density < 0.7 * free_flow / free_density
    begins = [int(slower[:, i].argmax()) for i in (3, 2)]
    assert slower[:, 3].any()
    assert slower[:, 2].any()
    assert 6 <= begins[0] < begins[1]
    assert not slower[: begins[1], 2].any()


def test_day_profiles_peak_at_one_and_stay_positive():
    traits = traits_of(20)
    profiles = day_profiles(traits, np.linspace(-1, 1, 20), rng())
    assert profiles.shape == (2, 1440, 20)
    np.testing.assert_allclose(profiles.max(axis=(0, 1)), 1)
    assert profiles.min() > 0


def test_day_profiles_inbound_roads_lean_to_the_morning():
    traits = draw_traits(np.zeros(400, dtype=np.int64), rng())
    tidal = np.repeat([1.0, -1.0], 200)
    workday = day_profiles(traits, tidal, rng())[0]
    lean = workday[7 * 60 : 9 * 60].mean(axis=0) - workday[16 * 60 : 19 * 60].mean(axis=0)
    assert lean[:200].mean() > lean[200:].mean() + 0.3


def test_demand_follows_profile_and_saturation():
    traits = traits_of(8)
    profiles = day_profiles(traits, np.zeros(8), rng())
    minutes = 5 * np.arange(288)  # a Monday
    wanted = demand(profiles[0][minutes], traits, minutes, rng())
    expected = profiles[0][minutes] * 0.97 * traits.saturation * traits.capacity
    assert np.abs(np.log(wanted / expected)).max() < 0.3
    assert np.corrcoef(wanted.ravel(), expected.ravel())[0, 1] > 0.98


def test_profiles_and_rules_at_some_minutes_are_those_of_all():
    traits = traits_of(900)  # more than are computed together
    minutes = np.array([0, 5, 1439, 5 * 1440 + 60, 7 * 1440])
    whole, some = (day_profiles(traits, np.zeros(900), rng(), which) for which in (None, minutes))
    np.testing.assert_array_equal(some, whole[[0, 0, 0, 1, 0], [0, 5, 1439, 60, 0]])
    np.testing.assert_array_equal(hourly_rules(9, rng(), np.array([3, 700])), hourly_rules(9, rng())[[3, 700]])


def test_hourly_rules_hold_for_the_hours_of_the_node_only():
    rules = hourly_rules(50, rng())
    assert rules.shape == (1440, 50)
    assert 0.69 < rules.min()
    assert rules.max() <= 1
    hours = (rules < (1 + rules.min(axis=0)) / 2).sum(axis=0) / 60
    assert ((hours > 2.5) & (hours < 9.5)).all()
    assert np.abs(np.diff(rules, axis=0, append=rules[:1])).max() < 0.01  # also over midnight


def test_capacity_left_has_about_as_many_incidents_as_promised():
    left = capacity_left(288 * 60, 40, 5, rng())
    inside = left < 0.75
    begins = (inside & ~np.roll(inside, 1, axis=0)).sum()
    assert 0.6 * 200 < begins < 1.6 * 200
    assert left[~inside].mean() == pytest.approx(1, abs=0.01)


def test_rain_falls_on_every_fifth_day():
    wet = rain(5 * np.arange(288 * 400), rng())
    days = (wet.reshape(400, 288) > 0).any(axis=1)
    assert 0.12 < days.mean() < 0.35  # a night's rain wets two days
    assert wet.min() == 0
    assert 0.8 < wet.max() <= 1


def test_wander_has_its_spread_and_its_memory():
    path = wander((4000, 30), keep=0.9, std=0.5, rng=rng())
    assert path.std() == pytest.approx(0.5, rel=0.03)
    assert np.mean(path[1:] * path[:-1]) / path.var() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 3000])
def test_missing_readings_leave_every_sensor_some(num_steps):
    for seed in range(20):
        assert not missing_readings(num_steps, 30, 5, rng(seed)).all(axis=0).any()
