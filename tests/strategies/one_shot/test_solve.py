"""The optimum of additive tables, against brute force."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.exceptions import BudgetError, UsageError
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.one_shot.solve import Solve
from rankNAS.strategies.problem import Problem
from rankNAS.testing import StrategyContract, random_problem

problems = st.builds(
    random_problem,
    st.integers(0, 10**6),
    layers=st.integers(1, 4),
    choices=st.integers(2, 5),
    budgets=st.integers(1, 2),
)
strategies = st.builds(
    Solve, rule=st.sampled_from(["sum", "max"]), power=st.sampled_from([0.5, 1.0, 2.0])
)


class TestSolve(StrategyContract):
    strategy = Solve()


class TestSolveMax(StrategyContract):
    strategy = Solve(rule="max")


def value(strategy: Solve, problem: Problem, indices: list[int]) -> float:
    pairs = zip(problem.errors, indices, strict=True)
    terms = [float(e[i]) ** strategy.power for e, i in pairs]
    return sum(terms) if strategy.rule == "sum" else max(terms)


@settings(max_examples=60, deadline=None)
@given(problem=problems, strategy=strategies)
def test_the_optimum_of_brute_force(problem: Problem, strategy: Solve) -> None:
    space = itertools.product(*(range(len(e)) for e in problem.errors))
    best = min(value(strategy, problem, i) for i in space if problem.meets(i))
    solution = strategy.solution(problem)
    assert problem.meets(solution.indices)
    assert strategy.solve(problem) == problem.allocation(solution.indices)
    assert solution.value == pytest.approx(value(strategy, problem, solution.indices))
    assert best <= solution.value * (1 + 1e-12)
    assert solution.value * (1 - solution.gap) <= best * (1 + 1e-9)
    assert solution.gap <= 1e-4


@settings(max_examples=40, deadline=None)
@given(problem=problems, strategy=strategies, share=st.floats(0, 1))
def test_tightening_a_budget_never_improves_the_optimum(
    problem: Problem, strategy: Solve, share: float
) -> None:
    cheapest = {n: [int(c.argmin()) for c in problem.costs[n]] for n in problem.budget}
    least = {n: problem.fractions(i)[n] for n, i in cheapest.items()}
    tight = {n: least[n] + share * (b - least[n]) for n, b in problem.budget.items()}
    wide, tight_problem = strategy.solution(problem), replace(problem, budget=tight)
    try:
        narrow = strategy.solution(tight_problem)
    except BudgetError:  # two budgets that cannot be met together
        return
    assert tight_problem.meets(narrow.indices)
    assert narrow.value >= wide.value * (1 - wide.gap) * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(problem=problems, power=st.floats(0.25, 4))
def test_a_power_does_not_change_the_worst_layer(problem: Problem, power: float) -> None:
    def worst(indices: list[int]) -> float:
        return value(Solve("max"), problem, indices)

    found = worst(Solve("max", power).solution(problem).indices)
    assert found == worst(problem.indices(Energy().solve(problem)))


def test_sum_and_max_differ_where_one_layer_can_pay_for_all() -> None:
    """T-A5: spectra of two layers, cost one a rank, total rank 5."""
    spectra = [np.array([1, 0.5, 0.25, 0.125]), np.array([1, 0.9, 0.8, 0.7])]
    tails = [np.array([np.sum(s[r:] ** 2) / np.sum(s**2) for r in (4, 3, 2, 1)]) for s in spectra]
    cost = np.array([4.0, 3.0, 2.0, 1.0])
    problem = replace(
        random_problem(0, layers=2, choices=4),
        errors=tuple(tails),
        costs={"macs": (cost, cost)},
        remainder_cost={"macs": 0.0},
        budget={"macs": 5 / 8},
    )

    def ranks(strategy: Solve) -> list[int]:
        return [4 - i for i in strategy.solution(problem).indices]

    assert ranks(Solve("max")) == [2, 3]
    candidates = [(a, b) for a in range(1, 5) for b in range(1, 5) if a + b <= 5]
    totals = {(a, b): tails[0][4 - a] + tails[1][4 - b] for a, b in candidates}
    assert tuple(ranks(Solve("sum"))) == min(totals, key=totals.__getitem__)


def test_without_budgets_everything_is_dense() -> None:
    problem = random_problem(0, budgets=0)
    assert Solve().solution(problem).indices == (0,) * 5
    assert Solve().solution(problem).gap == 0


def test_where_a_cost_is_an_objective_the_front_is_swept() -> None:
    problem = random_problem(3, layers=6, objectives=2)
    found = Solve().propose(problem, History(), 8, np.random.default_rng(0))
    macs = [problem.fractions(problem.indices(a))["macs"] for a in found]
    harm = [value(Solve(), problem, problem.indices(a)) for a in found]
    assert len(found) > 3
    assert macs == sorted(macs, reverse=True) and harm == sorted(harm)


def test_the_gap_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    problem = random_problem(1)
    with caplog.at_level(logging.INFO, "rankNAS.strategies.one_shot.solve"):
        Solve().solve(problem)
    assert f"sum of error**1 for {problem.budget_key}" in caplog.text
    assert "% of the optimum" in caplog.text


@pytest.mark.parametrize("given_", [{"rule": "mean"}, {"power": 0.0}, {"power": float("nan")}])
def test_settings_are_checked(given_: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="`rule` must be 'sum' or 'max' and `power` positive"):
        Solve(**given_)


def test_the_forms_minimise_losses_errors_and_their_mean() -> None:
    problem = random_problem(3, layers=4, choices=6)
    rng = np.random.default_rng(0)
    losses = tuple(t ** rng.uniform(0.5, 2) * rng.uniform(0.1, 9) for t in problem.errors)
    problem = replace(problem, losses=losses)
    tables = {
        "absolute": losses,
        "relative": problem.errors,
        "mean": [np.sqrt(a * b) for a, b in zip(losses, problem.errors, strict=True)],
    }
    space = itertools.product(*(range(len(e)) for e in problem.errors))
    feasible = [i for i in space if problem.meets(i)]
    for form, table in tables.items():
        best = min(sum(t[j] for t, j in zip(table, i, strict=True)) for i in feasible)
        assert Solve(form=form).solution(problem).value == pytest.approx(best, rel=1e-4)
    solutions = Solve().solutions(problem)
    assert set(solutions) == {Solve(form=form).solve(problem) for form in tables}
    rng = np.random.default_rng(1)
    assert Solve().propose(problem, History(), 9, rng) == solutions


def test_the_best_form_is_the_one_of_the_least_degradation() -> None:
    problem = random_problem(3, layers=4, choices=6)
    problem = replace(problem, losses=tuple(t**0.5 * 3 for t in problem.errors))
    solutions = Solve().solutions(problem)
    assert len(solutions) > 1
    trials = tuple(
        Trial(i, a, "complete", (0.9 - 0.1 * i,), {"kl_divergence": 1.0 - 0.1 * i})
        for i, a in enumerate(solutions)
    )
    assert Solve().select(problem, History(trials)) is trials[-1]
    own = replace(problem, objectives=("taste",))
    assert Solve(form="absolute").select(own, History(trials)) is trials[0]
    assert Solve(form="absolute").select(problem, History(trials)) is trials[-1]
