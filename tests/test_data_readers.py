import builtins
import json
import pickle
import shutil
import sys
import zipfile
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest

from stlora_peft.data import City, from_signal, load_city, simulate_city

NAN = np.nan


def lines_of(error):
    return str(error.value).split("\n")


def pems(tmp_path, names=("0", "1", "2"), **changes):
    """A PeMS file, its list of distances, and the readings in it."""
    data = np.random.default_rng(0).uniform(1, 9, (6, 3, 2))
    np.savez(tmp_path / "PEMS.npz", **{"data": data, **changes})
    rows = [(names[0], names[1], 100.0), (names[1], names[2], 300.0), (names[2], names[0], 200.0)]
    text = "from,to,cost\n" + "".join(f"{a},{b},{d}\n" for a, b, d in rows)
    (tmp_path / "distance.csv").write_text(text)
    return tmp_path / "PEMS.npz", tmp_path / "distance.csv", data


def write_table(path, times, columns, values, key="df", kind="datetime64[us]", mode="w"):
    """Write a table as ``DataFrame.to_hdf`` does."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, mode) as file:
        group = file.create_group(key)
        names = np.array(columns, dtype="S6" if isinstance(columns[0], str) else np.int64)
        clock = np.asarray(times, dtype=kind if kind.startswith("datetime64") else np.int64).astype(np.int64)
        parts = {"axis0": names, "axis1": clock, "block0_items": names, "block0_values": values}
        for name, part in parts.items():
            group.create_dataset(name, data=part)
        group["axis1"].attrs["kind"] = np.bytes_(kind)


def hdf(tmp_path, times=None, columns=("773869", "767541"), values=None, **options):
    """A METR-LA style file and an adjacency matrix."""
    times = [f"2012-03-01T00:{minute:02d}" for minute in (0, 5, 10, 15)] if times is None else times
    values = np.arange(2.0 * len(times)).reshape(-1, 2) + 1 if values is None else values
    write_table(tmp_path / "metr.h5", times, columns, values, **options)
    np.save(tmp_path / "adj.npy", np.array([[1.0, 0.5], [0.0, 1.0]]))
    return tmp_path / "metr.h5", tmp_path / "adj.npy", values


class Bomb:
    """What a pickle can do: make a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def signal(features, edge_index=None, edge_weight=None):
    edge_index = np.array([[0, 1, 1], [1, 1, 0]]) if edge_index is None else edge_index
    return SimpleNamespace(features=features, edge_index=edge_index, edge_weight=edge_weight)


def test_load_city_own_format_equals_city_load(tmp_path):
    simulate_city(num_nodes=4, days=1, seed=0).save(tmp_path / "a.npz")
    first, second = load_city(tmp_path / "a.npz"), City.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(first.values, second.values)
    assert (first.start, first.node_ids, first.name) == (second.start, second.node_ids, second.name)


def test_load_city_start_fills_an_unknown_one_only(tmp_path):
    City(np.ones((3, 2)), np.array([[0], [1]]), np.ones(1), 5, ("a", "b")).save(tmp_path / "a.npz")
    known = load_city(tmp_path / "a.npz", start="2024-05-01")
    assert known.start == datetime(2024, 5, 1)
    known.save(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="key 'start': the file says this itself"):
        load_city(tmp_path / "b.npz", start="2024-05-02")


@pytest.mark.parametrize("option", [{"graph": "x.csv"}, {"ids": "x.txt"}, {"interval_minutes": 10}])
def test_load_city_option_that_the_file_answers_is_refused(tmp_path, option):
    simulate_city(num_nodes=4, days=1, seed=0).save(tmp_path / "a.npz")
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match="the file says this itself") as error:
        load_city(tmp_path / "a.npz", **option)
    assert lines_of(error) == [
        f"city file '{tmp_path / 'a.npz'}', key '{name}': the file says this itself.",
        f"  expected: {name}=None",
        f"  got:      {name}={value!r}",
        f"  to fix:   leave {name} out",
    ]


def test_load_city_pems_has_readings_and_kernel_weights(tmp_path):
    path, graph, data = pems(tmp_path)
    city = load_city(path, graph=graph, start="2018-01-01")
    np.testing.assert_array_equal(city.values, data.astype(np.float32))
    assert (city.interval_minutes, city.node_ids, city.start) == (5, ("0", "1", "2"), datetime(2018, 1, 1))
    np.testing.assert_array_equal(city.edge_index, [[0, 1, 2], [1, 2, 0]])
    variance = 20000 / 3  # of 100, 300 and 200
    expected = np.exp(-(np.array([100.0, 300.0, 200.0]) ** 2) / variance)
    np.testing.assert_allclose(city.edge_weight, expected, rtol=1e-6)


def test_load_city_pems_names_come_from_the_ids_file(tmp_path):
    path, graph, _ = pems(tmp_path, names=("313344", "313349", "313353"))
    (tmp_path / "ids.txt").write_text("313344\n313349\n313353\n")
    city = load_city(path, graph=graph, ids=tmp_path / "ids.txt", interval_minutes=15)
    assert (city.node_ids, city.interval_minutes) == (("313344", "313349", "313353"), 15)
    with pytest.raises(ValueError, match="names no sensor of the readings") as error:
        load_city(path, graph=graph)
    assert lines_of(error) == [
        f"graph file '{graph}', key 'from,to': line 2 names no sensor of the readings.",
        "  expected: names such as 0, 1, 2",
        "  got:      313344, 313349",
        "  to fix:   give the file with the sensors' names as ids=..., or remove the line",
    ]


def test_load_city_pems_ids_of_another_number_raise(tmp_path):
    path, graph, _ = pems(tmp_path)
    (tmp_path / "ids.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match="another number of sensors than in 'data'") as error:
        load_city(path, graph=graph, ids=tmp_path / "ids.txt")
    assert lines_of(error)[1:3] == ["  expected: 3 names, one in each line", "  got:      2 names"]


def test_load_city_pems_without_graph_says_what_to_give(tmp_path):
    path, _, _ = pems(tmp_path)
    with pytest.raises(ValueError, match="no graph in a file of this format") as error:
        load_city(path)
    assert lines_of(error)[3] == "  to fix:   give it as graph=..., then City.save writes both into one file"


def test_load_city_channels_are_selected(tmp_path):
    path, graph, data = pems(tmp_path)
    city = load_city(path, graph=graph, channels=[1])
    np.testing.assert_array_equal(city.values, data[..., 1:].astype(np.float32))
    with pytest.raises(ValueError, match="no such channel") as error:
        load_city(path, graph=graph, channels=[2])
    assert lines_of(error)[1:3] == ["  expected: some of the channels [0, 1]", "  got:      channels=[2]"]


def test_load_city_distances_drop_self_loops_and_repetitions(tmp_path):
    path, graph, _ = pems(tmp_path)
    graph.write_text("from,to,distance\n0,0,0\n0,1,5\n0,1,7\n1,2,5\n\n")
    city = load_city(path, graph=graph)
    np.testing.assert_array_equal(city.edge_index, [[0, 1], [1, 2]])
    np.testing.assert_array_equal(city.edge_weight, [1, 1])  # equal distances have no spread


@pytest.mark.parametrize("row", ["0,1", "0,1,far", "0,1,-3", "0,1,nan", "0,1,inf"])
def test_load_city_broken_distance_names_the_line(tmp_path, row):
    path, graph, _ = pems(tmp_path)
    graph.write_text(f"from,to,cost\n1,2,4\n{row}\n")
    with pytest.raises(ValueError, match="is not an edge") as error:
        load_city(path, graph=graph)
    assert lines_of(error) == [
        f"graph file '{graph}', key 'from,to,cost': line 3 is not an edge.",
        "  expected: source, target and a finite distance of at least 0",
        f"  got:      {row}",
        "  to fix:   mend or remove the line",
    ]


def test_load_city_adjacency_csv_and_npy_agree(tmp_path):
    path, _, _ = pems(tmp_path)
    matrix = np.array([[1, 0.5, 0], [0, 0, 0.25], [2, 0, 0]])
    np.savetxt(tmp_path / "adj.csv", matrix, delimiter=",")
    np.save(tmp_path / "adj.npy", matrix)
    for name in ("adj.csv", "adj.npy"):
        city = load_city(path, graph=tmp_path / name)
        np.testing.assert_array_equal(city.edge_index, [[0, 1, 2], [1, 2, 0]])
        np.testing.assert_array_equal(city.edge_weight, [0.5, 0.25, 2])


def test_load_city_adjacency_of_other_sensors_raises(tmp_path):
    path, _, _ = pems(tmp_path)
    np.save(tmp_path / "adj.npy", np.ones((4, 4)))
    with pytest.raises(ValueError, match="not a matrix between the sensors") as error:
        load_city(path, graph=tmp_path / "adj.npy")
    assert lines_of(error)[1:3] == ["  expected: numbers of shape (3, 3)", "  got:      float64 of shape (4, 4)"]


def test_load_city_negative_adjacency_names_the_weight(tmp_path):
    path, _, _ = pems(tmp_path)
    np.save(tmp_path / "adj.npy", -np.ones((3, 3)))
    with pytest.raises(ValueError, match="key 'edge_weight': negative weight"):
        load_city(path, graph=tmp_path / "adj.npy")


def test_load_city_pickled_adjacency_is_refused(tmp_path):
    path, _, _ = pems(tmp_path)
    np.save(tmp_path / "adj.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        load_city(path, graph=tmp_path / "adj.npy")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\xfa"])
def test_load_city_empty_graph_file_is_refused(tmp_path, content):
    path, graph, _ = pems(tmp_path)
    graph.write_bytes(content)
    with pytest.raises(ValueError, match=r"graph file .* cannot be read"):
        load_city(path, graph=graph)


def test_load_city_pickle_is_refused_before_it_is_opened(tmp_path):
    path, _, _ = pems(tmp_path)
    graph = tmp_path / "adj_mx.pkl"
    with pytest.raises(ValueError, match="is a pickle") as error:
        load_city(path, graph=graph)
    assert lines_of(error) == [
        f"file '{graph}' is a pickle, which can run any code when it is opened.",
        "  expected: an adjacency matrix as .npy or .csv, or a list of distances as .csv",
        "  got:      a .pkl file",
        "  to fix:   convert it once where you trust it, for instance np.save('adj.npy', matrix)",
    ]
    with pytest.raises(ValueError, match="is a pickle"):
        load_city(graph)


def test_load_city_unknown_suffix_names_the_known_ones(tmp_path):
    (tmp_path / "a.txt").write_text("1")
    with pytest.raises(ValueError, match="no known format") as error:
        load_city(tmp_path / "a.txt")
    assert lines_of(error)[1:3] == ["  expected: a suffix of .npz, .h5, .hdf5, .hdf", "  got:      '.txt'"]


@pytest.mark.parametrize("name", ["no.npz", "no.h5"])
def test_load_city_missing_file_names_it(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load_city(tmp_path / name)


def test_load_city_missing_graph_names_it(tmp_path):
    path, _, _ = pems(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"graph file .*no\.csv' is missing"):
        load_city(path, graph=tmp_path / "no.csv")


@pytest.mark.parametrize("columns", [("773869", "767541"), (400001, 400017)])
def test_load_city_hdf_has_readings_names_and_clock(tmp_path, columns):
    path, graph, values = hdf(tmp_path, columns=columns)
    city = load_city(path, graph=graph)
    np.testing.assert_array_equal(city.values[..., 0], values)
    assert city.node_ids == tuple(map(str, columns))
    assert (city.start, city.interval_minutes, city.name) == (datetime(2012, 3, 1), 5, "metr")
    np.testing.assert_array_equal(city.edge_index, [[0], [1]])
    np.testing.assert_array_equal(city.edge_weight, [0.5])


def test_load_city_hdf_zeros_are_missing(tmp_path):
    path, graph, _ = hdf(tmp_path, values=np.array([[0.0, 1], [2, 3], [4, 0], [5, 6]]))
    city = load_city(path, graph=graph, zeros_are_missing=True)
    np.testing.assert_array_equal(city.values[..., 0], [[NAN, 1], [2, 3], [4, NAN], [5, 6]])


def test_load_city_hdf_left_out_steps_become_missing(tmp_path):
    times = ["2017-03-12T01:50", "2017-03-12T01:55", "2017-03-12T02:10"]
    path, graph, _ = hdf(tmp_path, times)
    city = load_city(path, graph=graph)
    np.testing.assert_array_equal(city.values[..., 0], [[1, 2], [3, 4], [NAN, NAN], [NAN, NAN], [5, 6]])


@pytest.mark.parametrize("times", [["2012-03-01T00:05", "2012-03-01T00:00"], ["2012-03-01", "2012-03-01"]])
def test_load_city_hdf_time_that_does_not_grow_raises(tmp_path, times):
    path, graph, _ = hdf(tmp_path, times)
    with pytest.raises(ValueError, match="time does not grow") as error:
        load_city(path, graph=graph)
    assert lines_of(error)[:2] == [
        f"city file '{path}', key 'index': time does not grow.",
        "  expected: each time later than the one before",
    ]
    assert " and then 2012-03-01T00:00:00" in lines_of(error)[2]


@pytest.mark.parametrize(
    "times",
    [
        ["2012-03-01"],
        ["2012-03-01T00:00:00", "2012-03-01T00:00:30"],
        ["2012-03-01T00:00", "2012-03-01T00:05", "2012-03-01T00:12"],
    ],
)
def test_load_city_hdf_times_off_one_clock_raise(tmp_path, times):
    path, graph, _ = hdf(tmp_path, times)
    with pytest.raises(ValueError, match="times are not on one clock"):
        load_city(path, graph=graph)


def test_load_city_hdf_without_times_raises(tmp_path):
    path, graph, _ = hdf(tmp_path, times=range(4), kind="integer")
    with pytest.raises(ValueError, match="key 'index': no times") as error:
        load_city(path, graph=graph)
    assert lines_of(error)[1:3] == ["  expected: a DatetimeIndex", "  got:      integer"]


def test_load_city_hdf_of_two_tables_is_refused(tmp_path):
    path, graph, values = hdf(tmp_path)
    write_table(path, range(4), ("a", "b"), values, key="second", mode="a")
    with pytest.raises(ValueError, match="cannot be read") as error:
        load_city(path, graph=graph)
    assert lines_of(error)[2] == "  got:      2 tables, or columns of several kinds"


@pytest.mark.parametrize("unit", ["ns", "us", "s"])
def test_load_city_hdf_written_by_pandas_is_read(tmp_path, unit):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("tables")
    path, graph, values = hdf(tmp_path)
    times = pandas.date_range("2012-03-01", periods=4, freq="5min").as_unit(unit)
    pandas.DataFrame(values, index=times, columns=["773869", "767541"]).to_hdf(path, key="speed", mode="w")
    city = load_city(path, graph=graph)
    np.testing.assert_array_equal(city.values[..., 0], values)
    assert (city.start, city.interval_minutes, city.node_ids) == (datetime(2012, 3, 1), 5, ("773869", "767541"))


@pytest.mark.parametrize("attribute", ["kind", "freq", "TITLE", "CLASS", "FLAVOR"])
def test_load_city_hdf_opens_no_pickled_attribute(tmp_path, attribute):
    h5py = pytest.importorskip("h5py")
    path, graph, _ = hdf(tmp_path)
    bomb = pickle.dumps(Bomb(tmp_path / "opened"), protocol=0)
    with h5py.File(path, "a") as file:
        for place in ("/", "/df", "/df/axis1"):
            file[place].attrs[attribute] = np.bytes_(bomb)
    if attribute == "kind":
        with pytest.raises(ValueError, match="no times"):
            load_city(path, graph=graph)
    else:
        load_city(path, graph=graph)
    assert not (tmp_path / "opened").exists()
    pickle.loads(bomb).close()
    assert (tmp_path / "opened").exists()  # the bomb works


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_load_city_hdf_damaged_file_names_it(tmp_path, share):
    path, graph, _ = hdf(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"metr\.h5' cannot be read"):
        load_city(path, graph=graph)


def test_load_city_hdf_without_h5py_gives_the_install_line(tmp_path, monkeypatch):
    (tmp_path / "metr.h5").write_bytes(b"")
    import_module = builtins.__import__

    def without_h5py(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return import_module(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "h5py", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_h5py)
    with pytest.raises(ImportError) as error:
        load_city(tmp_path / "metr.h5")
    assert lines_of(error) == [
        f"city file '{tmp_path / 'metr.h5'}' needs a package that is not installed.",
        "  expected: the package 'h5py'",
        "  got:      No module named 'h5py'",
        "  to fix:   pip install stlora-peft[readers]",
    ]


def test_from_signal_features_as_channels_are_one_step_each():
    record = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)
    city = from_signal(signal(list(record), edge_weight=np.array([0.5, 9.0, 0.25])), interval_minutes=60)
    np.testing.assert_array_equal(city.values, record)
    np.testing.assert_array_equal(city.edge_index, [[0, 1], [1, 0]])
    np.testing.assert_array_equal(city.edge_weight, [0.5, 0.25])
    assert (city.node_ids, city.interval_minutes) == (("0", "1"), 60)


def test_from_signal_windows_are_joined_to_the_record():
    record = np.random.default_rng(0).normal(size=(9, 2, 3)).astype(np.float32)
    record[4, 0, 1] = NAN
    windows = [np.moveaxis(record[t : t + 4], 0, -1) for t in range(6)]  # (N, F, W)
    city = from_signal(signal(windows), interval_minutes=5, start="2012-03-01", node_ids=("a", "b"), name="la")
    np.testing.assert_array_equal(city.values, record)
    np.testing.assert_array_equal(city.edge_weight, [1, 1])
    assert (city.start, city.node_ids, city.name) == (datetime(2012, 3, 1), ("a", "b"), "la")


def test_from_signal_lags_are_joined_to_the_record():
    record = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    lags = [record[t : t + 4].T for t in range(6)]
    city = from_signal(signal(lags), interval_minutes=10080, feature_axis="lags")
    np.testing.assert_array_equal(city.values[..., 0], record)


@pytest.mark.parametrize("features", [[np.zeros((2, 3)), np.ones((2, 3))], [np.ones((2, 3, 4)), np.zeros((2, 3, 4))]])
def test_from_signal_windows_that_do_not_overlap_raise(features):
    with pytest.raises(ValueError, match="windows do not overlap"):
        from_signal(signal(features), interval_minutes=5, feature_axis="lags")


@pytest.mark.parametrize("features", [[], [np.ones(2)], [np.ones((2, 1)), np.ones((3, 1))]])
def test_from_signal_snapshots_without_a_common_shape_raise(features):
    with pytest.raises(ValueError, match="snapshots are of different or unknown shape"):
        from_signal(signal(features), interval_minutes=5)


def test_from_signal_graph_that_changes_over_time_is_refused():
    dynamic = SimpleNamespace(features=[np.ones((2, 1))], edge_indices=[np.array([[0], [1]])])
    with pytest.raises(ValueError, match="no static graph"):
        from_signal(dynamic, interval_minutes=5)


def test_from_signal_empty_snapshot_is_refused():
    with pytest.raises(ValueError, match="snapshot without features"):
        from_signal(signal([np.ones((2, 1)), None]), interval_minutes=5)


def test_from_signal_unknown_feature_axis_names_the_known_ones():
    with pytest.raises(ValueError, match="feature_axis") as error:
        from_signal(signal([np.ones((2, 1))]), interval_minutes=5, feature_axis="time")
    assert lines_of(error)[1:3] == ["  expected: one of 'channels', 'lags'", "  got:      'time'"]


def test_load_city_hdf_of_pickled_columns_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    path, graph, _ = hdf(tmp_path)
    with h5py.File(path, "a") as file:
        del file["df/axis0"]
        column = file.create_dataset("df/axis0", (1,), dtype=h5py.vlen_dtype(np.uint8))
        column[0] = np.frombuffer(pickle.dumps(["a", "b"]), dtype=np.uint8)
    with pytest.raises(ValueError, match="cannot be read") as error:
        load_city(path, graph=graph)
    assert lines_of(error)[2] == "  got:      pickled entries"


@pytest.mark.data
def test_from_signal_chickenpox_record_is_that_of_the_file(shared_data):
    content = json.loads(shared_data("tgt/chickenpox.json").read_text())
    record = np.array(content["FX"], dtype=np.float32)
    lags = [record[t : t + 4].T for t in range(len(record) - 4)]
    city = from_signal(
        signal(lags, edge_index=np.array(content["edges"]).T), interval_minutes=7 * 1440, feature_axis="lags"
    )
    np.testing.assert_array_equal(city.values[..., 0], record[:-1])
    assert (city.edge_index[0] != city.edge_index[1]).all()


@pytest.mark.data
def test_from_signal_real_loader_of_metr_la_gives_its_record(shared_data, tmp_path):
    pytest.importorskip("torch_geometric")
    archive = shared_data("tgt/METR-LA.zip")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    shutil.copy(archive, tmp_path)
    from stlora_peft.backbones.tgt import load

    loaded = load().dataset.METRLADatasetLoader(raw_data_dir=str(tmp_path)).get_dataset(12, 12)
    city = from_signal(loaded, interval_minutes=5)
    raw = np.load(tmp_path / "node_values.npy")
    expected = (raw - raw.mean(axis=(0, 1))) / raw.std(axis=(0, 1))  # as the loader scales
    np.testing.assert_allclose(city.values, expected[:-12], atol=1e-4)  # the last 12 steps are in targets only
    assert city.num_nodes == 207
