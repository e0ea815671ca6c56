"""Decompositions into two layers against closed forms.

References:
    ALDS: Liebenwein et al., NeurIPS 2021. AFM: Ji et al., EMNLP Findings 2024 (Bolaco).
    DRONE: Chen et al., NeurIPS 2021.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.decompositions import (
    ErrorNorm,
    Factors,
    GroupSvd,
    LayerShape,
    Operator,
    Rank,
    SpatialSvd,
    Statistics,
    Svd,
    Target,
    make_norm,
)
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.testing import definition_of_error, random_statistics

seeds = st.integers(0, 10**6)


def normal(seed: int, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def linear(operator: Operator, W: Tensor, norm: ErrorNorm | None, ranks: list[Rank]) -> Factors:
    """Factors of a linear layer with weight W (o, n)."""
    shape = LayerShape(W.shape[1], W.shape[0])
    return operator.factorise(shape, Target(shape.fold(W), norm or ErrorNorm()), ranks)


def truncated(W: Tensor, rank: int) -> Tensor:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def spectral(W: Tensor, factors: Factors, rank: Rank) -> float:
    """||W - What||_2 / ||W||_2, the error of ALDS."""
    norm = torch.linalg.matrix_norm
    return float(norm(W - factors.weight(rank)[0], 2) / norm(W, 2))


# ------------------------------------------------------------------------------ plain and ALDS


@settings(max_examples=25, deadline=None)
@given(seed=seeds, outputs=st.integers(1, 7), inputs=st.integers(1, 7))
def test_svd_in_the_weight_metric_is_the_truncated_svd(
    seed: int, outputs: int, inputs: int
) -> None:
    W = normal(seed, outputs, inputs)
    ranks = [(r,) for r in range(1, min(W.shape) + 1)]
    factors = linear(Svd(), W, None, ranks)
    energies = torch.linalg.svdvals(W).square()
    for (r,) in ranks:
        torch.testing.assert_close(factors.weight((r,))[0], truncated(W, r), rtol=0, atol=1e-6)
        tail = float(energies[r:].sum() / energies.sum())
        assert factors.error((r,)) == pytest.approx(tail, rel=1e-6, abs=1e-11)


def test_spatial_svd_is_the_truncated_svd_of_the_separable_unfolding() -> None:
    module = nn.Conv2d(3, 5, (3, 2)).double()
    shape = LayerShape.of(module)
    W = module.weight.detach()
    unfolded = W.permute(0, 3, 1, 2).reshape(5 * 2, 3 * 3)  # (o kw) x (c kh)
    factors = SpatialSvd().factorise(shape, Target(shape.fold(W), ErrorNorm()), [(9,)])
    for r in range(1, 10):
        folded = factors.weight((r,)).reshape(5, 3, 3, 2).permute(0, 3, 1, 2).reshape(10, 9)
        torch.testing.assert_close(folded, truncated(unfolded, r))


def test_T_A1_spectral_error_is_the_next_singular_value() -> None:
    W = torch.diag(torch.tensor([8.0, 4, 2, 1]).double())
    factors = linear(Svd(), W, None, [(r,) for r in range(1, 5)])
    errors = [spectral(W, factors, (j,)) for j in range(5)]
    assert errors == pytest.approx([1, 0.5, 0.25, 0.125, 0], abs=1e-12)
    assert min(j for j, e in enumerate(errors) if e <= 0.3) == 2
    assert sum(e > 0.3 for e in errors) == 2


def alphas(W: Tensor, k: int, j: int) -> list[float]:
    """(j + 1)-th singular value of each of k column groups, zero beyond the last."""
    values = [torch.linalg.svdvals(block) for block in W.chunk(k, 1)]
    return [float(v[j]) if j < len(v) else 0.0 for v in values]


def test_T_A2_groups_against_the_bound() -> None:
    W = torch.diag(torch.tensor([8.0, 4, 2, 1]).double())
    factors = linear(GroupSvd(), W, None, [(2, 1)])
    assert spectral(W, factors, (2, 1)) == pytest.approx(0.5)
    assert max(alphas(W, 2, 1)) == pytest.approx(4)
    assert math.sqrt(2) * max(alphas(W, 2, 1)) / 8 == pytest.approx(0.7071, abs=1e-4)


def test_T_A3_the_bound_is_attained() -> None:
    A = torch.diag(torch.tensor([2.0, 1]).double())
    W = torch.cat([A, A], 1)
    assert float(torch.linalg.matrix_norm(W, 2)) == pytest.approx(2.8284, abs=1e-4)
    factors = linear(GroupSvd(), W, None, [(2, 1)])
    bound = math.sqrt(2) * max(alphas(W, 2, 1)) / math.sqrt(8)
    assert spectral(W, factors, (2, 1)) == pytest.approx(0.5)
    assert bound == pytest.approx(0.5)


@settings(max_examples=100, deadline=None)
@given(
    seed=seeds,
    outputs=st.integers(1, 6),
    k=st.integers(2, 4),
    width=st.integers(1, 4),
    data=st.data(),
)
def test_T_A4_spectral_error_lies_between_the_bounds(
    seed: int, outputs: int, k: int, width: int, data: st.DataObject
) -> None:
    W = normal(seed, outputs, k * width)
    j = data.draw(st.integers(1, min(outputs, width)))
    factors = linear(GroupSvd(), W, None, [(k, j)])
    norm = spectral(W, factors, (k, j)) * float(torch.linalg.matrix_norm(W, 2))
    largest = max(alphas(W, k, j))
    assert largest - 1e-6 <= norm <= math.sqrt(k) * largest + 1e-6


def test_T_A6_more_groups_can_be_exact_at_the_same_budget() -> None:
    a = torch.zeros(8).double()
    a[0] = 3
    W = torch.zeros(4, 16).double()
    W[0, :8], W[1, 8:] = a, a * 2 / 3
    assert torch.linalg.svdvals(W).tolist() == pytest.approx([3, 2, 0, 0])
    shape = LayerShape(16, 4)
    assert Svd().cost(shape, (1,)).params == 20
    assert Svd().cost(shape, (2,)).params > 24
    assert GroupSvd().cost(shape, (2, 1)).params == 24
    assert GroupSvd().cost(shape, (8, 1)).params == 48
    assert spectral(W, linear(Svd(), W, None, [(1,)]), (1,)) == pytest.approx(2 / 3)
    grouped = linear(GroupSvd(), W, None, [(2, 1)])
    assert spectral(W, grouped, (2, 1)) == pytest.approx(0, abs=1e-12)
    assert grouped.error((2, 1)) == pytest.approx(0, abs=1e-12)


def test_T_A8_the_pair_multiplies_back() -> None:
    module = nn.Conv2d(6, 5, 3, stride=2, padding=1).double().requires_grad_(False)
    shape, x = LayerShape.of(module), normal(0, 2, 6, 7, 7)
    W = module.weight.flatten(1)
    factors = GroupSvd().factorise(shape, Target(shape.fold(module.weight), ErrorNorm()), [(3, 5)])
    for r in range(1, 6):
        first, second = factors.truncate((3, r), module.bias)
        assert (first.groups, first.out_channels) == (3, 3 * r)
        blocks = zip(
            second.weight.flatten(1).chunk(3, 1), first.weight.flatten(1).chunk(3, 0), strict=True
        )
        product = torch.cat([U @ V for U, V in blocks], 1)
        groupwise = torch.cat([truncated(block, r) for block in W.chunk(3, 1)], 1)
        torch.testing.assert_close(product.detach(), groupwise)
        dense = nn.functional.conv2d(x, product.reshape(5, 6, 3, 3), module.bias, 2, 1)
        torch.testing.assert_close(second(first(x)), dense)
    torch.testing.assert_close(second(first(x)), module(x))  # full rank


# ------------------------------------------------------------------------- joint refit, ours


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    outputs=st.integers(1, 5),
    k=st.integers(2, 3),
    width=st.integers(1, 4),
    data=st.data(),
)
def test_the_joint_refit_is_never_worse_than_groupwise_truncation(
    seed: int, outputs: int, k: int, width: int, data: st.DataObject
) -> None:
    n = k * width
    r = data.draw(st.integers(1, min(outputs, width)))
    W, X, Y = normal(seed, outputs, n), normal(seed + 1, n, 3 * n), normal(seed + 2, outputs, 20)
    C = X @ X.mT
    root = torch.linalg.cholesky(Y @ Y.mT).mT  # H^T H = Y Y^T
    norm = ErrorNorm(C[None], root[None])
    factors = linear(GroupSvd(), W, norm, [(k, r)])
    blocks = []
    for columns in torch.arange(n).chunk(k):
        S = torch.linalg.cholesky(C[columns][:, columns])
        best = truncated(root @ W[:, columns] @ S, r)
        blocks.append(torch.linalg.solve(root, best) @ torch.linalg.inv(S))
    groupwise = definition_of_error(norm, W[None], torch.cat(blocks, 1)[None])
    assert factors.error((k, r)) <= groupwise + 1e-7


def test_the_joint_refit_gains_where_groups_are_correlated() -> None:
    # Both groups see the same input x, so W x = (W1 + W2) x has rank one: one feature suffices.
    W1, W2 = torch.diag(torch.tensor([2.0, 1]).double()), torch.diag(torch.tensor([0, -1.0]))
    W = torch.cat([W1, W2.double()], 1)
    C = torch.eye(2).double().repeat(2, 2)
    groupwise = torch.cat([truncated(W1, 1), truncated(W2.double(), 1)], 1)
    norm = ErrorNorm(C[None] + 1e-9 * torch.eye(4).double())
    assert definition_of_error(norm, W[None], groupwise[None]) == pytest.approx(0.25)
    assert linear(GroupSvd(), W, norm, [(2, 1)]).error((2, 1)) == pytest.approx(0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, r=st.integers(1, 3))
def test_the_second_layer_is_the_least_squares_optimum_for_the_first(seed: int, r: int) -> None:
    W, X = normal(seed, 4, 6), normal(seed + 1, 6, 15)
    factors = linear(GroupSvd(), W, ErrorNorm((X @ X.mT)[None]), [(2, r)])
    first, second = factors.stage_weights((2, r))
    Phi = torch.block_diag(*first.reshape(2, r, 3))
    best = torch.linalg.lstsq((Phi @ X).mT, (W @ X).mT).solution.mT
    torch.testing.assert_close(second[0] @ Phi @ X, best @ Phi @ X, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors.weight((2, r))[0], second[0] @ Phi)


# ------------------------------------------------------------------------------------- DRONE


def drone(W: Tensor, X: Tensor, rank: int) -> Tensor:
    """The closed form as published: two thin SVDs without zeros, and the SVD of their product."""

    def thin(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = torch.linalg.svd(A, full_matrices=False)
        keep = S > 1e-10 * S[0]
        return U[:, keep], S[keep], V[keep]

    UW, SW, VW = thin(W)
    UX, SX, _ = thin(X)
    UZ, SZ, VZ = torch.linalg.svd(SW[:, None] * (VW @ UX) * SX, full_matrices=False)
    left = UW @ UZ[:, :rank] * SZ[:rank].sqrt()
    return left @ (SZ[:rank].sqrt()[:, None] * VZ[:rank] / SX) @ UX.mT


def inputs(seed: int, n: int, count: int = 60) -> Tensor:
    """Correlated inputs in the columns."""
    return (
        normal(seed, n, n) @ torch.diag(0.7 ** torch.arange(n).double()) @ normal(seed, n, count)
    )


@pytest.mark.parametrize(("outputs", "n"), [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)])
def test_drone_error_is_the_tail_of_W_X(outputs: int, n: int) -> None:
    W, X = normal(3, outputs, n), inputs(4, n)
    full = min(outputs, n)
    factors = linear(Svd(), W, ErrorNorm((X @ X.mT)[None]), [(full,)])
    energies = torch.linalg.svdvals(W @ X).square()
    S = torch.linalg.cholesky(X @ X.mT)
    U = torch.linalg.svd(W @ X, full_matrices=False).U
    for k in range(1, full + 1):
        tail = float(energies[k:].sum())
        ours = factors.weight((k,))[0]
        forms = {
            "ours": ours,
            "published": drone(W, X, k),
            "output side": U[:, :k] @ U[:, :k].mT @ W,
            "whitened": truncated(W @ S, k) @ torch.linalg.inv(S),
        }
        for name, form in forms.items():
            loss = float(((W - form) @ X).square().sum())
            assert loss == pytest.approx(tail, rel=1e-6, abs=1e-10), name
            torch.testing.assert_close(form @ X, ours @ X, rtol=0, atol=1e-4)
        assert factors.error((k,)) == pytest.approx(
            tail / float(energies.sum()), rel=1e-6, abs=1e-12
        )
        plain = float(((W - truncated(W, k)) @ X).square().sum())
        assert tail <= plain * (1 + 1e-9) + 1e-10


def test_drone_with_isotropic_inputs_is_the_truncated_svd() -> None:
    W = normal(0, 6, 8)
    plain = linear(Svd(), W, None, [(6,)])
    for scale in (1e-3, 1.0, 1e3):
        factors = linear(Svd(), W, ErrorNorm(scale * torch.eye(8).double()[None]), [(6,)])
        for k in range(1, 7):
            torch.testing.assert_close(
                factors.weight((k,)), plain.weight((k,)), rtol=0, atol=1e-12
            )
            assert factors.error((k,)) == pytest.approx(plain.error((k,)), abs=1e-12)


@pytest.mark.parametrize(("outputs", "n"), [(6, 9), (9, 6), (12, 6)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_drone_with_inputs_in_a_subspace_is_exact_on_it(outputs: int, n: int, rank: int) -> None:
    W, X = normal(0, outputs, n), normal(1, n, rank) @ normal(2, rank, 50)
    full = min(outputs, n)
    for operator, ranks in ((Svd(), [(r,) for r in range(1, full + 1)]), (GroupSvd(), [(3, 2)])):
        factors = linear(operator, W, ErrorNorm((X @ X.mT)[None]), ranks)
        for r in ranks:
            assert factors.weight(r).isfinite().all()
            loss = float(((W - factors.weight(r)[0]) @ X).norm() / (W @ X).norm())
            if r[-1] * (3 if len(r) == 2 else 1) < rank:
                assert loss > 1e-3
            elif len(r) == 1:
                assert loss < 1e-6
                assert factors.error(r) < 1e-11


def test_drone_gains_on_inputs_near_a_subspace() -> None:
    W = normal(0, 30, 30)
    X = normal(1, 30, 8) @ normal(2, 8, 400)
    noise = normal(3, 30, 400)
    X = X + 0.05 * noise * X.norm() / noise.norm()
    norm = make_norm("input", Statistics((X @ X.mT)[None], X.mean(1)[None]))
    factors = linear(Svd(), W, norm, [(8,)])
    ours = ((W - factors.weight((8,))[0]) @ X).norm()
    plain = ((W - truncated(W, 8)) @ X).norm()
    assert float(plain / ours) >= 5


def test_T_C6_whitening_ranks_the_directions_by_their_inputs() -> None:
    W, C = torch.eye(2).double(), torch.diag(torch.tensor([4.0, 1]).double())
    assert torch.linalg.svdvals(W @ torch.linalg.cholesky(C)).tolist() == pytest.approx([2, 1])
    factors = linear(Svd(), W, ErrorNorm(C[None]), [(1,)])
    torch.testing.assert_close(
        factors.weight((1,))[0], torch.diag(torch.tensor([1.0, 0]).double())
    )
    D = W - factors.weight((1,))[0]
    assert float((D @ C @ D.mT).trace()) == pytest.approx(1)  # squared loss
    assert factors.error((1,)) == pytest.approx(1 / 5)


@pytest.mark.parametrize("norm", ["weight", "fisher", "pooled"])
@pytest.mark.parametrize(("r1", "r2"), [(1, 1), (2, 3), (4, 2)])
def test_T_C5_two_stages_are_one(norm: str, r1: int, r2: int) -> None:
    W = normal(0, 7, 8)
    norm = make_norm(norm, random_statistics(LayerShape(8, 7)))
    first = linear(Svd(), W, norm, [(r1,)]).weight((r1,))[0]
    second = linear(Svd(), W - first, norm, [(r2,)]).weight((r2,))[0]
    once = linear(Svd(), W, norm, [(r1 + r2,)]).weight((r1 + r2,))[0]
    torch.testing.assert_close(first + second, once, rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------- AFM


def one_layer(
    module: nn.Module, statistics: Statistics, *, rank: int, norm: str = "input"
) -> Factorisation:
    shape = LayerShape.of(module, ((1,),))
    choices = (DENSE, Choice("svd", (rank,)))
    costs = (shape.cost(), Svd().cost(shape, (rank,)))
    layer = Layer("0", (), shape, choices, costs)
    space = SearchSpace({"0": layer}, (), shape.cost(), (1, shape.inputs))
    return factorise(nn.Sequential(module), space, {"0": statistics}, norm=norm)


@pytest.mark.parametrize("norm", ["input", "pooled"])
def test_T_C1_features_are_truncated_about_their_mean(norm: str) -> None:
    module = nn.Linear(2, 2).double()
    nn.init.eye_(module.weight)
    nn.init.zeros_(module.bias)
    mean = torch.tensor([5.0, 2]).double()
    covariance = torch.diag(torch.tensor([9.0, 1]).double())
    statistics = Statistics((covariance + torch.outer(mean, mean))[None], mean[None])
    choice = Choice("svd", (1,))
    factorisation = one_layer(module, statistics, rank=1, norm=norm)
    weight, bias = factorisation.layers["0"].folded(choice)
    torch.testing.assert_close(weight, torch.diag(torch.tensor([1.0, 0]).double()))
    torch.testing.assert_close(bias, torch.tensor([0.0, 2]).double())
    network = factorisation.materialise(Allocation.of({"0": choice}))
    y = torch.tensor([[7.0, 3]]).double()
    torch.testing.assert_close(network(y), torch.tensor([[7.0, 2]]).double())
    # expected squared error 1 out of a variance of 10
    assert factorisation.layers["0"].error(choice) == pytest.approx(0.1, rel=1e-5)


def test_T_C1_outputs_in_an_affine_subspace_are_exact() -> None:
    module = nn.Linear(5, 4).double().requires_grad_(False)
    X = normal(0, 100, 2) @ normal(1, 2, 5) + normal(2, 1, 5)
    statistics = Statistics((X.mT @ X / 100)[None], X.mean(0)[None])
    factorisation = one_layer(module, statistics, rank=2)
    network = factorisation.materialise(Allocation.of({"0": Choice("svd", (2,))}))
    torch.testing.assert_close(network(X), module(X), rtol=0, atol=1e-4)
    # without the correction of the mean, rank two does not suffice for three dimensions
    uncentred = linear(Svd(), module.weight, ErrorNorm((X.mT @ X)[None]), [(2,)])
    assert float(((module.weight - uncentred.weight((2,))[0]) @ X.mT).abs().max()) > 1e-2


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_corrected_bias_removes_the_mean_error(rank: int) -> None:
    module = nn.Linear(5, 4).double().requires_grad_(False)
    X = normal(0, 100, 5) @ normal(1, 5, 5) + 2
    statistics = Statistics((X.mT @ X / 100)[None], X.mean(0)[None])
    factorisation = one_layer(module, statistics, rank=rank)
    network = factorisation.materialise(Allocation.of({"0": Choice("svd", (rank,))}))
    difference = (network(X) - module(X)).detach()
    torch.testing.assert_close(difference.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-10)
    variance = (module(X) - module(X).mean(0)).square().sum()
    relative = float(difference.square().sum() / variance)
    error = factorisation.layers["0"].error(Choice("svd", (rank,)))
    assert error == pytest.approx(relative, rel=1e-4, abs=1e-6)
