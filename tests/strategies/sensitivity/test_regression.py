"""The regression of degradations on losses: what it learns, and its optima."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.solver.min_sum import min_sum
from rankNAS.strategies.history import Trial
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sensitivity.regression import Regression
from rankNAS.testing import random_problem


def trials(problem: Problem, truth: object, count: int, seed: int = 0) -> list[Trial]:
    """Random allocations with the degradations that `truth` gives."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        row = [int(i) for i in rng.integers(1, [len(e) for e in problem.errors])]
        value = truth(row)  # type: ignore[operator]
        metrics = {"kl_divergence": float(value)}
        found.append(Trial(number, problem.allocation(row), "complete", (0.5,), metrics))
    return found


def fit(problem: Problem, found: list[Trial], **options: float) -> Regression:
    given = {"uncertainty": 0.3, "misfit": 0.01} | options
    return Regression.fit(problem, problem.errors, 0.0, found, **given)  # type: ignore[arg-type]


def before(problem: Problem, row: list[int]) -> np.ndarray:
    r = np.array([t[i] for t, i in zip(problem.errors, row, strict=True)])
    return np.array([r[:i].sum() / len(r) for i in range(len(r))])


def test_without_trials_losses_count_as_they_are() -> None:
    problem = random_problem(1, layers=4)
    prior = fit(problem, [])
    row = [1, 2, 0, 3]
    total = sum(t[i] for t, i in zip(problem.errors, row, strict=True))
    assert prior.predict(problem, [row])[0] == pytest.approx(total)
    exact = min_sum(problem.errors, problem.budgeted(), list(problem.limits.values()))
    value = prior.predict(problem, [prior.optimum(problem)])[0]
    assert value <= exact.value * (1 + 2e-3)


def test_multipliers_are_learned() -> None:
    problem = random_problem(2, layers=4, choices=12)
    truth = np.array([1.0, 0.6, 2.0, 1.2])

    def value(row: list[int]) -> float:
        return float(sum(m * t[i] for m, t, i in zip(truth, problem.errors, row, strict=True)))

    found = trials(problem, value, 30)
    learned = fit(problem, found, uncertainty=1.0)
    np.testing.assert_allclose(learned.mean[:-1], truth, rtol=0.1)
    fresh = trials(problem, value, 20, seed=9)
    rows = [problem.indices(t.allocation) for t in fresh]
    np.testing.assert_allclose(
        learned.predict(problem, rows), [t.metrics["kl_divergence"] for t in fresh], rtol=0.05
    )


def test_propagation_is_learned_and_moves_the_optimum() -> None:
    """Errors in front do more harm than errors behind; without the term both would be equal."""
    problem = random_problem(3, layers=5, choices=12)

    def value(row: list[int]) -> float:
        h = np.array([t[i] for t, i in zip(problem.errors, row, strict=True)])
        return float(h.sum() + 4 * h @ before(problem, row))

    learned = fit(problem, trials(problem, value, 40), misfit=0.005)
    assert learned.mean[-1] / learned.mean[:-1].mean() > 1.5
    fresh = trials(problem, value, 20, seed=5)
    rows = [problem.indices(t.allocation) for t in fresh]
    errors = learned.predict(problem, rows) - [t.metrics["kl_divergence"] for t in fresh]
    additive = fit(problem, [])
    ratio = np.median(
        [t.metrics["kl_divergence"] for t in fresh] / additive.predict(problem, rows)
    )
    plain = ratio * additive.predict(problem, rows) - [t.metrics["kl_divergence"] for t in fresh]
    assert np.abs(errors).mean() < 0.5 * np.abs(plain).mean()
    assert value(list(learned.optimum(problem))) <= value(list(additive.optimum(problem))) + 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), b=st.floats(0, 5))
def test_optima_meet_the_budgets_and_beat_the_additive_one(seed: int, b: float) -> None:
    problem = random_problem(seed, layers=4)
    prior = fit(problem, [])
    bent = replace(prior, mean=np.append(np.ones(4), b))
    found = bent.optimum(problem)
    assert problem.meets(found)
    straight = prior.optimum(problem)
    at = bent.predict(problem, [found, straight])
    assert at[0] <= at[1] * (1 + 1e-9)


def test_samples_are_positive_and_spread_around_the_mean() -> None:
    problem = random_problem(4, layers=3)
    prior = fit(problem, [])
    rng = np.random.default_rng(0)
    drawn = np.array([prior.sample(rng).mean for _ in range(2000)])
    assert (drawn >= 0).all() and (drawn[:, :-1] > 0).all()
    np.testing.assert_allclose(np.log(drawn[:, :-1]).std(0), 0.3, rtol=0.1)
    np.testing.assert_allclose(np.median(drawn[:, :-1], axis=0), 1, rtol=0.05)


def test_degradations_of_another_size_count_less() -> None:
    problem = random_problem(7, layers=3, choices=10)
    near = [list(map(int, row)) for row in ([9, 9, 9], [8, 9, 8], [9, 8, 9])]
    small = replace(problem, budget={"macs": problem.least("macs") * 1.01})

    def trial(number: int, row: list[int], factor: float) -> Trial:
        total = sum(t[i] for t, i in zip(problem.errors, row, strict=True))
        metrics = {"kl_divergence": factor * float(total)}
        return Trial(number, problem.allocation(row), "complete", (0.5,), metrics)

    far = [trial(i, [1, 0, 0], 1.0) for i in range(5)]
    close = [trial(9 + i, row, 3.0) for i, row in enumerate(near)]
    found = fit(small, [*far, *close], misfit=0.05)
    optimum = list(found.optimum(small))
    total = sum(t[i] for t, i in zip(problem.errors, optimum, strict=True))
    assert found.predict(small, [optimum])[0] == pytest.approx(3 * total, rel=0.25)
