"""Stable ranks in closed form, and their gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankNAS.decompositions.stable_rank import (
    modified_stable_rank,
    scaled_stable_rank,
    stable_rank,
)
from rankNAS.exceptions import UsageError

DIAGONAL = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).double())


def random_matrix(seed: int, rows: int = 6, columns: int = 5, rank: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)


def test_t_b1_values() -> None:
    assert float(stable_rank(DIAGONAL)) == pytest.approx(30 / 16)
    found = [float(modified_stable_rank(DIAGONAL, r)) for r in (1, 2, 3, 4)]
    assert found == pytest.approx([6 / 4, 3 / 7, 1 / 9, 0])
    squared = [float(modified_stable_rank(DIAGONAL, r, 2)) for r in (1, 2, 3, 4)]
    assert squared == pytest.approx([14 / 16, 5 / 25, 1 / 29, 0])


@given(st.integers(0, 1000), st.floats(0.01, 100), st.sampled_from([1, 2]))
def test_t_b1_invariants(seed: int, scale: float, exponent: int) -> None:
    W = random_matrix(seed)
    values = [float(modified_stable_rank(W, r, exponent)) for r in range(1, 6)]
    scaled = [float(modified_stable_rank(scale * W, r, exponent)) for r in range(1, 6)]
    assert scaled == pytest.approx(values)
    assert all(a > b for a, b in itertools.pairwise(values))
    assert values[-1] == 0
    assert float(stable_rank(scale * W)) == pytest.approx(float(stable_rank(W)))
    assert float(modified_stable_rank(W, 1, 2)) + 1 == pytest.approx(float(stable_rank(W)))


@given(st.integers(0, 1000), st.integers(1, 4))
def test_t_b1_is_zero_for_the_target_rank_alone(seed: int, rank: int) -> None:
    W = random_matrix(seed, rank=rank)
    assert float(modified_stable_rank(W, rank)) == pytest.approx(0, abs=1e-12)
    assert rank == 1 or float(modified_stable_rank(W, rank - 1)) > 1e-6
    assert 1 <= float(stable_rank(W)) <= rank + 1e-9


def test_t_b2_gradient() -> None:
    W = DIAGONAL.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(modified_stable_rank(W, 2), W)
    # 1/H for the tail, -T/H^2 for the head; H = 7, T = 3
    expected = torch.diag(torch.tensor([-3 / 49, -3 / 49, 1 / 7, 1 / 7]).double())
    torch.testing.assert_close(gradient, expected)
    # a step of descent raises the head and lowers the tail
    after = torch.linalg.svdvals(DIAGONAL - 0.1 * gradient)
    before = torch.linalg.svdvals(DIAGONAL)
    assert (after[:2] > before[:2]).all() and (after[2:] < before[2:]).all()


@pytest.mark.parametrize("exponent", [1, 2])
def test_t_b2_gradient_in_general(exponent: int) -> None:
    W = random_matrix(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: modified_stable_rank(x, 2, exponent), W)
    assert torch.autograd.gradcheck(stable_rank, W)


def test_batches_are_matrices_one_by_one() -> None:
    W = torch.stack([random_matrix(seed) for seed in range(4)])
    for function in (stable_rank, lambda x: modified_stable_rank(x, 2)):
        torch.testing.assert_close(function(W), torch.stack([function(x) for x in W]))


def test_cuttlefish() -> None:
    # 1.875 is cut to 1; 1 x 4 / 3 rounds up to 2
    assert scaled_stable_rank(DIAGONAL, initial=3.0) == 2
    assert scaled_stable_rank(DIAGONAL, initial=0.1) == 4  # never above the full rank
    wide = torch.cat([torch.eye(3), torch.zeros(3, 5)], 1)
    assert scaled_stable_rank(wide, initial=4.0) == math.ceil(3 * 3 / 4)


def test_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match="got 0 and 1"):
        modified_stable_rank(DIAGONAL, 0)
    with pytest.raises(UsageError, match="got 1 and 3"):
        modified_stable_rank(DIAGONAL, 1, 3)
