"""IndexDataset of torch-geometric-temporal, as its index-batching examples load it."""

import runpy
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from stlora_peft.backbones import tgt
from stlora_peft.data import City, Scaler, Windows, simulate_city

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "04_index_dataset.py"


@pytest.fixture(scope="module")
def example() -> tuple[dict[str, Any], str]:
    """What the example defines, and what it prints."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as printed:
        names = runpy.run_path(str(EXAMPLE))
    return names, printed.getvalue()


@pytest.fixture(scope="module")
def city() -> City:
    return simulate_city(num_nodes=5, days=1, seed=0)


@pytest.fixture
def loader(example: tuple[dict[str, Any], str], city: City, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """METR-LA's loader on the city's files; what it would fetch is an error."""
    import requests

    example[0]["write_like_metr_la"](city, tmp_path)
    monkeypatch.setattr(requests, "get", lambda *words, **names: pytest.fail("something was to be fetched"))
    return example[0]["METRLADatasetLoader"](str(tmp_path), index=True)


def starts(part: DataLoader) -> list[int]:
    return [int(part.dataset.indices[place]) for place in part.sampler]


def test_example_prints_what_its_header_says(example: tuple[dict[str, Any], str]) -> None:
    lines = example[1].splitlines()
    assert len(lines) == 4
    assert all(line in EXAMPLE.read_text().split('"""')[1] for line in lines)


def test_batches_are_windows_of_the_same_city(loader: Any, city: City) -> None:
    train, *_, edges, weights, means, stds = loader.get_index_dataset(lags=6, batch_size=7, world_size=1, ddp_rank=0)
    readings = torch.from_numpy(np.nan_to_num(city.values)).float()
    scaler = Scaler.fit(readings.numpy())
    scaled = scaler.transform(readings)
    assert (float(means[0]), float(stds[0])) == pytest.approx((scaler.mean[0], scaler.std[0]), rel=1e-5)
    windows = Windows(scaled, scaled, torch.arange(len(scaled) - 11), window=6, horizon=6)
    found, expected = next(iter(train)), windows.__getitems__(range(7))
    for part, key in zip(found, ("x", "y"), strict=True):
        torch.testing.assert_close(part[..., :1].float(), expected[key], rtol=0, atol=1e-4)
    adjacency = torch.zeros(5, 5).index_put(
        tuple(torch.from_numpy(city.edge_index)), torch.from_numpy(city.edge_weight)
    )
    assert torch.equal(torch.zeros(5, 5).index_put(tuple(edges), weights), adjacency)


def test_two_processes_load_every_window_once_and_in_another_order_at_each_epoch(loader: Any) -> None:
    parts = [
        loader.get_index_dataset(lags=6, batch_size=4, shuffle=True, world_size=2, ddp_rank=rank)[0] for rank in (0, 1)
    ]
    orders = []
    for epoch in (0, 1):
        for part in parts:
            part.sampler.set_epoch(epoch)
        orders.append([start for pair in zip(*map(starts, parts), strict=True) for start in pair])
    count = len(parts[0].dataset)
    assert all(set(order) == set(range(count)) and len(order) <= count + 1 for order in orders)
    assert orders[0] != orders[1]


def test_windows_of_a_dask_array_are_those_of_the_array() -> None:
    tgt.load()
    from torch_geometric_temporal.signal.index_dataset import IndexDataset

    values, indices = np.random.default_rng(0).random((40, 3, 2), dtype=np.float32), np.arange(29)
    whole, lazy = IndexDataset(indices, values, 6), IndexDataset(indices, dask.array.from_array(values), 6, lazy=True)
    assert len(lazy) == 29
    for place in (0, 13, 28):
        assert all(torch.equal(one, other) for one, other in zip(whole[place], lazy[place], strict=True))
