"""Greedy projection in closed form: contraction, the probe, error feedback, lazy and semi-lazy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankNAS.recovery.greedy_projection import (
    Projection,
    basis_of,
    estimates,
    is_worth_while,
    selected,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthonormal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def test_any_basis_leaves_at_most_the_mean_energy() -> None:
    """|G - P P^T G|^2 <= (1 - r/n) |G|^2 with exact energies, by the pigeonhole principle."""
    n, m, rank = 32, 64, 8
    for seed in range(300):
        U, G = orthonormal(n, seed), normal(n, m, seed=1000 + seed)
        P = U[:, selected((U.T @ G).norm(dim=1), rank)]
        left = (G - P @ (P.T @ G)).square().sum() / G.square().sum()
        assert left <= 1 - rank / n + 1e-12


def test_the_squared_estimates_are_unbiased() -> None:
    n, m, count = 6, 10, 20_000
    U, H = orthonormal(n, 1), normal(n, m, seed=2)
    exact = (U.T @ H).square().sum(1)
    draws = generator(3)
    total = torch.zeros(n, dtype=torch.float64)
    for _ in range(count):
        probe = torch.randn(n, m, generator=draws, dtype=torch.float64)
        total += estimates(U.T @ H, probe).square()
    assert float((total / count - exact).abs().max() / exact.max()) < 0.05


def test_estimates_of_a_mean_are_means_of_estimates() -> None:
    """What makes them fit for an all-reduce."""
    H, probe = normal(4, 5, 8), normal(5, 8, seed=1)
    mean = torch.stack([estimates(x, probe) for x in H]).mean(0)
    torch.testing.assert_close(mean, estimates(H.mean(0), probe))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 2, 3, 3), (8, 2)])
def test_what_is_sent_and_the_error_sum_to_the_gradients(shape: tuple[int, ...]) -> None:
    projection = Projection(torch.Size(shape), 2)
    gradients, draws = [normal(*shape, seed=seed) for seed in range(12)], generator()
    projection.refresh(gradients[0])
    sent = torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients[1:]:
        means = projection.begin(gradient, draws)
        part = projection.part(means)
        assert part.shape == (min(2, projection.size[0]), projection.size[1])
        sent += projection.end(part)
    error = projection.error.T if projection.tall else projection.error
    total = torch.stack(gradients[1:]).sum(0)
    torch.testing.assert_close(sent + error.reshape(shape), total)
    whole = projection.with_error(torch.zeros(shape, dtype=torch.float64))
    torch.testing.assert_close(sent + whole, total)
    assert not projection.error.any()


def test_full_rank_sends_everything() -> None:
    projection, G = Projection(torch.Size((5, 9)), 99), normal(5, 9)
    projection.refresh(normal(5, 9, seed=1))
    part = projection.part(projection.begin(G, generator()))
    torch.testing.assert_close(projection.end(part), G)
    assert projection.rank == 5 and float(projection.error.abs().max()) < 1e-12


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    projection = Projection(torch.Size((3, 4)), 1)
    projection.refresh(torch.full((3, 4), math.nan))
    assert projection.basis is not None and torch.equal(projection.basis, torch.eye(3))
    part = projection.part(projection.begin(torch.full((3, 4), math.inf), generator()))
    assert not bool(projection.end(part).isfinite().all())


def relative_error(mode: str, workers: int = 4, steps: int = 1500, refresh: int = 0) -> float:
    """Of a least-squares problem whose workers have other targets, with a fixed step.

    Args:
        mode: ``semi`` selects directions anew in each step, ``lazy`` keeps those of the last
            refresh, ``lazy without feedback`` drops the errors.
        workers: Their number.
        steps: The number of steps.
        refresh: Steps after which the basis is computed anew; 0 for never.
    """
    n, m, rank = 32, 64, 8
    targets = [normal(n, m, seed=seed) for seed in range(workers)]
    mean = torch.stack(targets).mean(0)
    projections = [Projection(torch.Size((n, m)), rank) for _ in range(workers)]
    x = torch.zeros(n, m, dtype=torch.float64)
    fixed = torch.zeros(n, dtype=torch.float64)
    fixed[:rank] = 1.0
    for step in range(steps):
        gradients = [x - target for target in targets]
        if step == 0 or (refresh and step % refresh == 0):
            for projection in projections:
                projection.refresh(torch.stack(gradients).mean(0))
        if mode == "lazy without feedback":
            for projection in projections:
                projection.error = torch.zeros(n, m)
        pairs = list(zip(projections, gradients, strict=True))
        means = torch.stack([p.begin(g, generator(step)) for p, g in pairs]).mean(0)
        parts = torch.stack([p.part(means if mode == "semi" else fixed) for p, _ in pairs])
        x = x - 0.1 * [p.end(parts.mean(0)) for p, _ in pairs][0]
    return float((x - mean).norm() / mean.norm())


def test_a_fresh_selection_converges_and_a_fixed_one_stalls() -> None:
    """From a basis of the first step alone. The test does not tell greedy from random."""
    assert relative_error("semi", steps=900) < 1e-10
    assert relative_error("lazy", steps=300) > 0.5
    assert relative_error("lazy", refresh=200) < 0.1


def test_feedback_changes_nothing_where_the_projection_is_fixed() -> None:
    """The errors stay orthogonal to it."""
    first, second = (relative_error(m, steps=60) for m in ("lazy", "lazy without feedback"))
    assert first == pytest.approx(second, rel=1e-12)


def test_small_and_flat_parameters_are_not_worth_while() -> None:
    shapes = {(64,): False, (64, 64): True, (8, 64): False, (64, 8): False, (64, 8, 3, 3): True}
    for shape, expected in shapes.items():
        assert is_worth_while(torch.Size(shape), 8, 2.0) == expected
    assert basis_of(normal(3, 7)).shape == (3, 3)
