"""Every operator keeps the contract."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from rankNAS.decompositions import (
    OPERATORS,
    GroupSvd,
    LayerShape,
    Rank,
    SpatialSvd,
    Svd,
    Target,
    Tucker2,
    make_norm,
)
from rankNAS.testing import LAYERS, OperatorContract, random_statistics


class TestSvd(OperatorContract):
    operator = Svd()


class TestSpatialSvd(OperatorContract):
    operator = SpatialSvd()


class TestTucker2(OperatorContract):
    operator = Tucker2()


class TestTucker2Refined(OperatorContract):
    operator = Tucker2(sweeps=2)
    layers = {name: LAYERS[name] for name in ("conv1d", "conv2d_grouped")}

    # Each pair has its own bases, so pairs are not nested and a family need not be monotone.
    test_error_does_not_increase_along_a_family = None


class TestGroupSvd(OperatorContract):
    operator = GroupSvd()

    def multiples(self, rank: Rank) -> Rank:
        return rank[1:]


def test_all_operators_are_tested() -> None:
    tested = {cls.operator.name for cls in OperatorContract.__subclasses__()}
    assert tested >= set(OPERATORS)
    assert all(operator.name == name for name, operator in OPERATORS.items())


CONV = LayerShape(16, 24, (3, 3), (1, 1), (1, 1), (1, 1), calls=((1, 8, 8),))


def test_what_is_refused() -> None:
    linear = LayerShape(8, 8)
    one_by_one = LayerShape(8, 8, (1, 1), (1, 1), (0, 0), (1, 1))
    depthwise = LayerShape(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), groups=8)
    row = LayerShape(8, 8, (1, 3), (1, 1), (0, 1), (1, 1))
    refused = {
        name: [x for x in (linear, one_by_one, depthwise, row, CONV) if op.refuses(x)]
        for name, op in OPERATORS.items()
    }
    assert refused == {
        "svd": [],
        "spatial_svd": [linear, one_by_one, row],
        "tucker2": [linear, one_by_one],
        "group_svd": [depthwise],
    }


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("svd", min(24, 16 * 9)),  # (o) x (c kh kw)
        ("spatial_svd", min(24 * 3, 16 * 3)),  # (o kw) x (c kh)
    ],
)
def test_ranks_go_up_to_the_smaller_side(name: str, largest: int) -> None:
    (family,) = OPERATORS[name].families(CONV)
    assert family == [(r,) for r in range(1, largest + 1)]


def test_group_svd_offers_the_divisors_up_to_the_largest() -> None:
    families = GroupSvd(max_groups=8).families(CONV)
    assert [family[0][0] for family in families] == [2, 4, 8]
    for family in families:
        k = family[0][0]
        assert family == [(k, r) for r in range(1, min(24, 16 * 9 // k) + 1)]


def test_tucker_offers_a_grid() -> None:
    families = Tucker2(steps=4).families(CONV)
    assert [[r for r, _ in family] for family in families] == [[6, 12, 18, 24]] * 4
    assert [family[0][1] for family in families] == [4, 8, 12, 16]


def test_T_H2_counts_and_break_even() -> None:
    f = c = 64
    k = 3
    shape = LayerShape(c, f, (k, k), (1, 1), (1, 1), (1, 1), calls=((1, 1, 1),))
    assert shape.cost().params == f * c * k * k == 36864
    cost = Tucker2().cost(shape, (16, 16))
    assert cost.params == 16 * 64 + 16 * 16 * 9 + 16 * 64 == 4352
    # r f + r^2 k^2 + r c = f c k^2
    break_even = (-(f + c) + math.sqrt((f + c) ** 2 + 4 * k**2 * f * c * k**2)) / (2 * k**2)
    assert break_even == pytest.approx(57.28, abs=5e-3)
    pays = [r for r in range(1, 65) if Tucker2().cost(shape, (r, r)).params < 36864]
    assert pays == list(range(1, math.floor(break_even) + 1))


@pytest.mark.parametrize(
    ("width", "expected"), [(16, 14.3), (32, 28.6), (128, 114.6), (256, 229.1), (512, 458.3)]
)
def test_T_H2_break_even_of_other_widths(width: int, expected: float) -> None:
    shape = LayerShape(width, width, (3, 3), (1, 1), (1, 1), (1, 1))
    dense = shape.cost().params
    below, above = math.floor(expected), math.ceil(expected)
    assert Tucker2().cost(shape, (below, below)).params < dense
    assert Tucker2().cost(shape, (above, above)).params > dense


def test_T_A7_counts() -> None:
    shape = LayerShape(64, 64, (3, 3), (1, 1), (1, 1), (1, 1))
    dense = shape.cost().params
    per_rank = {1: 640, 2: 704, 64: 4672}
    for k, expected in per_rank.items():
        operator = Svd() if k == 1 else GroupSvd()
        ranks = [(r,) if k == 1 else (k, r) for r in range(1, 65)]
        costs = [operator.cost(shape, rank).params for rank in ranks]
        assert expected == 64 * 9 + 64 * k
        assert costs == [r * expected for r in range(1, 65)]
        assert sum(c < dense for c in costs) == math.ceil(dense / expected) - 1
    assert Svd().cost(shape, (16,)).params == 10240
    assert GroupSvd().cost(shape, (2, 16)).params == 11264
    assert dense / 640 == pytest.approx(57.6)
    assert dense / 704 == pytest.approx(52.4, abs=0.05)
    assert dense / 4672 == pytest.approx(7.9, abs=0.05)
    assert max(r for k, r in GroupSvd().families(shape)[-1] if k == 64) == 9


@pytest.mark.parametrize("name", OPERATORS)
def test_inner_features_have_balanced_norms(name: str) -> None:
    """Each feature leaves a layer and enters the next with one norm, at any metric scale."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3)
    shape = LayerShape.of(layer, ((1, 9, 9),))
    statistics = random_statistics(shape)
    assert statistics.output_gradient_second_moment is not None
    tiny = replace(
        statistics, output_gradient_second_moment=statistics.output_gradient_second_moment * 1e-8
    )
    operator = OPERATORS[name]
    rank = operator.families(shape)[0][1]
    target = Target(shape.fold(layer.weight), make_norm("fisher", tiny))
    module = operator.factorise(shape, target, [rank]).truncate(rank, layer.bias)
    stages = list(module.children())
    for before, after in zip(stages[:-1], stages[1:], strict=True):
        left: torch.Tensor = before.weight.detach()  # type: ignore[operator, union-attr, assignment]
        right: torch.Tensor = after.weight.detach()  # type: ignore[operator, union-attr, assignment]
        produced = left.flatten(1).norm(dim=1)
        taken = right.transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(produced, taken, rtol=2e-2, atol=1e-6)
