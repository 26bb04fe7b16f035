from datetime import datetime

import numpy as np
import pytest

from stlora_peft.data import City

NAN = np.nan


def fields(**changes):
    """What a city of three sensors in a row is made of."""
    return {
        "values": np.arange(1.0, 13.0).reshape(4, 3),
        "edge_index": np.array([[0, 1, 1], [1, 0, 2]]),
        "edge_weight": np.array([0.5, 0.25, 1.0]),
        "interval_minutes": 5,
        "node_ids": ("a", "b", "c"),
        "start": datetime(2024, 1, 1, 6, 30),
        "coordinates": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "name": "trio",
        "quantity": "speed (km/h)",
        **changes,
    }


def arrays(**changes):
    """The same as a file holds it."""
    content = fields(start="2024-01-01T06:30", **changes) if "start" not in changes else fields(**changes)
    return {key: np.asarray(value) for key, value in content.items() if value is not None}


def write(path, **changes):
    np.savez(path, **{key: value for key, value in arrays(**changes).items() if value.dtype != object})
    return path


def lines_of(error):
    return str(error.value).split("\n")


def assert_same(a, b):
    for key in ("values", "edge_index", "edge_weight", "coordinates"):
        first, second = getattr(a, key), getattr(b, key)
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)
    for key in ("interval_minutes", "node_ids", "start", "name", "quantity"):
        assert getattr(a, key) == getattr(b, key)


def test_city_arrays_get_their_shapes_and_types():
    city = City(**fields())
    assert (city.values.shape, city.values.dtype) == ((4, 3, 1), np.float32)
    assert (city.edge_index.dtype, city.edge_weight.dtype) == (np.int64, np.float32)
    assert (city.num_steps, city.num_nodes, city.num_channels, city.steps_per_day) == (4, 3, 1, 288)
    np.testing.assert_array_equal(city.values[..., 0], fields()["values"])


def test_city_start_as_text_is_parsed():
    assert City(**fields(start="2012-03-01T00:05")).start == datetime(2012, 3, 1, 0, 5)
    assert City(**fields(start="")).start is None


BROKEN = {
    "values_ndim": (
        {"values": np.ones(4)},
        "key 'values': wrong number of axes",
        "2 axes (T, N) or 3 axes (T, N, C)",
        "shape (4,)",
    ),
    "values_kind": (
        {"values": np.array([["1", "2", "3"]])},
        "key 'values': wrong kind of entries",
        "real numbers",
        "dtype <U1",
    ),
    "values_complex": (
        {"values": np.ones((2, 3), dtype=complex)},
        "key 'values': wrong kind of entries",
        "real numbers",
        "dtype complex128",
    ),
    "values_empty": (
        {"values": np.ones((0, 3))},
        "key 'values': nothing in it",
        "at least one step, one sensor and one channel",
        "shape (0, 3, 1)",
    ),
    "values_infinite": (
        {"values": np.array([[1, 2, 3], [1, np.inf, 3]])},
        "key 'values': infinite reading",
        "finite numbers, and NaN where a reading is missing",
        "inf at step 1, sensor number 1, channel 0",
    ),
    "values_dead": (
        {"values": np.array([[1, NAN, NAN], [1, NAN, NAN]])},
        "key 'values': no finite value in a sensor",
        "at least one reading of each sensor in each channel",
        "none of b, c",
    ),
    "values_dead_channel": (
        {"values": np.stack([np.ones((2, 3)), [[1, 1, NAN], [1, 1, NAN]]], axis=-1)},
        "key 'values': no finite value in a sensor",
        "at least one reading of each sensor in each channel",
        "none of c",
    ),
    "nodes_count": (
        {"node_ids": ("a", "b")},
        "key 'node_ids': another number of sensors than in 'values'",
        "3 names, as many as axis n of 'values'",
        "2 names",
    ),
    "nodes_twice": (
        {"node_ids": ("a", "b", "a")},
        "key 'node_ids': a name stands for two sensors",
        "every name once",
        "repeated: a",
    ),
    "nodes_shape": ({"node_ids": "abc"}, "key 'node_ids': not a list of names", "3 names on one axis", "shape ()"),
    "edges_shape": (
        {"edge_index": np.array([[0, 1, 2]])},
        "key 'edge_index': wrong shape",
        "(2, E): sources in row 0, targets in row 1",
        "shape (1, 3)",
    ),
    "edges_kind": (
        {"edge_index": np.array([[0.0, 1, 1], [1, 0, 2]])},
        "key 'edge_index': wrong kind of entries",
        "whole numbers",
        "dtype float64",
    ),
    "edges_range": (
        {"edge_index": np.array([[0, 1, 1], [1, 3, 2]])},
        "key 'edge_index': edge out of range",
        "sensor numbers from 0 to 2",
        "edge 1 from 1 to 3",
    ),
    "edges_negative": (
        {"edge_index": np.array([[0, -1, 1], [1, 0, 2]])},
        "key 'edge_index': edge out of range",
        "sensor numbers from 0 to 2",
        "edge 1 from -1 to 0",
    ),
    "edges_loop": (
        {"edge_index": np.array([[0, 1, 2], [1, 0, 2]])},
        "key 'edge_index': self loop",
        "edges between two different sensors (layers that need self loops add their own)",
        "edge 2 from 2 to 2",
    ),
    "weights_count": (
        {"edge_weight": np.ones(2)},
        "key 'edge_weight': another number of edges than in 'edge_index'",
        "shape (3,)",
        "shape (2,)",
    ),
    "weights_negative": (
        {"edge_weight": np.array([1, -0.5, 1])},
        "key 'edge_weight': negative weight",
        "finite weights of at least 0",
        "-0.5 at edge 1",
    ),
    "weights_nan": (
        {"edge_weight": np.array([1, 1, NAN])},
        "key 'edge_weight': weight is not finite",
        "finite weights of at least 0",
        "nan at edge 2",
    ),
    "interval_zero": (
        {"interval_minutes": 0},
        "key 'interval_minutes': not a step of time",
        "a whole number of minutes, at least 1",
        "0",
    ),
    "interval_fraction": (
        {"interval_minutes": 2.5},
        "key 'interval_minutes': not a step of time",
        "a whole number of minutes, at least 1",
        "2.5",
    ),
    "start": (
        {"start": "yesterday"},
        "key 'start': not a time",
        "an ISO time such as '2012-03-01T00:00', or an empty text where it is unknown",
        "'yesterday'",
    ),
    "coordinates_shape": (
        {"coordinates": np.ones((2, 2))},
        "key 'coordinates': wrong shape",
        "(3, 2): latitude and longitude of each sensor",
        "shape (2, 2)",
    ),
    "coordinates_nan": (
        {"coordinates": np.array([[0, 0], [0, NAN], [1, 1]])},
        "key 'coordinates': place is not finite",
        "finite latitudes and longitudes",
        "sensor numbers 1",
    ),
}


@pytest.mark.parametrize(("change", "problem", "expected", "got"), BROKEN.values(), ids=BROKEN.keys())
def test_city_broken_array_names_city_key_and_problem(change, problem, expected, got):
    with pytest.raises(ValueError, match="to fix") as error:
        City(**fields(**change))
    lines = lines_of(error)
    assert lines[:3] == [f"city 'trio', {problem}.", f"  expected: {expected}", f"  got:      {got}"]
    assert lines[3].startswith("  to fix:   ")
    assert len(lines) == 4


@pytest.mark.parametrize(("change", "problem", "expected", "got"), BROKEN.values(), ids=BROKEN.keys())
def test_load_broken_array_names_the_file(tmp_path, change, problem, expected, got):
    path = write(tmp_path / "broken.npz", **change)
    with pytest.raises(ValueError, match="to fix") as error:
        City.load(path)
    assert lines_of(error)[:3] == [f"city file '{path}', {problem}.", f"  expected: {expected}", f"  got:      {got}"]


def test_save_then_load_returns_the_same_city(tmp_path):
    city = City(**fields(values=np.where(fields()["values"] == 5, NAN, fields()["values"])))
    city.save(tmp_path / "trio.npz")
    assert_same(City.load(tmp_path / "trio.npz"), city)
    assert [file.name for file in tmp_path.iterdir()] == ["trio.npz"]


def test_save_two_channels_and_unknown_start_are_kept(tmp_path):
    city = City(**fields(values=np.arange(1.0, 25.0).reshape(4, 3, 2), start=None, quantity=""))
    city.save(tmp_path / "trio.npz")
    assert_same(City.load(tmp_path / "trio.npz"), city)


def test_save_holds_the_keys_of_the_format(tmp_path):
    City(**fields()).save(tmp_path / "trio.npz")
    with np.load(tmp_path / "trio.npz", allow_pickle=False) as file:
        assert file["values"].shape == (4, 3)
        assert file["start"].item() == "2024-01-01T06:30:00"
        assert file["interval_minutes"].dtype == np.int64


def test_save_to_a_name_without_suffix_writes_that_name(tmp_path):
    City(**fields()).save(tmp_path / "trio")
    assert City.load(tmp_path / "trio").node_ids == ("a", "b", "c")


def test_load_without_name_takes_that_of_the_file(tmp_path):
    content = arrays()
    del content["name"], content["quantity"], content["coordinates"]
    np.savez(tmp_path / "village.npz", **content)
    city = City.load(tmp_path / "village.npz")
    assert (city.name, city.quantity, city.coordinates) == ("village", "", None)


@pytest.mark.parametrize("key", ["values", "edge_index", "edge_weight", "interval_minutes", "node_ids", "start"])
def test_load_missing_key_names_it(tmp_path, key):
    content = arrays()
    del content[key]
    path = tmp_path / "part.npz"
    np.savez(path, **content)
    with pytest.raises(ValueError, match="missing") as error:
        City.load(path)
    assert lines_of(error) == [
        f"city file '{path}', key '{key}': missing.",
        "  expected: the keys values, edge_index, edge_weight, interval_minutes, node_ids, start",
        f"  got:      the keys {', '.join(sorted(content))}",
        "  to fix:   write the file with City.save, or add the missing keys",
    ]


def test_load_missing_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        City.load(tmp_path / "no.npz")
    assert lines_of(error) == [
        f"city file '{tmp_path / 'no.npz'}' is missing.",
        "  expected: a file",
        "  got:      nothing",
        "  to fix:   check the path",
    ]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_load_truncated_file_names_it(tmp_path, share):
    path = tmp_path / "trio.npz"
    City(**fields()).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="cannot be read") as error:
        City.load(path)
    lines = lines_of(error)
    assert lines[:2] == [
        f"city file '{path}' cannot be read.",
        "  expected: a whole .npz file of arrays of numbers and text",
    ]
    assert len(lines) == 4


def test_load_damaged_byte_names_the_file(tmp_path):
    path = tmp_path / "trio.npz"
    City(**fields(values=np.random.default_rng(0).normal(size=(500, 3)))).save(path)
    content = bytearray(path.read_bytes())
    content[1000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        City.load(path)


def test_load_pickled_array_is_refused(tmp_path):
    path = tmp_path / "objects.npz"
    np.savez(path, **arrays(values=np.array([[{}]], dtype=object)))
    with pytest.raises(ValueError, match="cannot be read") as error:
        City.load(path)
    assert "allow_pickle=False" in lines_of(error)[2]


def test_load_bare_array_is_refused(tmp_path):
    path = tmp_path / "bare.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match="cannot be read"):
        City.load(path)


def test_load_interval_of_two_entries_names_the_key(tmp_path):
    path = write(tmp_path / "two.npz", interval_minutes=np.array([5, 5]))
    with pytest.raises(ValueError, match="key 'interval_minutes': not a single entry"):
        City.load(path)


def test_load_zeros_are_missing_turns_zeros_only_into_nan(tmp_path):
    values = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, NAN]])
    path = write(tmp_path / "zeros.npz", values=values)
    np.testing.assert_array_equal(City.load(path).values[..., 0], values)
    loaded = City.load(path, zeros_are_missing=True).values[..., 0]
    np.testing.assert_array_equal(loaded, [[NAN, 1, 2], [3, NAN, NAN]])


def test_load_dead_sensor_is_dropped_with_its_edges(tmp_path):
    values = np.array([[1.0, NAN, 2.0], [3.0, NAN, 4.0]])
    edges = np.array([[0, 1, 2, 0], [1, 2, 0, 2]])
    path = write(tmp_path / "dead.npz", values=values, edge_index=edges, edge_weight=np.array([1.0, 2, 3, 4]))
    with pytest.raises(ValueError, match="none of b"):
        City.load(path)
    assert np.isnan(City.load(path, dead_sensors="keep").values[:, 1]).all()
    city = City.load(path, dead_sensors="drop")
    assert city.node_ids == ("a", "c")
    np.testing.assert_array_equal(city.values[..., 0], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(city.edge_index, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(city.edge_weight, [3, 4])
    np.testing.assert_array_equal(city.coordinates, [[1, 2], [5, 6]])


def test_load_zeros_are_missing_before_dead_sensors_are_dropped(tmp_path):
    path = write(tmp_path / "zeros.npz", values=np.array([[0.0, 1.0, 2.0], [0.0, 2.0, 3.0]]))
    assert City.load(path, zeros_are_missing=True, dead_sensors="drop").node_ids == ("b", "c")


def test_load_drop_of_every_sensor_is_an_error(tmp_path):
    path = write(tmp_path / "dead.npz", values=np.full((2, 3), NAN))
    with pytest.raises(ValueError, match="none of a, b, c"):
        City.load(path, dead_sensors="drop")


def test_load_unknown_choice_for_dead_sensors_names_the_known_ones(tmp_path):
    path = write(tmp_path / "trio.npz")
    with pytest.raises(ValueError, match="dead_sensors") as error:
        City.load(path, dead_sensors="ignore")
    assert lines_of(error) == [
        "option 'dead_sensors' is unknown.",
        "  expected: one of 'error', 'keep', 'drop'",
        "  got:      'ignore'",
        "  to fix:   choose one",
    ]


def test_select_nodes_in_another_order_keeps_what_belongs_together():
    small = City(**fields()).select_nodes([2, 1])
    assert small.node_ids == ("c", "b")
    np.testing.assert_array_equal(small.values[..., 0], fields()["values"][:, [2, 1]])
    np.testing.assert_array_equal(small.edge_index, [[1], [0]])
    np.testing.assert_array_equal(small.edge_weight, [1.0])
    np.testing.assert_array_equal(small.coordinates, [[5, 6], [3, 4]])


@pytest.mark.parametrize("nodes", [[], [0, 0], [3], [-1]])
def test_select_nodes_impossible_choice_raises(nodes):
    with pytest.raises(ValueError, match="cannot be selected") as error:
        City(**fields()).select_nodes(nodes)
    assert lines_of(error)[1:3] == [
        "  expected: at least one of the numbers 0 to 2, each at most once",
        f"  got:      {nodes}",
    ]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "shape", "edges", "start"),
    [
        ("la-loop.npz", (2016, 207, 1), 2626, datetime(2012, 3, 1)),
        ("shenzhen-flow.npz", (8064, 46, 1), 70, None),
    ],
)
def test_load_real_city_has_the_documented_content(shared_data, name, shape, edges, start):
    path = shared_data(name)
    city = City.load(path)
    assert (city.values.shape, city.edge_index.shape, city.start) == (shape, (2, edges), start)
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(city.values[..., 0], file["values"])
        assert list(city.node_ids) == file["node_ids"].tolist()
