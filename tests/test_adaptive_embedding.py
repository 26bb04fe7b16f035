"""What an adapter has of STAEformer's vectors in another city."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_extension import NOW, OLD, city, trained
from toys import assert_same, call, pristine, raised, randomised, small_backbone

from stlora_peft import STLoraConfig, node_subset
from stlora_peft.backbones import build_backbone
from stlora_peft.backbones.adaptive_embedding import AdaptiveEmbedding, LowRankEmbedding
from stlora_peft.extension import extend_adapter
from stlora_peft.methods import frugal
from stlora_peft.tuner.node_bound import rebuild

T, N, D = 3, 4, 5


def base() -> AdaptiveEmbedding:
    return AdaptiveEmbedding(T, N, D).double()


def test_vectors_are_the_mean_and_what_sets_a_node_apart():
    table = base()
    new = table.adapted(7)
    assert isinstance(new, LowRankEmbedding)
    assert (tuple(new.rows.shape), tuple(new.basis.shape)) == ((7, 6), (T, 6, D))
    torch.nn.init.normal_(new.basis)
    for t in range(T):
        for n in range(7):
            for d in range(D):
                own = sum(float(new.rows[n, k] * new.basis[t, k, d]) for k in range(6))
                assert float(new.weight[t, n, d]) == pytest.approx(
                    float(table.weight[t, :, d].mean()) + own, rel=1e-12
                )
    assert torch.equal(new(torch.zeros(1)), new.weight)


def test_every_node_starts_from_the_mean_bit_for_bit():
    table = base()
    assert torch.equal(table.adapted(7).weight, table.resized(7).weight)


def test_in_a_city_of_as_many_nodes_the_table_is_whole():
    table = base()
    new = table.adapted(N)
    assert type(new) is AdaptiveEmbedding
    assert torch.equal(new.weight, table.weight)
    assert new.weight is not table.weight


def test_the_backbones_vectors_get_no_gradient_and_are_not_saved():
    table = base()
    new = table.adapted(7)
    new.weight.square().sum().backward()
    assert table.weight.grad is None
    assert new.basis.grad.abs().max() > 0
    assert set(new.state_dict()) == {"rows", "basis"}


def test_where_the_backbone_trains_too_the_copy_is_whole():
    model = get_peft_model(small_backbone("staeformer"), STLoraConfig(num_nodes=7, freeze_backbone=False))
    assert type(model.get_base_model().adaptive_embedding.current()) is AdaptiveEmbedding


@pytest.mark.parametrize("frozen", [True, False])
def test_saved_and_loaded_it_forecasts_bit_for_bit(tmp_path, frozen):
    backbone = small_backbone("staeformer")
    before = copy.deepcopy(backbone)
    model = randomised(get_peft_model(backbone, STLoraConfig(num_nodes=7, freeze_backbone=frozen))).eval()
    for parameter in model.get_base_model().adaptive_embedding.current().parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    for fast in (False, True):
        again = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path, low_cpu_mem_usage=fast).eval()
        torch.testing.assert_close(call(again, 7), call(model, 7), rtol=1e-6, atol=1e-6)


def test_unloading_leaves_the_backbones_vectors_as_they_were():
    backbone = small_backbone("staeformer")
    table = backbone.adaptive_embedding
    assert get_peft_model(backbone, STLoraConfig(num_nodes=7)).unload().adaptive_embedding is table


def test_some_nodes_have_their_rows_of_the_table_and_learn():
    model = randomised(get_peft_model(small_backbone("staeformer"), STLoraConfig(num_nodes=7))).eval()
    low_rank = model.get_base_model().adaptive_embedding.current()
    torch.nn.init.normal_(low_rank.basis)
    whole, ids = low_rank.weight.detach(), torch.tensor([4, 1, 6])
    with node_subset(model, ids):
        torch.testing.assert_close(low_rank.weight, whole[:, ids])
        low_rank.weight.square().sum().backward()
    assert low_rank.weight.shape == whole.shape
    assert low_rank.basis.grad.abs().max() > 0


def test_merging_writes_the_vectors_as_a_table():
    backbone = small_backbone("staeformer")
    config = STLoraConfig(num_nodes=7, conditioning="shared", predictor=None)
    model = randomised(get_peft_model(backbone, config)).eval()
    torch.nn.init.normal_(model.get_base_model().adaptive_embedding.current().basis)
    expected = call(model, 7)
    merged = model.merge_and_unload()
    assert type(merged.adaptive_embedding) is AdaptiveEmbedding
    assert merged.adaptive_embedding.num_nodes == 7
    assert_same(call(merged, 7), expected, tolerance=1e-5)


def test_another_number_of_nodes_takes_the_mean_of_the_rows():
    low_rank = base().adapted(7)
    rows = low_rank.resized(9).rows
    assert rows.shape == (9, 6)
    assert_same(rows, low_rank.rows.mean(0).expand(9, 6))


def test_an_adapter_of_the_backbones_own_number_of_nodes_cannot_be_extended():
    backbone = build_backbone("staeformer", **{"num_nodes": len(OLD)} | _sizes()).eval()
    assert raised(lambda: extend_adapter(trained(backbone), pristine(backbone), city(NOW))) == {
        "where": "node-bound module 'adaptive_embedding' cannot be extended",
        "expected": "tensors of floats, the same for every N, with one entry for each node, or for each pair",
        "got": "'rows' of torch.float32 with the shapes nothing at N=4, (6, 6) at N=6, (7, 6) at N=7",
        "fix": "make a new adapter for the whole city with 'stlora adapt'",
    }


def test_one_more_node_than_now_may_be_the_backbones_own_number():
    backbone = build_backbone("staeformer", **{"num_nodes": len(NOW) + 1} | _sizes()).eval()
    assert extend_adapter(trained(backbone), pristine(backbone), city(NOW)).peft_config["default"].num_nodes == 6


def _sizes() -> dict[str, object]:
    small = dict(small_backbone("staeformer").hyperparameters)
    del small["num_nodes"]
    return small


@pytest.mark.parametrize("name", ["staeformer", "d2stgnn"])
@pytest.mark.parametrize("num_nodes", [46, 206])
def test_adapters_of_backbones_of_300_000_numbers_are_small(name, num_nodes):
    backbone = build_backbone(name, num_nodes=207, in_channels=3)
    total = sum(parameter.numel() for parameter in backbone.parameters())
    assert total > 300_000
    for most, options in ((0.1, {}), (0.01, frugal(backbone))):
        model = get_peft_model(rebuild(backbone, 207), STLoraConfig(num_nodes=num_nodes, **options))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) < most * total
