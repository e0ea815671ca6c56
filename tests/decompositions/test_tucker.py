"""Tucker-2 against the higher-order SVD.

References:
    De Lathauwer et al., SIAM J. Matrix Anal. Appl. 2000: the bound of the truncated HOSVD.
    Kim et al., ICLR 2016: Tucker-2 of a convolution.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankNAS.decompositions import ErrorNorm, Factors, LayerShape, Svd, Target, Tucker2, make_norm
from rankNAS.testing import definition_of_error, random_statistics


def normal(seed: int, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def conv(W: Tensor, **kwargs: tuple[int, int]) -> LayerShape:
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | kwargs
    return LayerShape(W.shape[1], W.shape[0], tuple(W.shape[2:]), **geometry)


def tucker(W: Tensor, ranks: list[tuple[int, int]], sweeps: int = 0) -> Factors:
    shape = conv(W)
    return Tucker2(sweeps).factorise(shape, Target(shape.fold(W), ErrorNorm()), ranks)


def unfoldings(W: Tensor) -> tuple[Tensor, Tensor]:
    """Along outputs, o x (c s), and along inputs, c x (o s)."""
    return W.flatten(1), W.transpose(0, 1).flatten(1)


def hosvd(W: Tensor, r_out: int, r_in: int) -> Tensor:
    (U, *_), (V, *_) = (torch.linalg.svd(A, full_matrices=False) for A in unfoldings(W))
    U, V = U[:, :r_out], V[:, :r_in]
    return torch.einsum("ao,bc,ocij->abij", U @ U.mT, V @ V.mT, W)


def test_T_H1_exactness() -> None:
    U, V = torch.linalg.qr(normal(0, 6, 2)).Q, torch.linalg.qr(normal(1, 5, 3)).Q
    W = torch.einsum("or,cs,rsij->ocij", U, V, normal(2, 2, 3, 3, 3))
    factors = tucker(W, [(2, 3), (1, 3), (2, 2)])
    torch.testing.assert_close(factors.weight((2, 3)).reshape(W.shape), W, rtol=0, atol=1e-13)
    assert factors.error((2, 3)) == pytest.approx(0, abs=1e-13)
    assert factors.error((1, 3)) > 1e-3
    assert factors.error((2, 2)) > 1e-3


def test_T_H1_the_chain_is_the_dense_convolution() -> None:
    U, V = torch.linalg.qr(normal(0, 6, 2)).Q, torch.linalg.qr(normal(1, 5, 3)).Q
    module = nn.Conv2d(5, 6, 3, stride=2, padding=1).double().requires_grad_(False)
    module.weight.copy_(torch.einsum("or,cs,rsij->ocij", U, V, normal(2, 2, 3, 3, 3)))
    shape = LayerShape.of(module)
    factors = Tucker2().factorise(shape, Target(shape.fold(module.weight), ErrorNorm()), [(2, 3)])
    chain = factors.truncate((2, 3), module.bias)
    first, middle, last = chain
    assert [m.kernel_size for m in chain] == [(1, 1), (3, 3), (1, 1)]
    assert [m.stride for m in chain] == [(1, 1), (2, 2), (1, 1)]
    assert [m.padding for m in chain] == [(0, 0), (1, 1), (0, 0)]
    assert (first.out_channels, middle.out_channels, last.out_channels) == (3, 2, 6)
    x = normal(3, 2, 5, 8, 7)
    torch.testing.assert_close(chain(x), module(x))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_T_H3_equal_ranks_on_a_1x1_kernel_are_the_truncated_svd(rank: int) -> None:
    W = normal(0, 6, 5, 1, 1)
    shape = conv(W)
    svd = Svd().factorise(shape, Target(shape.fold(W), ErrorNorm()), [(rank,)])
    torch.testing.assert_close(
        tucker(W, [(rank, rank)]).weight((rank, rank)), svd.weight((rank,)), rtol=0, atol=1e-12
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 5),
    size=st.integers(1, 3),
    data=st.data(),
)
def test_T_H4_hosvd_and_its_bound(
    seed: int, outputs: int, inputs: int, size: int, data: st.DataObject
) -> None:
    W = normal(seed, outputs, inputs, size, 2)
    rank = data.draw(st.integers(1, outputs)), data.draw(st.integers(1, inputs))
    factors = tucker(W, [rank])
    total = float(W.square().sum())
    expected = hosvd(W, *rank)
    lost = float((W - expected).square().sum())
    assert factors.error(rank) * total == pytest.approx(lost, rel=1e-6, abs=1e-9)
    energies = [torch.linalg.svdvals(A).square() for A in unfoldings(W)]
    tails = [float(e[r:].sum()) for e, r in zip(energies, rank, strict=True)]
    assert max(tails) - 1e-9 <= factors.error(rank) * total <= sum(tails) + 1e-9


@pytest.mark.parametrize("norm", ["weight", "input", "fisher"])
@pytest.mark.parametrize("rank", [(1, 1), (2, 3), (4, 2), (5, 4)])
def test_sweeps_never_worsen(norm: str, rank: tuple[int, int]) -> None:
    W = normal(7, 6, 5, 3, 3)
    shape = conv(W)
    norm = make_norm(norm, random_statistics(shape))
    errors = []
    for sweeps in (0, 1, 2, 4, 8):
        factors = Tucker2(sweeps).factorise(shape, Target(shape.fold(W), norm), [rank])
        errors.append(factors.error(rank))
        direct = definition_of_error(norm, shape.fold(W).flatten(2), factors.weight(rank))
        assert errors[-1] == pytest.approx(direct, rel=1e-7)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), r_out=st.integers(1, 4), r_in=st.integers(1, 4))
def test_sweeps_reach_at_least_the_hosvd(seed: int, r_out: int, r_in: int) -> None:
    W = normal(seed, 4, 4, 2, 2)
    rank = r_out, r_in
    lost = float((W - hosvd(W, *rank)).square().sum() / W.square().sum())
    assert tucker(W, [rank], sweeps=3).error(rank) <= lost + 1e-10


def test_sweeps_gain_on_some_weight() -> None:
    gains = []
    for seed in range(5):
        W = normal(seed, 5, 5, 3, 3)
        gains.append(tucker(W, [(2, 2)]).error((2, 2)) - tucker(W, [(2, 2)], 5).error((2, 2)))
    assert max(gains) > 1e-3


def test_the_core_is_the_least_squares_optimum_in_the_metric() -> None:
    W = normal(0, 4, 3, 2, 2)
    shape = conv(W)
    norm = make_norm("fisher", random_statistics(shape))
    factors = Tucker2().factorise(shape, Target(shape.fold(W), norm), [(2, 2)])
    V, core, P = (w[0] for w in factors.stage_weights((2, 2)))
    Phi = torch.einsum("rc,st->rsct", V.reshape(2, 3), torch.eye(4).double()).reshape(8, 12)
    S, H = torch.linalg.cholesky(norm.C[0]), norm.H[0]
    folded = W.flatten(1)
    left, right = H @ P, Phi @ S
    best = torch.linalg.pinv(left) @ (H @ folded @ S) @ torch.linalg.pinv(right)
    torch.testing.assert_close(core.reshape(2, 8), best, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(factors.weight((2, 2))[0], P @ core.reshape(2, 8) @ Phi)
