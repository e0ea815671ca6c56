"""The norms in which truncations are optimal."""

from __future__ import annotations

import pytest
import torch

from rankNAS.decompositions import METRICS, LayerShape, Metric, Statistics, make_metric
from rankNAS.decompositions.metrics import RIDGE, matrix_root
from rankNAS.exceptions import UsageError
from rankNAS.testing.contracts import definition_of_error, random_statistics

SHAPE = LayerShape(10, 6, groups=2)
STATISTICS = random_statistics(SHAPE)


def test_the_weight_metric_needs_no_statistics() -> None:
    assert make_metric("weight") == Metric()
    W = torch.randn(2, 3, 5).double()
    assert float(Metric().energy(W)) == pytest.approx(float(W.square().sum()))


def test_the_input_metric_is_the_second_moment_of_the_inputs() -> None:
    metric = make_metric("input", STATISTICS)
    assert metric.H is None
    assert metric.mean is None
    scale = STATISTICS.moment.diagonal(dim1=1, dim2=2).mean(1)
    torch.testing.assert_close(
        metric.C, STATISTICS.moment + RIDGE * scale[:, None, None] * torch.eye(5).double()
    )


def test_the_energy_is_the_expected_squared_output() -> None:
    X = torch.randn(2, 5, 40).double()
    W = torch.randn(2, 3, 5).double()
    metric = make_metric("input", Statistics(X @ X.mT / 40, X.mean(-1)))
    expected = (W @ X).square().sum() / 40
    assert float(metric.energy(W)) == pytest.approx(float(expected), rel=1e-5)


def test_centred_statistics_are_the_covariance() -> None:
    X = torch.randn(2, 5, 40).double() + 3
    metric = make_metric("input", Statistics(X @ X.mT / 40, X.mean(-1)), centred=True)
    covariance = torch.stack([torch.cov(x, correction=0) for x in X])
    torch.testing.assert_close(metric.C, covariance, rtol=0, atol=1e-5)
    torch.testing.assert_close(metric.mean, X.mean(-1))


def test_the_fisher_metric_has_the_gradients_on_the_left() -> None:
    metric = make_metric("fisher", STATISTICS)
    torch.testing.assert_close(metric.H.mT @ metric.H, STATISTICS.gradient, rtol=1e-4, atol=1e-4)
    W, V = torch.randn(2, 2, 3, 5).double()
    relative = metric.energy(W - V) / metric.energy(W)
    assert float(relative) == pytest.approx(definition_of_error(metric, W, V))


def test_the_root_squares_to_the_matrix_even_if_singular() -> None:
    X = torch.randn(4, 2).double()
    root = matrix_root(X @ X.T)
    torch.testing.assert_close(root @ root, X @ X.T)
    torch.testing.assert_close(root, root.mT)
    assert (torch.linalg.eigvalsh(root) > -1e-6).all()


def test_zero_statistics_give_the_identity() -> None:
    zero = Statistics(torch.zeros(1, 3, 3), torch.zeros(1, 3), torch.zeros(1, 2, 2))
    metric = make_metric("fisher", zero, centred=True)
    torch.testing.assert_close(metric.C, torch.eye(3).double()[None])
    torch.testing.assert_close(metric.H, torch.eye(2).double()[None])


@pytest.mark.parametrize("name", METRICS[1:])
def test_missing_statistics_are_an_error(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' needs calibration"):
        make_metric(name)


def test_fisher_without_gradients_is_an_error() -> None:
    statistics = Statistics(STATISTICS.moment, STATISTICS.mean)
    with pytest.raises(UsageError, match="'fisher' needs calibration"):
        make_metric("fisher", statistics)


def test_unknown_metric() -> None:
    with pytest.raises(UsageError, match="one of weight, input, fisher"):
        make_metric("taste", STATISTICS)
