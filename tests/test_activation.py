"""Normalisation, activation and dropout of the predictor against their formula, with first and second derivatives."""

from __future__ import annotations

import pytest
import torch
from toys import assert_same

from stlora_peft.tuner.activation import _Activation, activated


def reference(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The formula, row by row."""
    rows = []
    for row in x.flatten(0, -2):
        normal = row / ((row * row).sum() / len(row) + torch.finfo(x.dtype).eps).sqrt()
        rows.append(torch.stack([v if v > 0 else 0.1 * v for v in scale * normal]))
    return torch.stack(rows).view_as(x)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, scale = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 4, 5), (5,)))
    return x.requires_grad_(), scale.requires_grad_()


def test_forward_and_backward_equal_the_formula() -> None:
    x, scale = inputs()
    y, expected = activated(x, scale, 0.0, training=True), reference(x, scale)
    assert_same(y, expected)
    weight = torch.randn(3, 4, 5, dtype=torch.float64)
    for found, wanted in zip(
        torch.autograd.grad((y * weight).sum(), (x, scale)),
        torch.autograd.grad((expected * weight).sum(), (x, scale)),
        strict=True,
    ):
        assert_same(found, wanted)


def test_first_and_second_derivatives_with_a_mask() -> None:
    mask = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0], dtype=torch.float64).expand(3, 4, 5)

    def run(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return _Activation.apply(x, scale, mask)

    assert torch.autograd.gradcheck(run, inputs())
    assert torch.autograd.gradgradcheck(run, inputs())


def test_dropped_entries_are_zero_and_the_others_scaled_the_same_with_gradients_and_without() -> None:
    x, scale = inputs()
    found = []
    for enabled in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(enabled):
            found.append(activated(x, scale, 0.5, training=True))
    assert_same(found[0], found[1])
    whole = activated(x, scale, 0.5, training=False)
    kept = found[0] != 0
    assert 0 < int(kept.sum()) < kept.numel()
    assert_same(found[0][kept], 2 * whole[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type(dtype: torch.dtype) -> None:
    x, scale = inputs()
    y = activated(x.to(dtype), scale.float(), 0.0, training=True)
    assert y.dtype == dtype
    assert_same(y.double(), activated(x, scale, 0.0, training=True), tolerance=2e-2)


def test_transforms_of_torch_func_see_it() -> None:
    x, scale = inputs()
    found = torch.func.grad(lambda s: activated(x.detach(), s, 0.0, training=True).sum())(scale.detach())
    assert_same(found, torch.autograd.grad(activated(x, scale, 0.0, training=True).sum(), scale)[0])
