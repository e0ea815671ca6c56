"""DRONE: what it measures, and that it levels what it has measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankNAS
from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.exceptions import UsageError
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sensitivity.drone import TIE, Drone
from rankNAS.strategies.sensitivity.front_to_back import Walks, shares
from rankNAS.testing import StrategyContract, random_problem, random_trial

seeds = st.integers(0, 10**6)


class TestDrone(StrategyContract):
    strategy = Drone()


class TestDroneOfEverything(StrategyContract):
    strategy = Drone(levels=1, operators=None)


class TestDroneOfLayersAlone(StrategyContract):
    strategy = Drone(front_to_back=False)


ALONE = Drone(front_to_back=False)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def probed(strategy: Drone, problem: Problem) -> History:
    """The measurements that the strategy asks for; harm is linear in each layer's error."""
    asked = strategy.probes(problem, History())
    return History(
        tuple(replace(random_trial(problem, i, a), probe=True) for i, a in enumerate(asked))
    )


def changed(allocation: Allocation) -> list[str]:
    return [name for name, choice in allocation.items() if choice != DENSE]


@settings(max_examples=40, deadline=None)
@given(seed=seeds, layers=st.integers(1, 5), choices=st.integers(2, 9), levels=st.integers(1, 5))
def test_probes_change_one_layer_at_a_time(
    seed: int, layers: int, choices: int, levels: int
) -> None:
    problem = random_problem(seed, layers=layers, choices=choices)
    strategy = Drone(levels=levels, front_to_back=False)
    probes = strategy.probes(problem, History())
    assert len(set(probes)) == len(probes) <= 1 + layers * levels
    assert changed(probes[0]) == []
    kept = problem.within(("svd",))
    for i, (name, errors) in enumerate(zip(problem.choices, kept.errors, strict=True)):
        own = [a for a in probes if changed(a) == [name]]
        measured = {float(problem.errors[i][problem.indices(a)[i]]) for a in own}
        assert 1 <= len(own) <= levels
        assert max(measured) == errors.max()
    assert all(len(changed(a)) == 1 for a in probes[1:])
    rows = [kept.indices(a) for a in probes]
    assert rows == sorted(rows)
    assert strategy.probes(problem, probed(strategy, problem)) == probes


@settings(max_examples=30, deadline=None)
@given(
    seed=seeds,
    layers=st.integers(2, 4),
    choices=st.integers(2, 5),
    levels=st.integers(1, 4),
    budgets=st.integers(1, 2),
)
def test_the_worst_measured_rise_is_the_least_possible(
    seed: int, layers: int, choices: int, levels: int, budgets: int
) -> None:
    """`random_trial` is linear in the errors, which interpolation finds exactly."""
    problem = random_problem(seed, layers=layers, choices=choices, budgets=budgets)
    slopes = np.random.default_rng(0).uniform(0.1, 2, layers)  # those of `random_trial`
    rises = [s * e for s, e in zip(slopes, problem.errors, strict=True)]
    strategy = Drone(levels=levels, front_to_back=False)
    history = probed(strategy, problem)
    proposed = strategy.propose(problem, history, 1, rng())
    # nothing is proposed where a measurement is the answer
    solutions = proposed or [t.allocation for t in history.feasible(problem)]

    def worst(indices: tuple[int, ...] | list[int]) -> float:
        return max(float(r[i]) for r, i in zip(rises, indices, strict=True))

    space = itertools.product(range(choices), repeat=layers)
    best = min(worst(i) for i in space if problem.meets(i))
    largest = max(float(r.max()) for r in rises)
    error = max(float(e.max()) for e in problem.errors)
    assert all(problem.meets(problem.indices(a)) for a in solutions)
    found = min(worst(problem.indices(a)) for a in solutions)
    assert found <= best + TIE * largest * error + 1e-12


def two_alike(problem: Problem) -> Problem:
    """Two equal layers, of which one must give up nearly all it can unless both give up some."""
    within = problem.within(("svd",))
    errors, cost = within.errors[0], within.costs["macs"][0]
    return Problem(
        dict.fromkeys(("a", "b"), within.choices["layer0"]),
        (errors, errors),
        {"macs": (cost, cost)},
        {"macs": 0.0},
        {"macs": (cost[0] + float(np.sort(cost)[1])) / (2 * cost[0])},
        objectives=("accuracy",),
        directions=("maximize",),
    )


def measured(problem: Problem, harms: dict[str, float], *, metric: bool) -> History:
    """Probes of which each costs the harm of its layer, as a loss or as the objective."""
    trials = []
    for i, allocation in enumerate(replace(ALONE, levels=1).probes(problem, History())):
        harm = sum(harms[name] for name in changed(allocation))
        sign = -1 if problem.directions[0] == "maximize" else 1
        values, metrics = (0.5,), {"loss": 2 + harm}
        if not metric:
            values, metrics = (0.5 + sign * harm,), {}
        trials.append(Trial(i, allocation, "complete", values, metrics, probe=True))
    return History(tuple(trials))


@pytest.mark.parametrize("metric", [True, False])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize(("robust", "fragile"), ["ab", "ba"])
def test_the_layer_that_harms_less_gives_up_more(
    metric: bool, direction: str, robust: str, fragile: str
) -> None:
    problem = replace(two_alike(random_problem(1)), directions=(direction,))
    history = measured(problem, {robust: 0.01, fragile: 1.0}, metric=metric)
    (allocation,) = replace(ALONE, levels=1).propose(problem, history, 1, rng())
    error = {
        n: float(e[i])
        for n, e, i in zip(
            problem.choices, problem.errors, problem.indices(allocation), strict=True
        )
    }
    assert error[fragile] < error[robust]


def test_a_lucky_measurement_counts_as_harmless() -> None:
    problem = two_alike(random_problem(1))
    history = measured(problem, {"a": -0.3, "b": 0.5}, metric=True)
    (allocation,) = replace(ALONE, levels=1).propose(problem, history, 1, rng())
    assert allocation["b"] == DENSE
    assert allocation["a"] != DENSE


@pytest.mark.parametrize("missing", ["nothing measured", "dense failed", "a layer failed"])
def test_errors_stand_in_for_missing_measurements(missing: str) -> None:
    problem = random_problem(5)
    trials = list(probed(ALONE, problem).trials)
    name = list(problem.choices)[1]
    for i, trial in enumerate(trials):
        bad = changed(trial.allocation) == ([] if missing == "dense failed" else [name])
        if bad:
            trials[i] = replace(trial, state="failed", values=(), reason="on purpose")
    history = History(() if missing == "nothing measured" else tuple(trials))
    (allocation,) = ALONE.propose(problem, history, 1, rng())
    assert allocation == Energy().solve(problem)


def test_levels_are_checked() -> None:
    with pytest.raises(UsageError, match="`levels` must be at least 1, got 0"):
        Drone(levels=0)
    with pytest.raises(UsageError, match="`walks` must be at least 1, got 0"):
        Drone(walks=0)


def test_the_search_measures_first(small_net: nn.Module, small_data: object) -> None:
    study = rankNAS.search(
        small_net,
        small_data,
        budget={"macs": 0.3},
        strategy=Drone(levels=2, front_to_back=False),
        n_trials=2,
        settings=rankNAS.Settings(calibration=64, validation=50),
    )
    probes = [t for t in study.trials if t.probe]
    proposed = [t for t in study.trials if not t.probe]
    assert len(probes) == len(study.strategy.probes(study.problems[0], History()))
    assert len(proposed) == 1
    assert proposed[0].number == len(probes)
    assert proposed[0].metrics["macs"] <= 0.3 * study.dense["macs"]


# --------------------------------------------------------------------------- front to back


def layers(times: tuple[float, ...], budget: float) -> Problem:
    """Equal layers but for their times, with errors 0, 0.01 .. 1 and costs in proportion."""
    kept = np.linspace(1, 0.01, 100)
    names = [f"layer{i}" for i in range(len(times))]
    return Problem(
        dict.fromkeys(names, (DENSE, *(Choice("svd", (r,)) for r in range(99, 0, -1)))),
        tuple(1 - kept for _ in names),
        {"macs": tuple(t * kept for t in times)},
        {"macs": 0.0},
        {"macs": budget},
        objectives=("accuracy",),
        directions=("maximize",),
    )


def additive(problem: Problem, harms: tuple[float, ...]) -> Callable[[tuple[int, ...]], float]:
    def rise(row: tuple[int, ...]) -> float:
        rows = zip(harms, problem.errors, row, strict=True)
        return sum(w * float(e[i]) for w, e, i in rows)

    return rise


def test_a_walk_gives_each_layer_its_share_of_the_allowance_in_time() -> None:
    """Rises are linear: a layer's rise is its part of the allowance, interpolation is exact."""
    problem = layers((1.0, 2.0, 5.0), 0.5)
    harms = (1.0, 4.0, 2.0)
    row = Walks(problem, additive(problem, harms), levels=4, walks=1).walk(0.8)
    assert shares(problem) == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    rises = [w * float(e[i]) for w, e, i in zip(harms, problem.errors, row, strict=True)]
    assert rises == pytest.approx([0.1, 0.2, 0.5], abs=0.041)  # to one choice
    assert sum(rises) <= 0.8 + 1e-9


def test_what_a_layer_leaves_over_goes_to_those_behind_it() -> None:
    problem = layers((1.0, 1.0), 0.5)
    harmless = Walks(problem, additive(problem, (0.0, 1.0)), levels=4, walks=1).walk(0.6)
    harmful = Walks(problem, additive(problem, (1.0, 1.0)), levels=4, walks=1).walk(0.6)
    assert [float(e[i]) for e, i in zip(problem.errors, harmless, strict=True)] == pytest.approx(
        [0.99, 0.6], abs=0.011
    )
    assert [float(e[i]) for e, i in zip(problem.errors, harmful, strict=True)] == pytest.approx(
        [0.3, 0.3], abs=0.011
    )


def test_every_layer_is_measured_on_the_compressed_ones_before_it() -> None:
    problem = layers((1.0, 1.0, 1.0), 0.5)
    asked: list[tuple[int, ...]] = []
    rise = additive(problem, (1.0, 1.0, 1.0))

    def recorded(row: tuple[int, ...]) -> float:
        asked.append(row)
        return rise(row)

    row = Walks(problem, recorded, levels=4, walks=1).walk(0.9)
    for asked_row in asked:
        last = max((i for i, choice in enumerate(asked_row) if choice), default=0)
        assert asked_row[:last] == row[:last]
        assert not any(asked_row[last + 1 :])


@settings(max_examples=20, deadline=None)
@given(seed=seeds, budgets=st.integers(1, 2))
def test_the_budget_is_met_and_used_whatever_the_layers(seed: int, budgets: int) -> None:
    problem = random_problem(seed, layers=4, choices=12, budgets=budgets)
    history = History()
    strategy = Drone()
    while asked := [a for a in strategy.probes(problem, history) if a not in history.found]:
        trial = replace(random_trial(problem, len(history.trials), asked[0]), probe=True)
        history = History((*history.trials, trial))
    proposed = strategy.propose(problem, history, 1, rng())
    solutions = proposed or [t.allocation for t in history.feasible(problem)]
    assert solutions and all(problem.meets(problem.indices(a)) for a in solutions)
    assert len(history.trials) <= 2 + strategy.walks * 4 * 3
