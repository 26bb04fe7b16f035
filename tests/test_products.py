"""Products with one matrix and with one for each node: gradients of every kind, and how they lie in memory."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import assert_same

from stlora_peft.tuner.activation import activated
from stlora_peft.tuner.products import MANY_ROWS, nodewise, project

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


SHAPES = [(5, 2), (2, 5), (3, 3), (1, 4), (4, 1)]


def affine(out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [b n c], a matrix and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, in_features), (out_features, in_features), (out_features,))
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_projection_has_the_bits_of_torch_and_the_gradients_of_a_loop_over_rows(shape, biased):
    x, weight, bias = affine(*shape)
    inputs = (x, weight, bias)[: 2 + biased]
    found = project(*inputs)
    assert torch.equal(found, F.linear(x.flatten(0, 1), *inputs[1:]).unflatten(0, (2, 3)))
    expected = torch.stack([(weight * row).sum(1) + (bias if biased else 0) for row in x.flatten(0, 1)]).view_as(found)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad(y, inputs, upstream) for y in (found, expected)]
    for mine, reference in zip(*gradients, strict=True):
        assert_same(mine, reference)


@pytest.mark.parametrize("shape", SHAPES)
def test_second_derivatives_of_a_projection_equal_finite_differences(shape):
    assert torch.autograd.gradgradcheck(project, affine(*shape))


@pytest.mark.parametrize("learning", [0, 1, 2])
def test_only_what_learns_of_a_projection_gets_a_gradient(learning):
    inputs = [tensor.detach().requires_grad_(i == learning) for i, tensor in enumerate(affine(5, 2))]
    project(*inputs).sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == [i == learning for i in range(3)]


def test_projection_under_autocast_computes_in_half_precision():
    x, weight, bias = (tensor.detach().float().requires_grad_() for tensor in affine(5, 2))
    with torch.autocast("cpu", torch.bfloat16):
        y = project(x, weight, bias)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    expected = x.detach().sum((0, 1)).expand(5, 2)
    assert_same(weight.grad, expected, tolerance=2e-2)


def test_transforms_of_torch_func_see_a_projection():
    x, weight, bias = (tensor.detach() for tensor in affine(5, 2))
    found = torch.func.grad(lambda matrix: project(x, matrix, bias).square().sum())(weight)
    weight.requires_grad_()
    assert_same(found, torch.autograd.grad(F.linear(x, weight, bias).square().sum(), weight)[0])


class Layers(torch.nn.Module):
    """Every function with gradients of its own, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = torch.nn.Parameter(torch.randn(3, 2))
        self.own = torch.nn.Parameter(torch.randn(4, 3, 3))
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """Project, project node by node, activate."""
        return activated(nodewise(project(x, self.shared), self.own, 2, 3), self.scale, 0.0, training=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_model_is_saved_though_its_weights_learn():
    layers, x = Layers(), torch.randn(2, 5, 4, 2)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layers, x), file)
    file.seek(0)
    assert_same(torch.jit.load(file)(x), layers(x), tolerance=1e-6)
