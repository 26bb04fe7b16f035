"""The updates of several cities in one batched product, for every kind of layer, form of conditioning and layout."""

from __future__ import annotations

import copy

import pytest
import torch
from einops import rearrange
from hosts import ATTENTION, CELLS, CONV, LINEAR, RECURRENT, B, C, Host, T, options_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import CONDITIONINGS, adapted, assert_same

from stlora_peft.serving.members import take_apart
from stlora_peft.serving.stacks import ADAPTER, LayerStack
from stlora_peft.serving.tiles import WIDTH, Tiles
from stlora_peft.tuner.hosts import host_class
from stlora_peft.tuner.layout import parse_layout

SIZES = (3, 18, 5)
NODE_BY_NODE = [*LINEAR, *CONV, *RECURRENT, *CELLS, ATTENTION[0]]  # the others hear along edges or attend to nodes
CPU = torch.device("cpu")


def opened(host: Host, x: Tensor, num_nodes: int) -> Tensor:
    sizes = {"n": num_nodes} | ({"b": B} if "(b t" in host.pattern else {})
    return rearrange(x, f"{host.pattern} -> b t n c", **sizes)


def stacked(base: nn.Module, models: list[nn.Module], tiles: Tiles) -> nn.Module:
    """The layer with the adapters of all models."""
    parts = [take_apart(model, "default", CPU) for model in models]
    layer = host_class(base)(base, "layer")
    layer.num_nodes[ADAPTER] = tiles.num_slots
    if parts[0].layers["layer"].layout is not None:
        layer.layout[ADAPTER] = parse_layout(parts[0].layers["layer"].layout)
    factors = [each.layers["layer"] for each in parts]
    layer.stack = LayerStack(factors, [each.vectors for each in parts], tiles, layer.in_shape)
    return layer


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("host", NODE_BY_NODE, ids=str)
def test_stack_equals_each_citys_own_layer(host, conditioning):
    base = host.make().double().eval()
    options = options_of(host, conditioning)
    models = [adapted(copy.deepcopy(base), size, **options, lora_alpha=3 + size) for size in SIZES]
    tiles = Tiles.pack(SIZES, CPU)
    layer = stacked(base, models, tiles)
    xs = [torch.randn(B, T, size, C, dtype=torch.float64) for size in SIZES]
    for size, x, model in zip(SIZES, xs, models, strict=True):
        assert not torch.equal(host.call(model.base_model.model.layer, host.fold(x)), host.call(base, host.fold(x)))
        alone = stacked(base, [model], Tiles.pack([size], CPU))
        expected = host.call(model.base_model.model.layer, host.fold(x))
        assert_same(host.call(alone, host.fold(x)), expected, tolerance=1e-11)
    found = opened(host, host.call(layer, host.fold(tiles.join(xs, axis=2))), tiles.num_slots)
    for size, x, model, own in zip(SIZES, xs, models, tiles.split(found, 2), strict=True):
        expected = host.call(model.base_model.model.layer, host.fold(x))
        assert_same(own, opened(host, expected, size), tolerance=1e-11)


@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_split_is_the_inverse_of_join_and_no_tile_has_two_owners(sizes):
    tiles = Tiles.pack(sizes, CPU)
    parts = [torch.full((2, size, 3), float(i)) for i, size in enumerate(sizes)]
    joined = tiles.join(parts, axis=1, fill=-1.0)
    for part, own in zip(parts, tiles.split(joined, 1), strict=True):
        assert torch.equal(part, own)
    owners = tiles.entries(torch.arange(len(sizes)))
    assert len(owners) == tiles.num_slots == joined.shape[1]
    assert bool(((joined[0, :, 0] == owners) | (joined[0, :, 0] == -1)).all())
    assert tiles.num_slots - sum(sizes) < WIDTH * len(sizes)


def test_a_city_alone_is_not_padded():
    assert Tiles.pack([37], CPU).num_slots == 37
