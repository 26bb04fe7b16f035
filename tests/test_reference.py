"""The references agree with torch and with numbers worked out by hand; the helpers of the tests can fail."""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from toys import Holder, assert_same, assert_unchanged, error_lines, graph, raised, snapshot


def test_pointwise_update_two_nodes_rank_one_matches_hand_computed_values():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float64)  # [b t n c]
    factors = {
        "A": torch.tensor([[1.0, -1.0]]),
        "B": torch.tensor([[2.0], [3.0]]),
        "gate": torch.tensor([[10.0], [100.0]]),
        "node_bias": torch.tensor([[0.5], [0.25]]),
    }
    factors = {name: value.double() for name, value in factors.items()}
    # node 0: u = 10 (1 - 2) + 0.5 = -9.5; node 1: u = 100 (3 - 4) + 0.25 = -99.75; times B, times 4
    expected = [[[[-76.0, -114.0], [-798.0, -1197.0]]]]
    assert reference.pointwise_update(x, "gate", factors, 4.0).tolist() == expected


@pytest.mark.parametrize(
    ("mode", "stride", "dilation", "pad"),
    [("zeros", 1, 1, 0), ("zeros", 2, 2, 3), ("circular", 1, 2, 2), ("reflect", 3, 1, 2), ("replicate", 1, 1, 2)],
)
def test_conv_base_equals_torch_convolution(mode, stride, dilation, pad):
    conv = nn.Conv1d(3, 4, 3, stride, pad, dilation, padding_mode=mode).double()
    x = torch.randn(2, 7, 5, 3, dtype=torch.float64)
    expected = torch.stack([conv(x[:, :, n].mT).mT for n in range(5)], dim=2)
    temporal = reference.Temporal(3, stride, dilation, pad, pad, mode)
    assert_same(reference.conv_base(x, conv.weight, conv.bias, temporal), expected)


def test_graph_references_equal_pyg():
    gnn = pytest.importorskip("torch_geometric.nn")
    edge_index, edge_weight = graph(5)
    adjacency = reference.dense_graph(edge_index, edge_weight, 5)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    gcn, cheb = gnn.GCNConv(4, 6).double(), gnn.ChebConv(4, 6, K=4).double()
    assert_same(reference.gcn_base(x, gcn.lin.weight, gcn.bias, adjacency), gcn(x, edge_index, edge_weight))
    weights = [lin.weight for lin in cheb.lins]
    assert_same(
        reference.cheb_base(x, weights, cheb.bias, adjacency), cheb(x, edge_index, edge_weight, lambda_max=2.0)
    )


def test_normalisation_statistics_equal_batch_norm_of_one_batch():
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    norm = nn.BatchNorm2d(3, momentum=1.0).double()
    norm(x)
    mean, variance = reference.normalisation_statistics([x.numpy()])
    np.testing.assert_allclose(mean, norm.running_mean.numpy(), rtol=1e-12)
    np.testing.assert_allclose(variance, norm.running_var.numpy(), rtol=1e-12)


def test_mixture_variance_matches_samples():
    draws = np.random.default_rng(0).normal([[1.0], [4.0]], [[1.0], [2.0]], (2, 200_000))
    assert reference.mixture_variance(np.array([1.0, 4.0]), np.array([1.0, 4.0])) == 4.75
    assert draws.var() == pytest.approx(4.75, rel=0.02)


def test_predictor_correction_of_copied_inputs_is_their_normalised_leaky_relu():
    h = torch.randn(8, dtype=torch.float64)
    weights = {"weight_in": torch.eye(8), "bias_in": torch.zeros(8), "norm_out": torch.ones(8)}
    weights |= {"weight_out": torch.eye(8)[:4], "bias_out": torch.zeros(4)}
    weights |= {"A_out": torch.zeros(1, 8), "B_out": torch.zeros(4, 1)}
    weights = {name: value.double() for name, value in weights.items()}
    window, forecast = h[:4].view(1, 1, 1, 4), h[4:].view(1, 1, 1, 4)
    out = reference.predictor_correction(window, forecast, weights, "shared", 1.0, num_layers=0)
    assert_same(out.flatten(), F.leaky_relu(F.rms_norm(h, (8,)), 0.1)[:4])


# -- the helpers of the tests can fail ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [torch.tensor([1.0, 2.1]), torch.tensor([2.0, 1.0]), torch.ones(3), torch.tensor([1.0, 2.0]).double()]
)
def test_assert_same_with_another_value_order_shape_or_dtype_fails(wrong):
    assert_same(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(AssertionError):
        assert_same(wrong, torch.tensor([1.0, 2.0]))


def test_assert_same_with_nan_fails():
    with pytest.raises(AssertionError):
        assert_same(torch.tensor([float("nan")]), torch.tensor([1.0]))


@pytest.mark.parametrize("damage", ["value", "class", "module", "grad", "hook", "config"])
def test_assert_unchanged_after_any_change_fails(damage):
    model = Holder(nn.Linear(2, 2))
    before = snapshot(model)
    assert_unchanged(model, before)
    if damage == "value":
        model.layer.weight.data[0, 0] += 1e-6
    elif damage == "class":
        model.layer = nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)
    elif damage == "module":
        model.extra = nn.Identity()
    elif damage == "grad":
        model.layer.requires_grad_(False)
    elif damage == "hook":
        model.register_forward_hook(lambda *_: None)
    else:
        model.peft_config = {}
    with pytest.raises(AssertionError):
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    "text",
    [
        "one line.",
        "a.\n  expected: b\n  got:      c",
        "a\n  expected: b\n  got:      c\n  to fix:   d",
        "a.\n  got:      b\n  expected: c\n  to fix:   d",
    ],
)
def test_error_lines_of_another_form_fails(text):
    with pytest.raises(AssertionError):
        error_lines(ValueError(text))


def test_raised_without_an_error_fails():
    with pytest.raises(AssertionError, match="no ValueError"):
        raised(lambda: None)
