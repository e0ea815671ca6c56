from __future__ import annotations

import torch

from rankNAS.compression.accumulators import unbiased_covariance


def test_the_covariance_is_unbiased() -> None:
    X = torch.randn(2, 9, 4).double() + 3
    moment, total = X.mT @ X, X.sum(1)
    expected = torch.stack([torch.cov(x.T) for x in X])
    torch.testing.assert_close(unbiased_covariance(moment, total, 9), expected)
    single = X[:, :1]
    alone = unbiased_covariance(single.mT @ single, single.sum(1), 1)
    torch.testing.assert_close(alone, torch.zeros(2, 4, 4).double())
