"""Optuna's samplers: on the budget, functions of the history, and better than chance."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.allocation import Allocation
from rankNAS.exceptions import UsageError
from rankNAS.solver.pareto import hypervolume
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.bayesian.decode import decode, preference
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sampling.nsga2 import Nsga2
from rankNAS.strategies.sampling.random import Random
from rankNAS.strategies.sampling.samplers import WIDTH, _decoded, _recovered, _variables
from rankNAS.strategies.sampling.tpe import Tpe
from rankNAS.testing import StrategyContract, random_problem, random_trial


class TestTpe(StrategyContract):
    strategy = Tpe(startup=3)


class TestNsga2(StrategyContract):
    strategy = Nsga2(population=3)


BOTH = pytest.mark.parametrize("strategy", [Tpe(), Nsga2()], ids=lambda s: s.name)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def trial(problem: Problem, number: int, allocation: Allocation) -> Trial:
    return replace(random_trial(problem, number, allocation), budget_key=problem.budget_key)


def failed(trial: Trial) -> Trial:
    return replace(trial, state="failed", values=(), reason="on purpose")


def searched(strategy: Strategy, problem: Problem, trials: int) -> History:
    history = History()
    for number in range(trials):
        (allocation,) = strategy.propose(problem, history, 1, rng(number))
        history = History((*history.trials, trial(problem, number, allocation)))
    return history


problems = st.builds(
    random_problem,
    st.integers(0, 10**6),
    layers=st.integers(2, 6),
    choices=st.integers(4, 9),
    budgets=st.integers(1, 2),
    objectives=st.integers(1, 2),
)


@settings(max_examples=40, deadline=None)
@given(problem=problems, seed=st.integers(0, 100))
def test_variables_stand_for_allocations_within_every_budget(problem: Problem, seed: int) -> None:
    variables = _variables(problem)
    assert ("share" in variables) == (len(problem.objectives) == 2)
    values = {name: rng(seed).uniform(v.low, v.high) for name, v in variables.items()}
    row = _decoded(problem, values)
    if row is None:
        return
    assert problem.meets(row.tolist())
    recovered = _recovered(problem, problem.allocation(row.tolist()))
    assert recovered.keys() == variables.keys()
    assert all(variables[k]._contains(x) for k, x in recovered.items())


def test_recovered_variables_are_the_centred_preference() -> None:
    problem = replace(
        random_problem(0, layers=3, choices=2),
        errors=(np.array([0.0, 0.1]), np.array([0.0, 0.4]), np.array([0.0, 0.2])),
    )
    values = _recovered(problem, problem.allocation([1, 1, 1]))
    assert values == pytest.approx({"0": np.log(2), "1": -np.log(2), "2": 0})
    exact = _recovered(problem, problem.allocation([1, 1, 0]))
    # centred on the first two; the third wants an error below its smallest, 0.2
    assert exact == pytest.approx({"0": np.log(2), "1": -np.log(2), "2": np.log(0.2 / 0.1)})
    logarithms = np.log(preference(problem, np.array([[1, 1, 0]])))[0]
    assert np.diff(list(exact.values())) == pytest.approx(np.diff(logarithms))
    assert set(_recovered(problem, problem.allocation([0, 0, 0])).values()) == {0.0}
    far = replace(problem, errors=(np.array([0.0, 1e-6]), *problem.errors[1:]))
    assert _recovered(far, problem.allocation([1, 1, 1]))["0"] == WIDTH


def distance(problem: Problem, a: Allocation, b: Allocation) -> float:
    """Mean difference of the layers' recovered variables."""
    x, y = _recovered(problem, a), _recovered(problem, b)
    return float(np.mean([abs(x[k] - y[k]) for k in x if k != "share"]))


def generation(problem: Problem, count: int) -> list[Allocation]:
    """Distinct allocations on the budget."""
    multipliers = np.exp(rng(3).normal(0, 0.7, (4 * count, len(problem.errors))))
    rows = decode(problem, multipliers, rng(3))
    return list(dict.fromkeys(problem.allocation(row.tolist()) for row in rows))[:count]


def test_nsga2_children_resemble_the_best_parents() -> None:
    """Two generations are known; of these, half are good. Children are near the good ones."""
    problem = random_problem(7, layers=12, choices=32)
    allocations = generation(problem, 16)

    def distances(good: list[Allocation]) -> list[float]:
        trials = [
            Trial(i, a, "complete", (1.0 if a in good else 0.0,), budget_key=problem.budget_key)
            for i, a in enumerate(allocations)
        ]
        found = Nsga2(population=8).propose(problem, History(tuple(trials)), 12, rng(0))
        bad = [a for a in allocations if a not in good]
        return [
            float(np.mean([min(distance(problem, c, p) for p in parents) for c in found]))
            for parents in (good, bad)
        ]

    for good in (allocations[::2], allocations[1::2]):
        near, far = distances(good)
        assert near < 0.8 * far


def test_nsga2_draws_its_first_generation_at_random_and_counts_successes_alone() -> None:
    problem = random_problem(7, layers=6, choices=16)
    allocations = generation(problem, 8)
    trials = [trial(problem, i, a) for i, a in enumerate(allocations)]

    def proposed(successes: int) -> list[Allocation]:
        history = (*trials[:successes], *map(failed, trials[successes:]))
        return Nsga2(population=8).propose(problem, History(history), 4, rng(0))

    assert proposed(0) == proposed(1) == proposed(7) != proposed(8)


@BOTH
def test_trials_of_other_budgets_and_probes_teach_nothing(strategy: Strategy) -> None:
    problem = random_problem(7, layers=6, choices=16)
    trials = [trial(problem, i, a) for i, a in enumerate(generation(problem, 16))]

    def proposed(trials: list[Trial]) -> list[Allocation]:
        return strategy.propose(problem, History(tuple(trials)), 2, rng())

    nothing = proposed([failed(t) for t in trials])
    assert proposed(trials) != nothing
    assert proposed([replace(t, budget_key="macs<=0.9") for t in trials]) == nothing
    assert proposed([replace(t, probe=True) for t in trials]) == nothing


def test_tpe_moves_towards_what_was_good() -> None:
    """Only the error of the first layer counts: proposals give it more than chance does."""
    problem = random_problem(9, layers=6, choices=32)
    allocations = generation(problem, 40)

    def first(allocation: Allocation) -> float:
        return float(problem.errors[0][problem.indices(allocation)[0]])

    trials = tuple(
        Trial(i, a, "complete", (-first(a),), budget_key=problem.budget_key)
        for i, a in enumerate(allocations)
    )
    found = Tpe().propose(problem, History(trials), 10, rng())
    opposite = tuple(replace(t, values=(-t.values[0],)) for t in trials)
    reverse = Tpe().propose(problem, History(opposite), 10, rng())
    assert np.mean([first(a) for a in found]) < 0.7 * np.mean([first(a) for a in reverse])


@BOTH
def test_proposals_depend_on_the_seed_and_on_what_is_pending(strategy: Strategy) -> None:
    problem = random_problem(7, layers=6, choices=16)
    history = History(tuple(trial(problem, i, a) for i, a in enumerate(generation(problem, 16))))
    one, other = (strategy.propose(problem, history, 3, rng(seed)) for seed in (0, 1))
    assert one != other
    again = strategy.propose(problem, replace(history, pending=tuple(one)), 3, rng(0))
    assert len(again) == 3 and not set(again) & set(one)


@BOTH
def test_a_small_space_is_exhausted(strategy: Strategy) -> None:
    problem = random_problem(0, layers=1, choices=3)
    found = strategy.propose(problem, History(), 2, rng())
    (row,) = {tuple(problem.indices(a)) for a in found}  # one layer: only one is on the budget
    history = History((trial(problem, 0, problem.allocation(row)),))
    assert strategy.propose(problem, history, 2, rng()) == []


@BOTH
def test_nothing_is_logged_or_warned_and_the_log_level_is_kept(
    strategy: Strategy, caplog: pytest.LogCaptureFixture
) -> None:
    problem = random_problem(3, objectives=2)
    trials = tuple(trial(problem, i, a) for i, a in enumerate(generation(problem, 12)))
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    optuna.logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
            warnings.simplefilter("error")
            strategy.propose(problem, History(trials), 2, rng())
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.disable_propagation()
        optuna.logging.set_verbosity(before)
    assert not caplog.records


@pytest.mark.slow
@BOTH
def test_search_beats_chance(strategy: Strategy) -> None:
    problem = random_problem(9, layers=8, choices=16)
    found = max(t.values[0] for t in searched(strategy, problem, 60).trials)
    assert found > max(t.values[0] for t in searched(Random(), problem, 60).trials)


@pytest.mark.slow
@BOTH
def test_with_two_objectives_the_front_grows(strategy: Strategy) -> None:
    problem = random_problem(3, layers=6, choices=12, objectives=2)
    values = np.array([t.values for t in searched(strategy, problem, 60).trials]) * [1, -1]
    reference = values.min(0) - 0.1
    early, late = (hypervolume(values[:n], reference) for n in (16, 60))
    assert late > early
    assert np.ptp(values[:, 1]) > 0.1


@pytest.mark.slow
@BOTH
def test_a_proposal_takes_well_below_a_second(strategy: Strategy) -> None:
    problem = random_problem(1, layers=50, choices=32)
    history = History(tuple(trial(problem, i, a) for i, a in enumerate(generation(problem, 100))))
    start = time.process_time()
    strategy.propose(problem, history, 1, rng())
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("strategy", "given_"),
    [(Tpe, {"startup": 0}), (Tpe, {"attempts": 0}), (Nsga2, {"population": 1})],
)
def test_settings_are_checked(strategy: type[Strategy], given_: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least"):
        strategy(**given_)
