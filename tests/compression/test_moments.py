"""Moments through the dense outputs, and the choice of the shrinkage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rankNAS.compression.moments import Moments, choose_shrinkage, split_moments
from rankNAS.compression.patches import folded, outputs_at, patches
from rankNAS.decompositions.norms import ErrorNorm
from rankNAS.decompositions.shapes import LayerShape

LAYERS = [
    (nn.Linear(6, 5), (40, 6)),
    (nn.Linear(6, 5), (8, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, stride=2), (10, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, groups=2), (10, 4, 9, 9)),
    (nn.Conv1d(4, 6, 3, dilation=2), (10, 4, 40)),
]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize(("module", "size"), LAYERS)
def test_outputs_give_the_cross_moment_of_the_inputs(
    module: nn.Module, size: tuple[int, ...]
) -> None:
    """E[y q^T] = W E[p q^T], at drawn positions, for the fitted and held-out parts together."""
    torch.manual_seed(0)
    p, q = torch.randn(size), torch.randn(size)
    shape = replace(LayerShape.of(module), calls=((1,),))
    P, Q = (patches(shape, x, seeded(), 6).double() for x in (p, q))
    with torch.no_grad():
        y = module(p)
    Y = outputs_at(shape, y, seeded(), 6)
    Y = Y - module.bias.detach().reshape(len(Y), 1, -1)  # type: ignore[union-attr,operator]
    ((fit, held),) = split_moments(shape, [(Q.float(), [Y])])
    both = fit + held
    assert both.count == Q.shape[1] and held.count == both.count // 4
    W = shape.fold(module.weight.detach()).double().flatten(2)  # type: ignore[arg-type]
    order = folded(shape)
    direct = W @ (P.mT @ Q)[:, order][:, :, order]
    torch.testing.assert_close(both.yq, direct, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(both.qq, (Q.mT @ Q)[:, order][:, :, order], rtol=1e-4, atol=1e-3)


def regression(count: int, noise: float) -> tuple[Tensor, Moments, Moments]:
    """A dense weight, and moments of inputs whose best weight differs from it a little."""
    draw = torch.Generator().manual_seed(1)
    W, change = (torch.randn(1, 8, 20, generator=draw).double() for _ in range(2))
    q = torch.randn(1, count, 20, generator=draw)
    y = q.double() @ (W + 0.1 * change).mT
    y = y + noise * torch.randn(y.shape, generator=draw)
    shape = LayerShape(20, 8, calls=((1,),))
    ((fit, held),) = split_moments(shape, [(q, [y.float()])])
    return W, fit, held


def test_shrinkage_is_small_with_many_samples_and_large_with_few() -> None:
    W, fit, held = regression(20000, 0.5)
    _, few, few_held = regression(60, 3.0)
    assert choose_shrinkage(W, fit, held, ErrorNorm()) <= 1e-2
    assert choose_shrinkage(W, few, few_held, ErrorNorm()) >= 0.3


def test_the_error_is_that_of_the_outputs() -> None:
    draw = torch.Generator().manual_seed(1)
    q, y = (torch.randn(2, 50, n, generator=draw).double() for n in (6, 4))
    A, H, s = (torch.randn(2, 4, n, generator=draw).double() for n in (6, 4, 1))
    shape = LayerShape(12, 8, groups=2, calls=((1,),))
    ((fit, held),) = split_moments(shape, [(q, [y])])
    residual = (y - q @ A.mT - s.mT) @ H.mT
    expected = residual.square().sum((0, 2)).mean()
    found = (fit + held).error(A, s.squeeze(-1), ErrorNorm(H=H))
    assert found == pytest.approx(float(expected))
