"""Exact allocation against brute force."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from rankNAS.exceptions import BudgetError, RankNASError
from rankNAS.solver import min_sum as solver
from rankNAS.solver.min_max import min_max
from rankNAS.solver.min_sum import min_sum
from rankNAS.solver.relaxation import relaxed
from rankNAS.solver.tables import SLACK, Solution, least_cost

Table = list[np.ndarray]


@dataclass
class Case:
    value: Table
    costs: list[Table]
    limits: list[float]

    def total(self, table: Table, indices: tuple[int, ...]) -> float:
        return float(sum(t[i] for t, i in zip(table, indices, strict=True)))

    def feasible(self) -> list[tuple[int, ...]]:
        return [
            indices
            for indices in itertools.product(*(range(len(v)) for v in self.value))
            if self.meets(indices)
        ]

    def meets(self, indices: tuple[int, ...]) -> bool:
        return all(
            self.total(cost, indices) <= limit * (1 + SLACK)
            for cost, limit in zip(self.costs, self.limits, strict=True)
        )

    def worst(self, indices: tuple[int, ...]) -> float:
        return max(float(v[i]) for v, i in zip(self.value, indices, strict=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    integral = draw(st.booleans())  # integers: many ties
    value = st.integers(0, 5).map(float) if integral else st.floats(0, 1)
    cost = st.integers(1, 9).map(float) if integral else st.floats(0.01, 1)

    def table(elements: st.SearchStrategy[float]) -> Table:
        return [np.array(draw(st.lists(elements, min_size=n, max_size=n))) for n in sizes]

    costs = [table(cost) for _ in range(draw(st.integers(1, 2)))]
    limits = [
        draw(st.floats(0.8, 1.1)) * sum(c.min() for c in table)
        + draw(st.floats(0, 1)) * sum(np.ptp(c) for c in table)
        for table in costs
    ]
    return Case(table(value), costs, [float(x) for x in limits])


def solve(kind: str, case: Case) -> Solution:
    if kind == "min_max":
        return min_max(case.value, case.costs, case.limits)
    return min_sum(case.value, case.costs, case.limits, gap=0)


def objective(kind: str, case: Case, indices: tuple[int, ...]) -> float:
    return case.worst(indices) if kind == "min_max" else case.total(case.value, indices)


@pytest.mark.parametrize("kind", ["min_max", "min_sum"])
@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_the_optimum_is_that_of_brute_force(kind: str, case: Case) -> None:
    feasible = case.feasible()
    if not feasible:
        with pytest.raises(BudgetError, match="no allocation meets the budgets"):
            solve(kind, case)
        return
    solution = solve(kind, case)
    best = min(objective(kind, case, indices) for indices in feasible)
    assert case.meets(solution.indices)
    assert solution.value == pytest.approx(objective(kind, case, solution.indices))
    assert solution.value == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert 0 <= solution.gap <= 1e-6


@settings(max_examples=150, deadline=None)
@given(case=cases(), gap=st.sampled_from([0.0, 0.05]))
@example(
    case=Case([np.array([0.0, 1.0, 5.7e-192])], [[np.array([1.0, 0.25, 0.5])]], [0.625]), gap=0.0
)
def test_a_core_of_one_choice_a_layer_is_widened_until_the_optimum_is_proven(
    case: Case, gap: float
) -> None:
    feasible = case.feasible()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "CORE", 1)
        if not feasible:
            with pytest.raises(BudgetError, match="no allocation meets the budgets"):
                min_sum(case.value, case.costs, case.limits, gap=gap)
            return
        solution = min_sum(case.value, case.costs, case.limits, gap=gap)
    best = min(case.total(case.value, indices) for indices in feasible)
    assert case.meets(solution.indices)
    assert solution.value == case.total(case.value, solution.indices)
    assert 0 <= solution.gap <= gap + 1e-6
    assert solution.value * (1 - solution.gap) <= best + 1e-9


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_no_allocation_is_below_its_bound(case: Case) -> None:
    """The bound of the relaxation, and what each choice adds to it."""
    kept = [
        solver._worthwhile(v, [cost[i] for cost in case.costs], np.inf)
        for i, v in enumerate(case.value)
    ]
    found = relaxed(case.value, case.costs, case.limits, kept)
    extra = [dict(zip(k.tolist(), e, strict=True)) for k, e in zip(kept, found.extra, strict=True)]
    for indices in case.feasible():
        if all(i in e for e, i in zip(extra, indices, strict=True)):
            added = sum(e[i] for e, i in zip(extra, indices, strict=True))
            assert case.total(case.value, indices) >= found.bound + added - 1e-9
    if found.rounded is not None:
        assert case.meets(found.rounded)
    elif len(case.limits) == 1:
        assert not case.feasible()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_one_budget_has_the_bound_of_the_linear_programme(seed: int) -> None:
    """The multiplier from the hulls is the dual of the linear programme."""
    rng = np.random.default_rng(seed)
    value = [np.sort(rng.random(5)) for _ in range(4)]
    cost = [np.sort(rng.random(5))[::-1].copy() for _ in value]
    limit = float(rng.uniform(sum(c.min() for c in cost), sum(c.max() for c in cost)))
    kept = [solver._worthwhile(v, [c], np.inf) for v, c in zip(value, cost, strict=True)]
    found = relaxed(value, [cost], [limit], kept)
    programme = linprog(
        np.concatenate(value),
        A_ub=[np.concatenate(cost)],
        b_ub=[limit],
        A_eq=np.kron(np.eye(4), np.ones(5)),
        b_eq=np.ones(4),
    )
    assert found.bound == pytest.approx(programme.fun, abs=1e-7)


def test_a_core_proves_the_optimum_of_a_large_table() -> None:
    """The same optimum as from a core of everything."""
    rng = np.random.default_rng(1)
    kept = [np.sort(rng.uniform(0.05, 1, 20))[::-1] for _ in range(30)]
    value = [(1 - k) ** rng.uniform(1, 4) for k in kept]
    costs = [[rng.uniform(1, 50) * k * rng.uniform(0.8, 1, 20) for k in kept] for _ in range(2)]
    limits = [0.4 * float(sum(c.max() for c in cost)) for cost in costs]
    found = []
    for core in (2, 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(solver, "CORE", core)
            found.append(min_sum(value, costs, limits, gap=0))
    assert found[0].value == pytest.approx(found[1].value, rel=1e-9)
    assert max(s.gap for s in found) <= 1e-8


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_min_max_prefers_the_least_total_among_the_best(case: Case) -> None:
    feasible = case.feasible()
    if not feasible:
        return
    solution = min_max(case.value, case.costs, case.limits)
    assert solution.value == min(map(case.worst, feasible))
    ties = [i for i in feasible if case.worst(i) == solution.value]
    least = min(case.total(case.value, i) for i in ties)
    total = case.total(case.value, solution.indices)
    assert total == pytest.approx(least, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["min_max", "min_sum"])
@settings(max_examples=40, deadline=None)
@given(case=cases(), factor=st.floats(0.5, 1))
def test_a_tighter_budget_never_improves_the_optimum(kind: str, case: Case, factor: float) -> None:
    tight = Case(case.value, case.costs, [limit * factor for limit in case.limits])
    if tight.feasible():
        assert solve(kind, tight).value >= solve(kind, case).value - 1e-6


@settings(max_examples=40, deadline=None)
@given(case=cases(), data=st.data())
def test_a_budget_that_one_allocation_meets_exactly_is_met(
    case: Case, data: st.DataObject
) -> None:
    indices = tuple(data.draw(st.integers(0, len(v) - 1)) for v in case.value)
    case.limits = [case.total(cost, indices) for cost in case.costs]
    for kind in ("min_max", "min_sum"):
        solution = solve(kind, case)
        assert case.meets(solution.indices)
        assert solution.value <= objective(kind, case, indices) + 1e-6


@pytest.mark.parametrize("kind", ["min_max", "min_sum"])
def test_a_hair_over_the_budget_is_over(kind: str) -> None:
    """The solver rounds at 1e-6; the cheaper allocation is within its rounding of the better."""
    value = [np.array([0.0, 1.0]), np.array([0.0, 1.0])]
    cost = [np.array([0.5 + 2e-7, 0.5]), np.array([0.5 + 2e-7, 0.5])]
    assert solve(kind, Case(value, [cost], [1.0])).indices == (1, 1)
    case = Case(value, [cost], [1.0 + 2e-7])
    assert sorted(solve("min_sum", case).indices) == [0, 1]


def test_the_largest_allowed_value() -> None:
    value, cost = [np.array([0.0, 1.0, 2.0])], [np.array([3.0, 2.0, 1.0])]
    assert min_sum(value, [cost], [2.5], largest=1.0).indices == (1,)
    with pytest.raises(BudgetError):
        min_sum(value, [cost], [1.5], largest=1.0)


def test_without_budgets_the_best_choice_of_each_layer_is_taken() -> None:
    value = [np.array([2.0, 1.0, 3.0]), np.array([0.5, 0.7])]
    assert min_sum(value, [], []) == Solution((1, 0), 1.5, 0.0)
    assert min_max(value, [], []) == Solution((1, 0), 1.0, 0.0)


def test_infeasible_budgets_are_named_with_the_least_costs() -> None:
    value = [np.array([0.0, 1.0])] * 2
    cost = [np.array([5.0, 2.0])] * 2
    assert least_cost(cost) == 4
    for method in (min_sum, min_max):
        with pytest.raises(BudgetError, match=r"least possible costs are 4 \(limit 3\)"):
            method(value, [cost], [3.0])


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_nothing_fits_where_the_rest_of_the_model_is_over_the_budget(limit: float) -> None:
    value, cost = [np.array([0.0, 1.0])], [np.array([2.0, 1.0])]
    for method in (min_sum, min_max):
        with pytest.raises(BudgetError):
            method(value, [cost], [limit])
    free = [np.array([1.0, 0.0])]
    assert min_sum(value, [free], [0.0]).indices == (1,)


def test_budgets_that_cannot_be_met_together() -> None:
    value = [np.array([0.0, 1.0])]
    costs = [[np.array([1.0, 2.0])], [np.array([2.0, 1.0])]]
    for method in (min_sum, min_max):
        assert method(value, costs[:1], [1.0]).indices == (0,)
        assert method(value, costs[1:], [1.0]).indices == (1,)
        with pytest.raises(BudgetError):
            method(value, costs, [1.0, 1.0])


def test_an_allowed_gap_is_reported_and_kept() -> None:
    rng = np.random.default_rng(0)
    value = [rng.uniform(size=20) for _ in range(30)]
    costs = [[rng.uniform(size=20) for _ in range(30)] for _ in range(2)]
    limits = [8.0, 9.0]
    exact = min_sum(value, costs, limits, gap=0)
    loose = min_sum(value, costs, limits, gap=0.2)
    assert exact.gap <= 1e-9
    assert 0 <= loose.gap <= 0.2
    assert exact.value <= loose.value + 1e-9
    assert loose.value * (1 - loose.gap) <= exact.value + 1e-9


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_the_gap_of_undecided_bounds_is_honest(case: Case) -> None:
    """Without integer programmes, multipliers and rounding alone decide each bound."""
    feasible = case.feasible()
    if not feasible:
        return
    best = min(map(case.worst, feasible))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankNAS.solver.min_max.EXACT", 0)
        try:
            solution = min_max(case.value, case.costs, case.limits)
        except BudgetError:  # not even the loosest bound was decided
            return
    assert case.meets(solution.indices)
    assert solution.value >= best >= solution.value - solution.gap * abs(solution.value) - 1e-12


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_limit_on_the_nodes_gives_an_honest_gap(case: Case) -> None:
    feasible = case.feasible()
    if not feasible:
        return
    try:
        solution = min_sum(case.value, case.costs, case.limits, gap=0, nodes=1)
    except RankNASError:
        return
    best = min(case.total(case.value, indices) for indices in feasible)
    assert case.meets(solution.indices)
    assert solution.value * (1 - solution.gap) <= best + 1e-9


def test_out_of_time_without_an_allocation_is_an_error() -> None:
    rng = np.random.default_rng(0)
    value = [rng.uniform(size=40) for _ in range(60)]
    costs = [[rng.uniform(size=40) for _ in range(60)] for _ in range(2)]
    try:
        solution = min_sum(value, costs, [12.0, 12.0], seconds=0.0)
    except RankNASError as error:
        assert "no allocation in 0 seconds" in str(error)  # noqa: PT017
    else:
        assert solution.gap > 0


def test_T_A5_the_worst_error_and_the_energy_pick_different_ranks() -> None:
    """Two layers of equal cost per rank, total rank 5 (Liebenwein et al., NeurIPS 2021)."""
    spectra = [np.array([1, 0.5, 0.25, 0.125]), np.array([1, 0.9, 0.8, 0.7])]
    ranks = np.arange(1, 5)
    cost = [ranks.astype(float)] * 2
    spectral = [np.append(s, 0)[ranks] / s[0] for s in spectra]
    energy = [np.array([(s[r:] ** 2).sum() / (s**2).sum() for r in ranks]) for s in spectra]
    nuclear = [np.array([s[r:].sum() / s.sum() for r in ranks]) for s in spectra]

    def picked(value: Table) -> tuple[tuple[int, ...], float]:
        solution = min_max(value, [cost], [5.0])
        return tuple(int(ranks[i]) for i in solution.indices), solution.value

    assert picked(spectral) == ((1, 4), 0.5)
    chosen, worst = picked(energy)
    assert chosen == (2, 3)
    assert worst == pytest.approx(0.7**2 / (1 + 0.9**2 + 0.8**2 + 0.7**2)) == pytest.approx(1 / 6)
    assert picked(nuclear)[0] == (2, 3)


@pytest.mark.slow
def test_a_large_space_is_solved_in_seconds() -> None:
    rng = np.random.default_rng(0)
    kept = [np.sort(rng.uniform(0.02, 1, 64))[::-1] for _ in range(100)]
    value = [(1 - k) ** rng.uniform(1, 4) for k in kept]
    size = rng.uniform(1, 100, (2, 100))
    costs = [
        [s * k * rng.uniform(0.9, 1, 64) for s, k in zip(row, kept, strict=True)] for row in size
    ]
    limits = [0.3 * float(sum(c.max() for c in cost)) for cost in costs]
    start = time.perf_counter()
    solution = min_max(value, costs, limits)
    assert time.perf_counter() - start < 5
    assert Case(value, costs, limits).meets(solution.indices)
    start = time.perf_counter()
    total = min_sum(value, costs, limits)
    assert time.perf_counter() - start < 5
    assert total.gap <= 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_cutting_planes_find_the_bound_of_the_linear_programme(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    value = [np.append(0, np.sort(rng.random(9))) for _ in range(40)]
    costs = [[np.sort(rng.random(10))[::-1].copy() for _ in value] for _ in range(3)]
    limits = [0.5 * sum(float(c[0]) for c in cost) for cost in costs]
    expected = min_sum(value, costs, limits)
    monkeypatch.setattr("rankNAS.solver.relaxation.LARGE", 0)
    found = min_sum(value, costs, limits)
    assert found.value == pytest.approx(expected.value, rel=2e-4)
    assert found.gap <= 1e-4 and expected.gap <= 1e-4
