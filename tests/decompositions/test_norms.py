"""The norms in which truncations are optimal."""

from __future__ import annotations

import pytest
import torch

from rankNAS.decompositions import NORMS, ErrorNorm, LayerShape, Statistics, make_norm
from rankNAS.decompositions.norms import RIDGE, matrix_root
from rankNAS.exceptions import UsageError
from rankNAS.testing import definition_of_error, random_statistics

SHAPE = LayerShape(10, 6, groups=2)
STATISTICS = random_statistics(SHAPE)


def test_the_weight_metric_needs_no_statistics() -> None:
    assert make_norm("weight") == ErrorNorm()
    W = torch.randn(2, 3, 5).double()
    assert float(ErrorNorm().energy(W)) == pytest.approx(float(W.square().sum()))


def test_the_input_metric_is_the_second_moment_of_the_inputs() -> None:
    norm = make_norm("input", STATISTICS)
    assert norm.H is None
    assert norm.mean is None
    scale = STATISTICS.input_second_moment.diagonal(dim1=1, dim2=2).mean(1)
    torch.testing.assert_close(
        norm.C,
        STATISTICS.input_second_moment + RIDGE * scale[:, None, None] * torch.eye(5).double(),
    )


def test_the_energy_is_the_expected_squared_output() -> None:
    X = torch.randn(2, 5, 40).double()
    W = torch.randn(2, 3, 5).double()
    norm = make_norm("input", Statistics(X @ X.mT / 40, X.mean(-1)))
    expected = (W @ X).square().sum() / 40
    assert float(norm.energy(W)) == pytest.approx(float(expected), rel=1e-5)


def test_centred_statistics_are_the_covariance() -> None:
    X = torch.randn(2, 5, 40).double() + 3
    norm = make_norm("input", Statistics(X @ X.mT / 40, X.mean(-1)), centred=True)
    covariance = torch.stack([torch.cov(x, correction=0) for x in X])
    torch.testing.assert_close(norm.C, covariance, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.mean, X.mean(-1))


def test_the_fisher_metric_has_the_gradients_on_the_left() -> None:
    norm = make_norm("fisher", STATISTICS)
    torch.testing.assert_close(
        norm.H.mT @ norm.H, STATISTICS.output_gradient_second_moment, rtol=1e-4, atol=1e-4
    )
    W, V = torch.randn(2, 2, 3, 5).double()
    relative = norm.energy(W - V) / norm.energy(W)
    assert float(relative) == pytest.approx(definition_of_error(norm, W, V))


def test_the_root_squares_to_the_matrix_even_if_singular() -> None:
    X = torch.randn(4, 2).double()
    root = matrix_root(X @ X.T)
    torch.testing.assert_close(root @ root, X @ X.T)
    torch.testing.assert_close(root, root.mT)
    assert (torch.linalg.eigvalsh(root) > -1e-6).all()


def test_zero_statistics_give_the_identity() -> None:
    zero = Statistics(torch.zeros(1, 3, 3), torch.zeros(1, 3), torch.zeros(1, 2, 2))
    norm = make_norm("fisher", zero, centred=True)
    torch.testing.assert_close(norm.C, torch.eye(3).double()[None])
    torch.testing.assert_close(norm.H, torch.eye(2).double()[None])


@pytest.mark.parametrize("name", NORMS[1:])
def test_missing_statistics_are_an_error(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' needs calibration"):
        make_norm(name)


def test_fisher_without_gradients_is_an_error() -> None:
    statistics = Statistics(STATISTICS.input_second_moment, STATISTICS.mean)
    with pytest.raises(UsageError, match="'fisher' needs calibration"):
        make_norm("fisher", statistics)


def test_unknown_metric() -> None:
    with pytest.raises(UsageError, match="one of weight, input, fisher"):
        make_norm("taste", STATISTICS)
