"""Nested bases: optimal for their own features at every rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankNAS.decompositions import ErrorNorm, LayerShape, Target, make_norm
from rankNAS.decompositions.leading import leading_rows
from rankNAS.decompositions.nested import diagonal_blocks, nested_basis
from rankNAS.testing import definition_of_error, random_statistics


def normal(seed: int, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def fisher(inputs: int, outputs: int) -> ErrorNorm:
    return make_norm("fisher", random_statistics(LayerShape(inputs, outputs)))


def features(basis: Tensor, columns: Tensor, rank: int) -> Tensor:
    """Phi (g, rank b, n), ordered by rank first, written out."""
    g, b, _, _ = basis.shape
    Phi = basis.new_zeros(g, rank, b, columns.numel())
    for block in range(b):
        Phi[:, :, block, columns[block]] = basis[:, block, :rank]
    return Phi.flatten(1, 2)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(1, 3),
    width=st.integers(1, 4),
    outputs=st.integers(1, 5),
    data=st.data(),
)
def test_the_output_map_is_the_least_squares_solution(
    seed: int, blocks: int, width: int, outputs: int, data: st.DataObject
) -> None:
    n = blocks * width
    R = data.draw(st.integers(1, width))
    columns = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).reshape(blocks, -1)
    W, basis = normal(seed, 1, outputs, n), normal(seed + 1, 1, blocks, R, width)
    norm = fisher(n, outputs)
    nested = nested_basis(Target(W, norm), basis, columns)
    S = torch.linalg.cholesky(norm.C)
    for rank in range(1, R + 1):
        Phi = features(basis, columns, rank)
        A = torch.linalg.lstsq((Phi @ S).mT, (W @ S).mT).solution.mT
        actual = nested.multiply(nested.output_map(rank))
        best = definition_of_error(norm, W, A @ Phi)
        assert definition_of_error(norm, W, actual) == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert float(nested.errors()[rank]) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_without_features_all_is_lost() -> None:
    nested = nested_basis(
        Target(normal(0, 1, 3, 4), ErrorNorm()),
        normal(1, 1, 1, 2, 4),
        torch.arange(4).unsqueeze(0),
    )
    errors = nested.errors()
    assert errors[0] == 1
    assert (errors.diff() <= 0).all()


def test_the_scale_of_a_feature_does_not_matter() -> None:
    W, basis, columns = normal(0, 1, 3, 6), normal(1, 1, 2, 2, 3), torch.arange(6).reshape(2, 3)
    norm = fisher(6, 3)
    one = nested_basis(Target(W, norm), basis, columns)
    other = nested_basis(
        Target(W, norm), basis * torch.tensor([1e-6, 1e5]).double()[:, None], columns
    )
    torch.testing.assert_close(one.errors(), other.errors())
    for rank in (1, 2):
        torch.testing.assert_close(
            one.multiply(one.output_map(rank)), other.multiply(other.output_map(rank))
        )


@pytest.mark.parametrize("norm", [ErrorNorm(), fisher(6, 3)], ids=["weight", "fisher"])
def test_dead_features_add_nothing(norm: ErrorNorm) -> None:
    W, basis, columns = normal(0, 1, 3, 6), normal(1, 1, 2, 3, 3), torch.arange(6).reshape(2, 3)
    basis[:, :, 1] = 0
    nested = nested_basis(Target(W, norm), basis, columns)
    alive = nested_basis(Target(W, norm), basis[:, :, [0, 2]], columns)
    errors = nested.errors()
    assert errors[1] == errors[2]
    assert float(errors[3]) == pytest.approx(float(alive.errors()[2]))
    torch.testing.assert_close(
        nested.multiply(nested.output_map(3)), alive.multiply(alive.output_map(2))
    )


def test_repeated_features_are_harmless() -> None:
    W, basis, columns = normal(0, 1, 3, 6), normal(1, 1, 1, 3, 6), torch.arange(6).unsqueeze(0)
    basis[:, :, 1] = basis[:, :, 0]
    norm = fisher(6, 3)
    nested = nested_basis(Target(W, norm), basis, columns)
    alive = nested_basis(Target(W, norm), basis[:, :, [0, 2]], columns)
    assert nested.L.isfinite().all()
    assert float(nested.errors()[3]) == pytest.approx(float(alive.errors()[2]), abs=1e-6)
    actual = nested.multiply(nested.output_map(3))
    assert definition_of_error(norm, W, actual) == pytest.approx(
        float(alive.errors()[2]), abs=1e-6
    )


@pytest.mark.parametrize(("rows", "width"), [(3, 7), (7, 3), (5, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_leading_rows_span_the_best_row_spaces(rows: int, width: int, weighted: bool) -> None:
    T = normal(0, rows, width)
    root = normal(1, width, width) if weighted else torch.eye(width).double()
    C = root @ root.mT
    basis = leading_rows(T, C if weighted else None, min(rows, width)).rows
    torch.testing.assert_close(basis.norm(dim=-1), torch.ones(len(basis)).double())
    values = torch.linalg.svdvals(T @ root)
    for r in range(1, len(basis) + 1):
        A = torch.linalg.lstsq((basis[:r] @ root).mT, (T @ root).mT).solution.mT
        loss = float(((T - A @ basis[:r]) @ root).square().sum())
        assert loss == pytest.approx(float(values[r:].square().sum()), rel=1e-5, abs=1e-9)


def test_leading_rows_beyond_the_numerical_rank_are_zero() -> None:
    T = normal(0, 5, 2) @ normal(1, 2, 6)
    for matrix in (T, T.mT.contiguous()):
        basis = leading_rows(matrix, None, 5).rows
        assert (basis[:2].norm(dim=-1) > 0.99).all()
        assert (basis[2:] == 0).all()


def test_diagonal_blocks() -> None:
    C = normal(0, 1, 6, 6)
    columns = torch.tensor([[0, 3], [5, 1], [2, 4]])
    blocks = diagonal_blocks(C, columns)
    assert diagonal_blocks(None, columns) is None
    for i, (a, b) in enumerate(columns.tolist()):
        assert torch.equal(
            blocks[0, i],
            torch.stack([C[0, [a, a], [a, b]], C[0, [b, b], [a, b]]]),
        )
