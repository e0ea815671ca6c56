from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression

from rankNAS.allocation import DENSE, Choice
from rankNAS.decompositions import OPERATORS
from rankNAS.decompositions.shapes import COSTS, Cost, LayerShape
from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.search_spaces.base import Layer
from rankNAS.search_spaces.policies import (
    RankPolicy,
    candidate_choices,
    hardware_choices,
    latency_pareto_ranks,
    rank_limits,
)


@st.composite
def shapes(draw: st.DrawFn) -> LayerShape:
    dims = draw(st.integers(0, 2))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 5)) for _ in range(dims))
    calls = tuple(
        (draw(st.integers(1, 3)), *(draw(st.integers(5, 9)) for _ in range(dims)))
        for _ in range(draw(st.integers(1, 2)))
    )
    return LayerShape(
        inputs=groups * draw(st.integers(1, 24)),
        outputs=groups * draw(st.integers(1, 24)),
        kernel=kernel,
        stride=tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        padding=tuple(draw(st.integers(0, 2)) for _ in range(dims)),
        dilation=(1,) * dims,
        groups=1 if dims == 0 else groups,
        bias=draw(st.booleans()),
        calls=calls,
    )


policies = st.builds(
    RankPolicy,
    candidates=st.integers(1, 300),
    multiple_of=st.sampled_from([1, 2, 3, 8]),
    cost=st.sampled_from(COSTS),
)


def families(
    shape: LayerShape, multiple_of: int = 1, operators: tuple[str, ...] = tuple(OPERATORS)
) -> list[dict[Choice, Cost]]:
    """Every rank of every family with its cost."""
    return [
        {Choice(name, rank): OPERATORS[name].cost(shape, rank) for rank in family}
        for name in operators
        if OPERATORS[name].refuses(shape) is None
        for family in OPERATORS[name].families(shape, multiple_of)
    ]


def saves(cost: Cost, dense: Cost) -> bool:
    return cost.macs < dense.macs and cost.params < dense.params


@settings(deadline=None)
@given(shapes(), policies)
def test_choices_are_dense_then_cheaper_ones_by_cost(
    shape: LayerShape, policy: RankPolicy
) -> None:
    choices, costs = candidate_choices(shape, policy)
    assert len(choices) == len(costs) == len(set(choices))
    assert choices[0] == DENSE and costs[0] == shape.cost()
    for choice, cost in list(zip(choices, costs, strict=True))[1:]:
        assert saves(cost, costs[0])
        assert cost == OPERATORS[choice.operator].cost(shape, choice.rank)
    ordered = [cost[policy.cost] for cost in costs]
    assert ordered == sorted(ordered, reverse=True)
    assert len(choices) - 1 <= policy.candidates


@settings(deadline=None)
@given(shapes(), policies)
def test_ranks_are_multiples(shape: LayerShape, policy: RankPolicy) -> None:
    for choice in candidate_choices(shape, policy)[0][1:]:
        ranks = choice.rank[1:] if choice.operator == "group_svd" else choice.rank
        assert all(rank > 0 and rank % policy.multiple_of == 0 for rank in ranks)


@settings(deadline=None)
@given(shapes(), st.sampled_from([1, 2, 3]))
def test_without_a_cap_exactly_the_saving_ranks_are_offered(
    shape: LayerShape, multiple_of: int
) -> None:
    policy = RankPolicy(candidates=10**6, multiple_of=multiple_of)
    offered = set(candidate_choices(shape, policy)[0][1:])
    expected = set()
    for family in families(shape, multiple_of):
        saving = {c: cost for c, cost in family.items() if saves(cost, shape.cost())}
        # costs increase along a family, so none dominates another
        assert len({cost.macs for cost in saving.values()}) == len(saving)
        expected |= set(saving)
    assert offered == expected


@settings(deadline=None)
@given(shapes(), policies)
def test_the_largest_saving_rank_of_every_family_present_is_offered(
    shape: LayerShape, policy: RankPolicy
) -> None:
    offered = set(candidate_choices(shape, policy)[0])
    for family in families(shape, policy.multiple_of):
        saving = [c for c, cost in family.items() if saves(cost, shape.cost())]
        if offered & set(saving):
            assert saving[-1] in offered


@settings(deadline=None)
@given(shapes(), policies)
def test_no_choice_is_dominated_within_its_family(shape: LayerShape, policy: RankPolicy) -> None:
    table = dict(zip(*candidate_choices(shape, policy), strict=True))
    for family in families(shape, policy.multiple_of):
        present = [c for c in family if c in table]  # ranks increase along a family
        costs = [table[c][policy.cost] for c in present]
        assert all(a < b for a, b in zip(costs, costs[1:], strict=False))


@pytest.mark.parametrize("cap", [1, 2, 3, 4, 7, 40])
def test_the_cap_holds_for_each_layer_and_ranks_are_spread(cap: int) -> None:
    shape = LayerShape(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), calls=((1, 8, 8),))
    choices, _ = candidate_choices(shape, RankPolicy(candidates=cap))
    assert 1 <= len(choices) - 1 <= cap
    svd, _ = candidate_choices(shape, RankPolicy(candidates=cap, operators=("svd",)))
    ranks = sorted(c.rank[0] for c in svd[1:])
    # r (576 + 64) < 64 * 576 up to r = 57, since the spatial size stays
    assert len(ranks) == cap and ranks[-1] == 57
    gaps = [b - a for a, b in zip([0, *ranks], ranks, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_break_even_of_a_linear_layer_in_closed_form() -> None:
    shape = LayerShape(30, 20, bias=True, calls=((7,),))
    policy = RankPolicy(operators=("svd",))
    choices, costs = candidate_choices(shape, policy)
    # r (30 + 20) < 600: r = 12 gains nothing
    assert sorted(c.rank[0] for c in choices[1:]) == list(range(1, 12))
    assert costs[1] == Cost(7 * 11 * 50, 11 * 50 + 20, 4 * (11 * 50 + 20))


def test_break_even_needs_both_costs() -> None:
    # stride 4: the second layer works on few pixels, so MACs would allow more than parameters do
    shape = LayerShape(16, 32, (3, 3), (1, 4), (1, 1), (1, 1), calls=((1, 8, 8),))
    for name in ("svd", "spatial_svd"):
        largest = candidate_choices(shape, RankPolicy(operators=(name,)))[0][1]
        (family,) = families(shape, operators=(name,))
        following = OPERATORS[name].cost(shape, (largest.rank[0] + 1,))
        assert saves(family[largest], shape.cost()) and not saves(following, shape.cost())


def test_calls_do_not_change_the_order_and_operators_are_respected() -> None:
    shape = LayerShape(24, 24, calls=((5,),))
    once = candidate_choices(shape, RankPolicy())[0]
    assert candidate_choices(replace(shape, calls=((5,), (9,))), RankPolicy())[0] == once
    assert {c.operator for c in once} == {"dense", "svd", "group_svd"}
    only = candidate_choices(shape, RankPolicy(operators=("group_svd",)))[0]
    assert {c.operator for c in only} == {"dense", "group_svd"}


def test_bad_policies() -> None:
    for name in ("candidates", "multiple_of"):
        with pytest.raises(UsageError, match=f"`{name}` must be at least 1, got 0"):
            RankPolicy(**{name: 0})
    with pytest.raises(UnknownNameError, match="Did you mean 'macs'"):
        RankPolicy(cost="mac")
    with pytest.raises(UnknownNameError, match="Did you mean 'tucker2'"):
        RankPolicy(operators=("tucker",))
    with pytest.raises(UsageError, match="`operators` is empty; give some of svd, "):
        RankPolicy(operators=())


def test_steps_of_a_staircase_of_64() -> None:
    ranks = range(1, 310)
    kept = [ranks[i] for i in latency_pareto_ranks([math.ceil(r / 64) for r in ranks])]
    assert set(kept) == {309, 256, 192, 128, 64}


@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    heights=st.lists(st.floats(0.2, 3.0), min_size=8, max_size=8),
)
def test_the_upper_ends_of_random_steps_are_kept(widths: list[int], heights: list[float]) -> None:
    levels = list(accumulate(heights))
    seconds = [levels[i] for i, width in enumerate(widths) for _ in range(width)]
    ends = [total - 1 for total in accumulate(widths)]
    assert latency_pareto_ranks(seconds) == ends
    assert latency_pareto_ranks(seconds, 1e6) == [len(seconds) - 1]


@given(
    seconds=st.lists(st.floats(1.0, 9.0), min_size=1, max_size=20),
    tolerance=st.sampled_from([0.0, 0.03, 0.3]),
)
def test_no_kept_rank_is_as_slow_as_the_next(seconds: list[float], tolerance: float) -> None:
    kept = latency_pareto_ranks(seconds, tolerance)
    smooth = isotonic_regression(seconds)
    assert kept[-1] == len(seconds) - 1 and kept == sorted(set(kept))
    for below, above in pairwise(kept):
        assert smooth[above] > smooth[below] * (1 + tolerance)
    for i in set(range(len(seconds))) - set(kept):  # something larger is as fast
        larger = min(j for j in kept if j > i)
        assert smooth[larger] <= smooth[i] * (1 + tolerance) + 1e-12


def test_noise_alone_makes_no_step() -> None:
    assert latency_pareto_ranks([1.00, 1.02, 0.99, 1.01, 1.00], 0.03) == [4]
    assert latency_pareto_ranks([]) == []


def test_choices_once_latencies_are_known() -> None:
    shape = LayerShape(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), calls=((1, 8, 8),))
    plain = RankPolicy(operators=("svd", "group_svd"))
    choices, costs = candidate_choices(shape, plain)
    layer = Layer("conv", (), shape, choices, costs)
    seconds = [1.0] + [0.1 * math.ceil(c.rank[-1] / 8) * len(c.rank) for c in choices[1:]]
    assert hardware_choices(layer, seconds, plain) == choices
    stepped = hardware_choices(layer, seconds, replace(plain, latency_tolerance=0.0))
    for family in {(c.operator, c.rank[:-1]) for c in choices[1:]}:
        ranks = [c.rank[-1] for c in choices if (c.operator, c.rank[:-1]) == family]
        kept = [c.rank[-1] for c in stepped if (c.operator, c.rank[:-1]) == family]
        steps = {math.ceil(r / 8): r for r in sorted(ranks)}  # the largest of each
        assert sorted(kept) == sorted(steps.values())
    faster = hardware_choices(layer, seconds, replace(plain, require_speedup=True))
    assert set(faster) == {DENSE} | {c for c, s in zip(choices, seconds, strict=True) if s < 1.0}
    assert len(faster) < len(choices)


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(UsageError, match="latency_tolerance"):
        RankPolicy(latency_tolerance=-0.1)


@settings(deadline=None)
@given(shapes())
def test_break_even_is_the_last_rank_that_saves_and_full_the_dearest(shape: LayerShape) -> None:
    for family in families(shape):
        saving = [c for c, cost in family.items() if saves(cost, shape.cost())]
        for choice in family:
            break_even, full = rank_limits(shape, choice)
            assert break_even == (saving[-1].rank if saving else None)
            dearest = OPERATORS[choice.operator].cost(shape, full)
            assert all(cost.macs <= dearest.macs for cost in family.values())
            if choice.operator == "group_svd":
                assert full[0] == choice.rank[0]
            if choice.operator == "tucker2":
                assert full == (shape.outputs // shape.groups, shape.inputs // shape.groups)


def test_limits_of_a_rank_between_those_of_an_operator() -> None:
    """Tucker-2 offers twelve steps of each rank; multiples of 8 lie between them."""
    shape = LayerShape(100, 100, (3, 3), (1, 1), (1, 1), (1, 1), calls=((1, 8, 8),))
    break_even, full = rank_limits(shape, Choice("tucker2", (40, 56)))
    assert full == (100, 100)
    assert break_even is not None and break_even[1] == 58  # the nearest step
    assert saves(OPERATORS["tucker2"].cost(shape, break_even), shape.cost())
