"""Every strategy keeps the contract; what each promises beyond it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.allocation import DENSE, Choice
from rankNAS.exceptions import BudgetError, UnknownNameError, UsageError
from rankNAS.solver.pareto import non_dominated
from rankNAS.strategies import (
    STRATEGIES,
    BayesianOptimisation,
    Energy,
    History,
    Problem,
    Random,
    Solve,
    Strategy,
    Uniform,
    make_strategy,
)
from rankNAS.strategies.sampling.shares import within_shares
from rankNAS.testing import StrategyContract, random_problem, random_trial


class TestUniform(StrategyContract):
    strategy = Uniform()


class TestEnergy(StrategyContract):
    strategy = Energy()


class TestRandom(StrategyContract):
    strategy = Random()


class TestBayesianOptimisation(StrategyContract):
    strategy = BayesianOptimisation(initial=3, pool=64)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


BOUND = {"haloc"}  # work on a model, not on tables alone: tested in their own files
ON_TABLES = [name for name in STRATEGIES if name not in BOUND]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_a_file_with_the_contract(name: str) -> None:
    strategy = STRATEGIES[name]()
    assert strategy.name == name
    assert make_strategy(name) == strategy
    files = Path(__file__).parent.rglob("test_*.py")
    assert any(f"strategy = {type(strategy).__name__}(" in file.read_text() for file in files)


problems = st.builds(
    random_problem,
    st.integers(0, 10**6),
    layers=st.integers(1, 6),
    choices=st.integers(2, 8),
    budgets=st.integers(0, 2),
    objectives=st.integers(1, 2),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TABLES)
@settings(max_examples=12, deadline=None)
@given(problem=problems, n=st.integers(1, 4), seed=st.integers(0, 100))
def test_first_proposals_meet_every_budget(name: str, problem: Problem, n: int, seed: int) -> None:
    strategy = make_strategy(name)
    proposals = strategy.propose(problem, History(), n, rng(seed))
    assert 1 <= len(proposals) <= n
    assert len(set(proposals)) == len(proposals)
    for allocation in proposals:
        assert list(allocation) == list(problem.choices)
        assert problem.meets(problem.indices(allocation))
    more = strategy.propose(problem, History((), tuple(proposals)), n, rng(seed))
    assert not set(more) & set(proposals)


SCRIPT = """
import json, sys
import numpy as np
from rankNAS.strategies import STRATEGIES, History
from rankNAS.testing import random_problem, random_trial

def proposals():
    found = {}
    problem = random_problem(11, layers=6, budgets=2)
    first = STRATEGIES["random"]().propose(problem, History(), 7, np.random.default_rng(1))
    history = History(tuple(random_trial(problem, i, a) for i, a in enumerate(first)))
    for name, strategy in STRATEGIES.items():
        if name == "haloc":  # works on a model
            continue
        got = strategy().propose(problem, history, 2, np.random.default_rng(2))
        found[name] = [a.to_json() for a in got]
    return found
"""


@pytest.mark.slow
def test_another_process_with_another_hash_seed_proposes_the_same() -> None:
    program = SCRIPT + "json.dump(proposals(), sys.stdout)"
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    scope: dict[str, object] = {}
    exec(SCRIPT, scope)
    here = scope["proposals"]()
    assert json.loads(done.stdout) == here
    assert all(here.values())


# --------------------------------------------------------------------------------- the problem


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 6),
    choices=st.integers(2, 8),
    share=st.floats(0.01, 0.999),
    name=st.sampled_from(ON_TABLES),
)
def test_an_infeasible_budget_names_the_smallest_which_is_feasible(
    seed: int, layers: int, choices: int, share: float, name: str
) -> None:
    problem = random_problem(seed, layers=layers, choices=choices)
    cheapest = [int(c.argmin()) for c in problem.costs["macs"]]
    least = problem.fractions(cheapest)["macs"]
    problem = replace(problem, budget={"macs": least * share})
    with pytest.raises(BudgetError, match="smallest possible is") as caught:
        problem.check()
    named = float(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    assert least <= named <= least + 1.1e-4
    feasible = replace(problem, budget={"macs": named})
    feasible.check()
    (allocation,) = make_strategy(name).propose(feasible, History(), 1, rng())
    assert feasible.meets(feasible.indices(allocation))


def test_budgets_that_cannot_be_met_together() -> None:
    a, b = np.array([4.0, 2.0, 1.0]), np.array([4.0, 1.0, 2.0])
    problem = replace(
        random_problem(0, layers=1, choices=3),
        costs={"macs": (a,), "params": (b,)},
        remainder_cost={"macs": 0.0, "params": 0.0},
        budget={"macs": 0.25},
    )
    problem.check()
    replace(problem, budget={"params": 0.25}).check()
    replace(problem, budget={"macs": 0.5, "params": 0.25}).check()
    with pytest.raises(BudgetError, match="together"):
        replace(problem, budget={"macs": 0.25, "params": 0.25}).check()


@given(problem=problems, data=st.data())
def test_indices_and_allocations_are_inverse(problem: Problem, data: st.DataObject) -> None:
    indices = [data.draw(st.integers(0, len(e) - 1)) for e in problem.errors]
    allocation = problem.allocation(indices)
    assert problem.indices(allocation) == indices
    assert problem.fractions([0] * len(indices)) == pytest.approx(dict.fromkeys(problem.costs, 1))


def test_a_cost_outside_the_layers_counts() -> None:
    problem = replace(
        random_problem(0, layers=1, choices=2),
        costs={"macs": (np.array([80.0, 30.0]),)},
        remainder_cost={"macs": 20.0},
        budget={"macs": 0.5},
    )
    assert problem.dense == {"macs": 100.0}
    assert problem.limits == {"macs": 30.0}
    assert problem.fractions([1]) == {"macs": 0.5}
    assert problem.meets([1])
    assert not problem.meets([0])


def test_names_of_strategies() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'random'"):
        make_strategy("randon")
    with pytest.raises(UsageError, match="got int"):
        make_strategy(3)
    strategy = Random(attempts=3)
    assert make_strategy(strategy) is strategy


# ------------------------------------------------------------------------------------ one shot


@pytest.mark.parametrize("strategy", [Uniform(), Energy()], ids=lambda s: s.name)
def test_one_shot_strategies_propose_once(strategy: Strategy) -> None:
    problem = random_problem(4)
    (allocation,) = strategy.propose(problem, History(), 5, rng())
    evaluated = History((random_trial(problem, 0, allocation),))
    assert strategy.propose(problem, evaluated, 5, rng()) == []
    assert strategy.propose(problem, History((), (allocation,)), 5, rng()) == []


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    choices=st.integers(2, 5),
    budgets=st.integers(1, 2),
)
def test_energy_is_the_best_of_all_allocations(
    seed: int, layers: int, choices: int, budgets: int
) -> None:
    problem = random_problem(seed, layers=layers, choices=choices, budgets=budgets)
    space = itertools.product(range(choices), repeat=layers)

    def errors(indices: list[int]) -> list[float]:
        return [float(e[i]) for e, i in zip(problem.errors, indices, strict=True)]

    feasible = [i for i in space if problem.meets(i)]
    (allocation,) = Energy().propose(problem, History(), 1, rng())
    found = errors(problem.indices(allocation))
    best = min(max(errors(i)) for i in feasible)
    assert max(found) == best
    least = min(sum(errors(i)) for i in feasible if max(errors(i)) == best)
    assert sum(found) == pytest.approx(least, rel=2e-4)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 6),
    budget=st.floats(0.1, 1),
)
def test_uniform_keeps_the_same_fraction_of_every_layer(
    seed: int, layers: int, budget: float
) -> None:
    generator = rng(seed)
    kept = np.array([1.0, *np.linspace(0.9, 0.1, 9)])
    sizes = generator.uniform(1, 100, layers)
    names = [f"layer{i}" for i in range(layers)]
    problem = Problem(
        dict.fromkeys(names, (DENSE, *(Choice("svd", (r,)) for r in range(9, 0, -1)))),
        tuple((1 - kept) ** generator.uniform(1, 3) for _ in names),
        {"macs": tuple(size * kept for size in sizes)},
        {"macs": 0.0},
        {"macs": budget},
        objectives=("accuracy",),
        directions=("maximize",),
    )
    (allocation,) = Uniform().propose(problem, History(), 1, rng())
    common = kept[kept <= budget * (1 + 1e-9)].max()
    assert kept[problem.indices(allocation)].tolist() == [common] * layers


@settings(max_examples=50, deadline=None)
@given(problem=problems, seed=st.integers(0, 100))
def test_a_layer_within_its_share_takes_the_most_accurate_choice(
    problem: Problem, seed: int
) -> None:
    """A choice that is more accurate at the same or a smaller share would have been taken."""
    shares = rng(seed).uniform(0.05, 1, len(problem.errors))
    indices = within_shares(problem, shares)
    assert problem.meets(indices.tolist())
    if len(problem.budget) == 1:
        for errors, cost, i in zip(problem.errors, *problem.budgeted(), indices, strict=True):
            assert not ((cost <= cost[i]) & (errors < errors[i])).any() or cost[i] == cost.min()


# -------------------------------------------------------------------------------------- random


def test_random_gives_as_many_as_asked_and_spreads() -> None:
    problem = random_problem(6, layers=8, choices=16)
    proposals = Random().propose(problem, History(), 30, rng())
    assert len(set(proposals)) == 30
    rows = np.array([problem.indices(a) for a in proposals])
    assert all(np.unique(rows[:, i]).size > 5 for i in range(8))
    used = [problem.fractions(row)["macs"] for row in rows]
    assert np.median(used) > 0.9 * problem.budget["macs"]


def test_random_stops_when_the_space_is_exhausted() -> None:
    problem = random_problem(0, layers=1, choices=2)
    proposals = Random().propose(problem, History(), 10, rng())
    assert 1 <= len(proposals) <= 2
    seen = History((), tuple(problem.allocation([i]) for i in range(2)))
    assert Random().propose(problem, seen, 10, rng()) == []


# ---------------------------------------------------------------------------------------- bo


def searched(strategy: Strategy, problem: Problem, trials: int, batch: int = 1) -> History:
    history = History()
    while len(history.trials) < trials:
        number = len(history.trials)
        n = min(batch, trials - number)
        proposals = strategy.propose(problem, history, n, rng(number))
        assert len(set(proposals)) == n
        done = (random_trial(problem, number + i, a) for i, a in enumerate(proposals))
        history = History((*history.trials, *done))
    return history


def test_bo_starts_at_the_least_sum_of_losses_and_the_min_max_allocation() -> None:
    problem = random_problem(8)
    problem = replace(problem, losses=tuple(e**2 * (1 + i) for i, e in enumerate(problem.errors)))
    solved, *_, first = BayesianOptimisation().propose(problem, History(), 4, rng())
    assert solved == Solve(form="absolute").solve(problem)
    (energy,) = Energy().propose(problem, History(), 1, rng())

    def worst(allocation: dict[str, Choice]) -> float:
        pairs = zip(problem.errors, problem.indices(allocation), strict=True)
        return max(float(e[i]) for e, i in pairs)

    assert worst(first) == worst(energy)


@pytest.mark.slow
def test_bo_beats_its_start_and_random_search() -> None:
    problem = random_problem(9, layers=8, choices=16)
    found = searched(BayesianOptimisation(), problem, 20, batch=2)
    values = [t.values[0] for t in found.trials]
    random = [t.values[0] for t in searched(Random(), problem, 20).trials]
    assert max(values) > values[0]
    assert max(values) > max(random)


@pytest.mark.slow
def test_bo_with_two_objectives_finds_a_front() -> None:
    problem = random_problem(3, layers=6, choices=12, objectives=2)
    found = searched(BayesianOptimisation(), problem, 12, batch=3)
    values = np.array([t.values for t in found.trials]) * [1, -1]
    assert non_dominated(values).sum() >= 4
    assert np.ptp(values[:, 1]) > 0.1


@pytest.mark.parametrize(
    "settings_", [{"initial": 0}, {"pool": 1}, {"spread": 0.0}, {"local": 1.5}]
)
def test_bo_settings_are_checked(settings_: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="`initial` must be at least 1"):
        BayesianOptimisation(**settings_)


def test_bo_has_nothing_left_in_an_exhausted_space() -> None:
    problem = random_problem(0, layers=1, choices=3)
    trials = tuple(random_trial(problem, i, problem.allocation([i])) for i in range(3))
    assert BayesianOptimisation(initial=2).propose(problem, History(trials), 2, rng()) == []
