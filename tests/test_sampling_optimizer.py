"""Steps of rows: torch's AdamW where all rows have gradients, a loop over rows where some have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stlora_peft.sampling import RowAdamW
from stlora_peft.sampling.optimizer import clip_gradients

SETTINGS = {"lr": 0.05}


def sparse(ids: Tensor, rows: Tensor, size: int) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], rows, (size, *rows.shape[1:]), check_invariants=False)


def groups(values: Tensor) -> list[dict[str, object]]:
    return [{"params": [nn.Parameter(values.clone())], "weight_decay": 0.1}]


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 2)])
def test_all_rows_at_every_step_is_adamw(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, dtype=torch.float64)
    row, whole = RowAdamW(groups(start), **SETTINGS), torch.optim.AdamW(groups(start), **SETTINGS)
    (found,), (expected,) = (optimizer.param_groups[0]["params"] for optimizer in (row, whole))
    for _ in range(7):
        ids = torch.randperm(5)
        grad = torch.randn(shape, dtype=torch.float64)
        found.grad, expected.grad = sparse(ids, grad[ids], 5), grad
        row.step()
        whole.step()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_some_rows_match_a_loop_over_them() -> None:
    start = torch.randn(6, 2, dtype=torch.float64)
    optimizer = RowAdamW(groups(start), **SETTINGS)
    (found,) = optimizer.param_groups[0]["params"]
    theta, mean, square, count = start.tolist(), [[0.0] * 2 for _ in range(6)], [[0.0] * 2 for _ in range(6)], [0] * 6
    for step in range(9):
        ids = torch.randperm(6)[: 1 + step % 4]
        rows = torch.randn(len(ids), 2, dtype=torch.float64)
        found.grad = sparse(ids, rows, 6)
        optimizer.step()
        for n, row in zip(ids.tolist(), rows.tolist(), strict=True):
            count[n] += 1
            for k in range(2):
                mean[n][k] = 0.9 * mean[n][k] + 0.1 * row[k]
                square[n][k] = 0.999 * square[n][k] + 0.001 * row[k] ** 2
                m, v = mean[n][k] / (1 - 0.9 ** count[n]), square[n][k] / (1 - 0.999 ** count[n])
                theta[n][k] = theta[n][k] * (1 - 0.05 * 0.1) - 0.05 * m / (math.sqrt(v) + 1e-8)
        moved, counts = optimizer.stepped(found)
        assert sorted(moved.tolist()) == sorted(ids.tolist())
        assert counts.tolist() == [count[n] for n in moved.tolist()]
    torch.testing.assert_close(found.detach(), torch.tensor(theta, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_dense_and_sparse_gradients_are_taken_in_one_step_and_resumed() -> None:
    def make() -> tuple[RowAdamW, Tensor, Tensor]:
        torch.manual_seed(3)
        table, matrix = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(3, 3))
        return RowAdamW([table, matrix], lr=0.1), table, matrix

    def step(optimizer: RowAdamW, table: Tensor, matrix: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        table.grad, matrix.grad = (
            sparse(torch.tensor([seed % 4, 3 - seed % 2]), torch.randn(2, 2), 4),
            torch.randn(3, 3),
        )
        optimizer.step()
        assert optimizer.stepped(matrix) is None

    straight = make()
    for seed in (0, 1, 2):
        step(*straight, seed)
    first, second = make(), make()
    step(*first, 0)
    for mine, other in zip(second[1:], first[1:], strict=True):
        mine.data.copy_(other.data)
    second[0].load_state_dict(first[0].state_dict())
    for seed in (1, 2):
        step(*second, seed)
    assert torch.equal(second[1], straight[1])
    assert torch.equal(second[2], straight[2])


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_of_sparse_gradients_is_that_of_dense_ones(max_norm: float) -> None:
    found, wanted = ([nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(3))] for _ in range(2))
    ids, rows, grad = torch.tensor([3, 1]), torch.randn(2, 2), torch.randn(3)
    found[0].grad, found[1].grad = sparse(ids, rows, 4), grad.clone()
    wanted[0].grad, wanted[1].grad = sparse(ids, rows, 4).to_dense(), grad.clone()
    before = clip_gradients(found, max_norm)
    torch.testing.assert_close(before, nn.utils.clip_grad_norm_(wanted, max_norm))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad.to_dense(), other.grad)
