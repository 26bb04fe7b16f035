"""One matrix product for each node: gradients of every kind, and how they lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import assert_same

from stlora_peft.tuner.nodewise import MANY_ROWS, nodewise

FEW = 3
MANY = MANY_ROWS // 2  # steps of two windows


def drawn(steps: int, matrices: int = 4) -> tuple[Tensor, Tensor]:
    """Two windows [b t n c] of four nodes with two channels, and matrices to three."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, steps, 4, 2), (matrices, 3, 2))
    x, weight = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_()


def looped(x: Tensor, weight: Tensor) -> Tensor:
    """Node after node."""
    own = weight.repeat_interleave(4 // len(weight), 0)
    return torch.stack([part @ matrix.mT for part, matrix in zip(x.unbind(2), own, strict=True)], 2)


@pytest.mark.parametrize("steps", [FEW, MANY])
@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 2, 1), (3, 2, 1, 0)])
def test_product_and_gradients_equal_a_loop_over_nodes_on_any_axes(steps, matrices, order):
    x, weight = drawn(steps, matrices)
    node, channel = order.index(2), order.index(3)
    back = [order.index(axis) for axis in range(4)]
    found, expected = nodewise(x.permute(order), weight, node, channel).permute(back), looped(x, weight)
    assert_same(found, expected)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad(y, (x, weight), upstream) for y in (found, expected)]
    for mine, reference in zip(*gradients, strict=True):
        assert_same(mine, reference)


@pytest.mark.parametrize("steps", [FEW, MANY])
def test_gradient_lies_in_memory_as_the_input(steps):
    x, weight = drawn(steps)
    (gradient,) = torch.autograd.grad(nodewise(x, weight, 2, 3).sum(), x)
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("steps", [FEW, MANY])
def test_second_derivatives_equal_finite_differences(steps):
    x, weight = drawn(steps)
    part = x.detach()[:1, :, :2].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z, matrices: nodewise(z, matrices[:2], 2, 3), (part, weight))


@pytest.mark.parametrize("learns", [(True, False), (False, True)])
def test_only_what_learns_gets_a_gradient(learns):
    x, weight = (tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(drawn(FEW), learns, strict=True))
    nodewise(x, weight, 2, 3).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == learns


def test_without_gradients_the_numbers_are_the_same_bits():
    x, weight = drawn(MANY)
    with torch.no_grad():
        plain = nodewise(x, weight, 2, 3)
    assert torch.equal(plain, nodewise(x, weight, 2, 3))


def test_autocast_computes_in_half_precision():
    x, weight = (tensor.detach().float().requires_grad_() for tensor in drawn(FEW))
    with torch.autocast("cpu", torch.bfloat16):
        y = nodewise(x, weight, 2, 3)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert_same(weight.grad, torch.autograd.grad(looped(x, weight).sum(), weight)[0], tolerance=2e-2)


def test_transforms_of_torch_func_see_it():
    x, weight = (tensor.detach() for tensor in drawn(FEW))
    found = torch.func.grad(lambda matrices: nodewise(x, matrices, 2, 3).square().sum())(weight)
    weight.requires_grad_()
    assert_same(found, torch.autograd.grad(looped(x, weight).square().sum(), weight)[0])
