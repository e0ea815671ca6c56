"""From preferences to allocations, against the exact solver and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.exceptions import BudgetError
from rankNAS.solver.min_max import min_max
from rankNAS.solver.tables import SLACK
from rankNAS.strategies.bayesian import decode as decode_module
from rankNAS.strategies.bayesian.decode import (
    additive_preference,
    decode,
    decode_best,
    lowered,
    lowered_by,
    preference,
)
from rankNAS.strategies.problem import Problem
from rankNAS.testing import random_problem

problems = st.builds(
    random_problem,
    st.integers(0, 10**6),
    layers=st.integers(1, 6),
    choices=st.integers(2, 9),
    budgets=st.just(1),
)
constrained = st.builds(
    random_problem,
    st.integers(0, 10**6),
    layers=st.integers(1, 6),
    choices=st.integers(2, 9),
    budgets=st.sampled_from([1, 2]),
)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def worst(problem: Problem, multipliers: np.ndarray, indices: np.ndarray) -> float:
    pairs = zip(multipliers, problem.errors, indices, strict=True)
    return max(float(w * e[i]) for w, e, i in pairs)


@settings(max_examples=80, deadline=None)
@given(problems)
def test_equal_multipliers_give_the_min_max_optimum(problem: Problem) -> None:
    (row,) = decode(problem, np.ones((1, len(problem.errors))), rng())
    optimum = min_max(problem.errors, problem.budgeted(), list(problem.limits.values()))
    assert worst(problem, np.ones(len(row)), row) == optimum.value


@settings(max_examples=30, deadline=None)
@given(
    problem=st.builds(
        random_problem, st.integers(0, 10**6), layers=st.just(3), choices=st.integers(2, 6)
    ),
    seed=st.integers(0, 100),
)
def test_any_multipliers_give_their_optimum(problem: Problem, seed: int) -> None:
    multipliers = np.exp(np.random.default_rng(seed).normal(0, 1, (4, 3)))
    rows = decode(problem, multipliers, rng())
    assert len(rows) == 4
    space = list(itertools.product(*(range(len(e)) for e in problem.errors)))
    feasible = [indices for indices in space if problem.meets(indices)]
    for w, row in zip(multipliers, rows, strict=True):
        best = min(worst(problem, w, indices) for indices in feasible)
        assert worst(problem, w, row) == pytest.approx(best, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(problem=constrained, seed=st.integers(0, 100), count=st.integers(1, 20))
def test_every_row_meets_every_budget(problem: Problem, seed: int, count: int) -> None:
    size = count, len(problem.errors)
    rows = decode(problem, np.exp(np.random.default_rng(seed).normal(0, 1, size)), rng())
    assert 1 <= len(rows) <= count
    for row in rows:
        assert problem.meets(row.tolist())
        for table, limit in zip(problem.budgeted(), problem.limits.values(), strict=True):
            total = sum(c[i] for c, i in zip(table, row, strict=True))
            assert total <= limit * (1 + 2 * SLACK)


@settings(max_examples=60, deadline=None)
@given(problem=problems, seed=st.integers(0, 100))
def test_what_is_left_is_spent(problem: Problem, seed: int) -> None:
    """No layer could take a more accurate choice without breaking the budget."""
    multipliers = np.exp(np.random.default_rng(seed).normal(0, 1, (3, len(problem.errors))))
    for row in decode(problem, multipliers, rng()):
        for layer, errors in enumerate(problem.errors):
            for better in np.flatnonzero(errors < errors[row[layer]]):
                changed = row.copy()
                changed[layer] = better
                assert not problem.meets(changed.tolist())


@settings(max_examples=80, deadline=None)
@given(problem=problems, data=st.data())
def test_a_preference_decodes_to_something_at_least_as_good(
    problem: Problem, data: st.DataObject
) -> None:
    indices = [data.draw(st.integers(0, len(e) - 1)) for e in problem.errors]
    fraction = problem.fractions(indices)["macs"]
    problem = replace(problem, budget={"macs": fraction})
    multipliers = preference(problem, np.array([indices]))
    (row,) = decode(problem, multipliers, rng())
    given_, decoded = (worst(problem, multipliers[0], np.array(i)) for i in (indices, row))
    assert given_ <= 1 + 1e-12
    assert decoded <= given_ * (1 + 1e-9)


def test_a_preference_weighs_each_layer_by_one_over_its_error() -> None:
    problem = replace(
        random_problem(0, layers=2, choices=2), errors=(np.array([0.0, 0.2]), np.array([0.0, 0.5]))
    )
    assert preference(problem, np.array([[1, 1]])).tolist() == [[5.0, 2.0]]
    # an exact layer wants an error below the smallest that is not zero
    assert preference(problem, np.array([[0, 1]])).tolist() == [[10.0, 2.0]]


def test_without_budgets_everything_is_dense() -> None:
    problem = random_problem(0, budgets=0)
    assert decode(problem, np.ones((3, 5)), rng()).tolist() == [[0] * 5] * 3


def test_two_budgets_are_explored_from_several_sides() -> None:
    problem = random_problem(5, layers=8, budgets=2)
    multipliers = np.exp(np.random.default_rng(0).normal(0, 0.5, (140, 8)))
    rows = decode(problem, multipliers, rng())
    assert len(np.unique(rows, axis=0)) > 20
    used = np.array([list(problem.fractions(row.tolist()).values()) for row in rows])
    near = used / np.array(list(problem.budget.values())) > 0.97
    assert near.any(0).all()  # each budget is nearly used up by some allocation


def test_what_no_weighting_finds_is_solved_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """One preference sees the first budget alone, in which the only allocation is dominated."""
    problem = replace(
        random_problem(0, layers=1, choices=3),
        errors=(np.array([0.0, 0.1, 0.2]),),
        costs={"macs": (np.array([4.0, 1, 2]),), "params": (np.array([4.0, 3, 1]),)},
        remainder_cost={"macs": 0.0, "params": 0.0},
        budget={"macs": 2 / 4, "params": 1 / 4},
    )
    assert decode(problem, np.ones((1, 1)), rng()).tolist() == [[2]]
    assert {2} == {int(row[0]) for row in decode(problem, np.ones((14, 1)), rng())}
    solved = []
    exact = decode_module._exact
    monkeypatch.setattr(decode_module, "_exact", lambda *a: solved.append(a) or exact(*a))
    decode(problem, np.ones((1, 1)), rng())
    assert len(solved) == 1


def test_equal_generators_give_equal_rows() -> None:
    problem = random_problem(5, layers=8, budgets=2)
    multipliers = np.exp(np.random.default_rng(0).normal(0, 0.5, (50, 8)))
    assert (decode(problem, multipliers, rng()) == decode(problem, multipliers, rng())).all()


# ------------------------------------------------------------------------- single allocations


@settings(max_examples=60, deadline=None)
@given(problem=constrained, seed=st.integers(0, 100))
def test_the_best_row_is_no_worse_than_any_weighting(problem: Problem, seed: int) -> None:
    multipliers = np.exp(np.random.default_rng(seed).normal(0, 1, len(problem.errors)))
    best = decode_best(problem, multipliers)
    assert best is not None and problem.meets(best.tolist())
    again = decode_best(problem, multipliers.copy())
    assert again is not None and again.tolist() == best.tolist()
    for row in decode(problem, np.tile(multipliers, (7, 1)), rng()):
        assert worst(problem, multipliers, best) <= worst(problem, multipliers, row) * (1 + 1e-9)


def test_with_one_budget_the_best_row_is_the_row() -> None:
    problem = random_problem(5, layers=8)
    multipliers = np.exp(np.random.default_rng(0).normal(0, 0.5, 8))
    best = decode_best(problem, multipliers)
    assert best is not None
    assert best.tolist() == decode(problem, multipliers[None], rng())[0].tolist()


@pytest.mark.parametrize("budget", [{"macs": 1e-6}, {"macs": 1e-6, "params": 1e-6}])
def test_there_is_no_best_row_where_nothing_fits(budget: dict[str, float]) -> None:
    problem = replace(random_problem(5), budget=budget)
    assert decode_best(problem, np.ones(5)) is None
    with pytest.raises(BudgetError):
        problem.check()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), budgets=st.integers(0, 2), share=st.floats(0, 1))
def test_a_budget_is_lowered_from_what_it_is_to_the_least(
    seed: int, budgets: int, share: float
) -> None:
    problem = random_problem(seed, budgets=budgets, objectives=2)
    cheapest = np.array([int(c.argmin()) for c in problem.costs["macs"]])
    least = problem.fractions(cheapest.tolist())["macs"]
    bound = problem.budget.get("macs", 1.0)
    assert lowered(problem, 1).budget == {**problem.budget, "macs": pytest.approx(bound)}
    assert lowered(problem, 0).budget["macs"] == pytest.approx(least)
    assert lowered_by(problem, cheapest) == pytest.approx(0 if bound > least else 1)
    swept = lowered(problem, share)
    assert least * (1 - 1e-12) <= swept.budget["macs"] <= bound * (1 + 1e-12)
    assert swept.budget.get("params") == problem.budget.get("params")
    row = decode_best(swept, np.ones(len(problem.errors)))
    if row is not None:
        assert problem.meets(row.tolist())
        # the share of an allocation leaves its own cost, no more
        kept = problem.fractions(row.tolist())["macs"]
        assert lowered(problem, lowered_by(problem, row)).budget["macs"] == pytest.approx(kept)


def total(problem: Problem, multipliers: np.ndarray, indices: np.ndarray) -> float:
    pairs = zip(multipliers, problem.errors, indices, strict=True)
    return sum(float(w * e[i]) for w, e, i in pairs)


@settings(max_examples=60, deadline=None)
@given(
    problem=st.builds(
        random_problem, st.integers(0, 10**6), layers=st.just(4), choices=st.integers(2, 6)
    ),
    seed=st.integers(0, 100),
)
def test_an_additive_decoding_is_optimal_at_the_cost_that_it_spends_before_upgrades(
    problem: Problem, seed: int
) -> None:
    """Of all allocations, none has a smaller sum + lambda x cost for its own lambda; the budget
    holds, and the sum is at most that of the exact optimum plus the harm of one step."""
    multipliers = np.random.default_rng(seed).uniform(0.2, 5, 4)
    (row,) = decode(problem, multipliers[np.newaxis], rng(), additive=True)
    assert problem.meets(row.tolist())
    everything = itertools.product(*(range(len(e)) for e in problem.errors))
    best = min(total(problem, multipliers, r) for r in everything if problem.meets(r))
    steps = [float(w * np.ptp(e)) for w, e in zip(multipliers, problem.errors, strict=True)]
    assert best - 1e-12 <= total(problem, multipliers, row) <= best + max(steps) + 1e-12


def test_an_additive_decoding_of_fine_choices_is_the_exact_optimum() -> None:
    """Errors 1/c - 1 of costs c: the optimum gives layers costs in proportion to root w."""
    kept = np.linspace(1, 0.01, 400)
    problem = random_problem(0, layers=3, choices=400)
    weights = np.array([[1.0, 4.0, 9.0]])
    problem = replace(
        problem,
        errors=tuple(1 / kept - 1 for _ in range(3)),
        costs={"macs": tuple(kept for _ in range(3))},
        remainder_cost={"macs": 0.0},
        budget={"macs": 0.5},
    )
    (row,) = decode(problem, weights, rng(), additive=True)
    assert kept[row] == pytest.approx(1.5 * np.sqrt(weights[0]) / 6, abs=0.005)
    again = decode(problem, additive_preference(problem, row[np.newaxis]), rng(), additive=True)
    assert np.abs(again[0] - row).max() <= 2


def test_an_additive_decoding_keeps_several_budgets() -> None:
    problem = random_problem(2, layers=5, choices=8, budgets=2)
    rows = decode(problem, np.exp(rng().normal(0, 1, (64, 5))), rng(), additive=True)
    assert len(rows) and all(problem.meets(row.tolist()) for row in rows)
