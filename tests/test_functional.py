"""The free functions against numbers worked out by hand and against loops, in every order of axes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from toys import assert_same

from stlora_peft.tuner.functional import (
    Dropout,
    convolve,
    core_update,
    delta_weight,
    dropout,
    full_conv,
    gate_update,
    project,
)
from stlora_peft.tuner.products import nodewise

AXES = list(itertools.permutations(range(4), 2))


def arranged(x: torch.Tensor, node: int, channel: int) -> torch.Tensor:
    """``[b t n c]`` with nodes and channels moved to the axes asked for."""
    return x.movedim((2, 3), (node, channel))


def test_gate_update_two_nodes_matches_hand_computed_values():
    u = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # [b n r]
    gate, bias = torch.tensor([[1.0, 10.0], [0.0, -1.0]]), torch.tensor([[0.5, 0.0], [7.0, 0.25]])
    assert gate_update(u, gate, bias, 1, 2).tolist() == [[[1.5, 20.0], [7.0, -3.75]]]


def test_core_update_two_nodes_matches_hand_computed_values():
    u = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    core = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [2.0, 0.0]]])
    assert core_update(u, core, 1, 2).tolist() == [[[2.0, 1.0], [7.0, 6.0]]]


def test_nodewise_two_nodes_rank_one_matches_hand_computed_values():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    weight = torch.tensor([[[1.0, -1.0]], [[10.0, 100.0]]])
    assert nodewise(x, weight, 1, 2).tolist() == [[[-1.0], [430.0]]]


def test_full_conv_two_nodes_matches_hand_computed_values():
    x = torch.tensor([[[[1.0, 2.0, 4.0]], [[1.0, 2.0, 4.0]]]])  # [b n c t]
    weight = torch.tensor([[[[1.0, 1.0]]], [[[1.0, -1.0]]]])
    assert full_conv(x, weight, 1, 2, [1], [1]).tolist() == [[[[3.0, 6.0]], [[-1.0, -2.0]]]]
    assert full_conv(x, weight, 1, 2, [1], [2]).tolist() == [[[[5.0]], [[-3.0]]]]


def test_delta_weight_matches_hand_computed_values():
    up, down = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    assert delta_weight(up, down, 0.5).tolist() == [[1.5, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(("node", "channel"), AXES)
def test_updates_on_any_axes_equal_those_on_the_last(node, channel):
    u = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    gate, bias, core = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.randn(4, 5, 5).double()
    weight = torch.randn(4, 6, 5).double()
    view = arranged(u, node, channel)
    gated = u * gate + bias
    mixed = torch.stack([u[:, :, n] @ core[n].T for n in range(4)], dim=2)
    projected = torch.stack([u[:, :, n] @ weight[n].T for n in range(4)], dim=2)
    assert_same(gate_update(view, gate, bias, node, channel), arranged(gated, node, channel))
    assert_same(core_update(view, core, node, channel), arranged(mixed, node, channel))
    assert_same(nodewise(view, weight, node, channel), arranged(projected, node, channel))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("kernel", [(3,), (2, 3)])
def test_full_conv_equals_one_convolution_for_each_node(kernel, batch):
    stride, dilation = [2, 1][: len(kernel)], [1, 2][: len(kernel)]
    x = torch.randn(*batch, 4, 5, *(9, 8)[: len(kernel)], dtype=torch.float64)  # [... n c *]
    weight = torch.randn(4, 6, 5, *kernel, dtype=torch.float64)
    node, channel = len(batch), len(batch) + 1
    conv = F.conv1d if len(kernel) == 1 else F.conv2d
    expected = torch.stack(
        [
            conv(
                x.select(node, n).flatten(0, len(batch) - 1) if batch else x[n][None],
                weight[n],
                None,
                stride,
                0,
                dilation,
            )
            for n in range(4)
        ]
    )  # [n b r *]
    found = full_conv(x, weight, node, channel, stride, dilation)
    assert found.shape[: len(batch)] == batch
    assert_same(found.reshape(-1, *found.shape[len(batch) :]), expected.movedim(0, 1))


def test_full_conv_with_nodes_last_keeps_the_order_of_axes():
    x, weight = torch.randn(2, 5, 7, 4).double(), torch.randn(4, 6, 5, 3).double()  # [b c t n]
    expected = torch.stack([F.conv1d(x[..., n], weight[n], None, 2) for n in range(4)], dim=-1)
    assert_same(full_conv(x, weight, 3, 1, [2], [1]), expected)


@pytest.mark.parametrize("function", ["gate", "core", "full", "conv", "delta"])
def test_gradients_equal_finite_differences(function):
    def parameter(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    calls = {
        "gate": (lambda u, g, h: gate_update(u, g, h, 1, 2), (parameter(2, 3, 2), parameter(3, 2), parameter(3, 2))),
        "core": (lambda u, g: core_update(u, g, 1, 2), (parameter(2, 3, 2), parameter(3, 2, 2))),
        "full": (lambda x, a: nodewise(x, a, 1, 2), (parameter(2, 3, 4), parameter(3, 2, 4))),
        "conv": (lambda x, a: full_conv(x, a, 2, 1, [2], [2]), (parameter(2, 2, 3, 6), parameter(3, 2, 2, 2))),
        "delta": (lambda b, a: delta_weight(b, a, 2.5), (parameter(3, 2), parameter(2, 4, 3))),
    }
    assert torch.autograd.gradcheck(*calls[function])


@pytest.mark.parametrize("kernel", [(3,), (2, 1), (1, 3)])
def test_products_with_a_matrix_for_several_neighbours_equal_those_with_one_for_each(kernel):
    x = torch.randn(2, 6, 4, *[7] * len(kernel), dtype=torch.float64)  # [b n c *]
    weight = torch.randn(3, 5, 4, *kernel, dtype=torch.float64)
    stride, dilation = [2, 1][: len(kernel)], [2, 2][: len(kernel)]
    for node, channel in ((1, 2), (2, 1), (0, 1)):
        view = x.movedim((1, 2), (node, channel))
        each = full_conv(view, weight.repeat_interleave(2, 0), node, channel, stride, dilation)
        assert_same(full_conv(view, weight, node, channel, stride, dilation), each)
    matrix = weight.flatten(2)[..., :4]
    each = nodewise(x, matrix.repeat_interleave(2, 0), 1, 2)
    assert_same(nodewise(x, matrix, 1, 2), each)


# -- dropout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_dropout_zeroes_the_share_that_it_says_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.full((400, 1000), 3.0, dtype=torch.float64)
    y = dropout(x, p, training=True)
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs((y == 0).double().mean().item() - p) < 5 * deviation + 2**-17
    assert (y[y != 0] - 3 / (1 - p)).abs().max() < 3 / (1 - p) ** 2 * 2**-16  # the share is rounded
    assert abs(y.mean().item() / 3 - 1) < 5 * deviation / (1 - p)
    both = (y[:, 1:] == 0) & (y[:, :-1] == 0)  # neighbours share a random number, not their bits
    assert abs(both.double().mean().item() - p**2) < 5 * p / both.numel() ** 0.5 + 2**-15
    assert ((y == 0).double().mean(0) - p).abs().max() < 6 * (p * (1 - p) / 400) ** 0.5


def test_dropout_repeats_with_the_seed_and_differs_from_call_to_call():
    x = torch.rand(7, 3)
    torch.manual_seed(1)
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5, True), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_dropout_takes_every_shape_and_its_gradient_is_the_mask(shape):
    x = torch.randn(shape, requires_grad=True)
    y = dropout(x, 0.5, True)
    assert y.shape == x.shape
    y.sum().backward()
    assert torch.equal(x.grad * x.detach(), y.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dropout_keeps_type_and_memory_layout(dtype):
    x = torch.rand(2, 3, 4, 5).to(dtype)
    for view in (x.permute(0, 3, 1, 2), x[:, :, :1].expand(2, 3, 4, 5)):
        y = dropout(view, 0.25, True)
        assert (y.dtype, y.shape, y.stride()) == (dtype, view.shape, torch.empty_like(view).stride())


def test_dropout_does_nothing_without_training_or_probability():
    x = torch.rand(5)
    assert dropout(x, 0.0, True) is x
    assert torch.equal(dropout(x, 0.5, False), x)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert not torch.equal(Dropout(0.5)(torch.ones(100)), torch.ones(100))


# -- order in memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(1, 3), (1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("order", ["b c n t", "b t n c", "b n t c", "t b c n"])
def test_convolution_equals_torchs_in_any_order_of_memory(order: str, kernel: tuple[int, int]) -> None:
    stored = rearrange(torch.randn(2, 3, 5, 7, dtype=torch.float64), f"b c n t -> {order}").contiguous()
    x = rearrange(stored, f"{order} -> b c n t").requires_grad_()
    weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, *kernel), (4,)))
    for stride, dilation in (((1, 1), (1, 1)), ((1, 2), (1, 1)), ((1, 1), (1, 2))):
        found = convolve(x, weight, bias, stride, dilation)
        expected = F.conv2d(x, weight, bias, stride, 0, dilation)
        assert_same(found, expected)
        leaves, upstream = (x, weight, bias), torch.randn_like(expected)
        for one, other in zip(
            torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
        ):
            assert_same(one, other)


def test_convolution_along_one_axis_equals_torchs() -> None:
    x, weight = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    assert_same(convolve(x, weight, None, (2,), (3,)), F.conv1d(x, weight, None, 2, 0, 3))


@pytest.mark.parametrize("strides", [(30, 6, 30, 1), (30, 6, 6, 1), (5, 1, 99, 10)])
def test_projection_gives_the_same_numbers_whether_the_matrix_learns_or_not(strides: tuple[int, ...]) -> None:
    x = torch.randn(200).as_strided((2, 5, 1, 6), strides)
    weight = torch.randn(8, 6)
    expected = project(x, weight)
    assert torch.equal(project(x, weight.clone().requires_grad_()), expected)
    assert_same(expected, x @ weight.mT, tolerance=1e-5)
