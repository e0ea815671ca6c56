"""The Pareto front in the result document, against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rankNAS.cli.fronts import describe_front
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem
from rankNAS.testing import random_problem, random_trial


def history_of(problem: Problem, seed: int, count: int = 30) -> History:
    rng = np.random.default_rng(seed)
    sizes = [len(e) for e in problem.errors]
    drawn = dict.fromkeys(problem.allocation(rng.integers(0, sizes)) for _ in range(count))
    return History(tuple(random_trial(problem, i, a) for i, a in enumerate(drawn)))


def dominates(one: Trial, other: Trial) -> bool:
    """Accuracy is maximised, MACs are minimised."""
    pairs = [(one.values[0], other.values[0]), (-one.values[1], -other.values[1])]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


@pytest.mark.parametrize("seed", range(8))
def test_the_front_and_what_dominates_the_others(seed: int) -> None:
    problem = random_problem(seed, objectives=2)
    history = history_of(problem, seed)
    found = describe_front(problem, history)
    feasible = [t for t in history.trials if problem.meets(problem.indices(t.allocation))]
    front = [t for t in feasible if not any(dominates(o, t) for o in feasible)]
    assert found["feasible"] == [t.number for t in feasible]
    assert sorted(found["pareto_front"]) == [t.number for t in front]
    accuracies = [history.trials[n].values[0] for n in found["pareto_front"]]
    assert accuracies == sorted(accuracies, reverse=True)
    others = {str(t.number) for t in feasible} - {str(t.number) for t in front}
    assert set(found["dominated_by"]) == others
    for loser, winner in found["dominated_by"].items():
        assert winner in found["pareto_front"]
        assert dominates(history.trials[winner], history.trials[int(loser)])


@pytest.mark.parametrize("seed", range(8))
def test_the_hypervolume_is_the_area_between_the_front_and_the_worst_values(seed: int) -> None:
    problem = random_problem(seed, objectives=2)
    history = history_of(problem, seed)
    found = describe_front(problem, history)
    worst = min(t.values[0] for t in history.trials), max(t.values[1] for t in history.trials)
    assert found["reference"] == pytest.approx(worst)
    # Steps of the front from its most accurate trial down: each adds the cost that it saves.
    area, least = 0.0, worst[1]
    for accuracy, macs in (history.trials[n].values for n in found["pareto_front"]):
        area += (accuracy - worst[0]) * (least - macs)
        least = macs
    assert found["hypervolume"] == pytest.approx(area)


def test_one_objective_has_no_volume() -> None:
    problem = random_problem(0)
    history = history_of(problem, 0)
    found = describe_front(problem, history)
    assert set(found) == {"feasible", "pareto_front"}
    best = max(history.feasible(problem), key=lambda t: t.values[0])
    assert best.number in found["pareto_front"]


def test_failed_trials_and_empty_histories_are_no_part_of_it() -> None:
    problem = random_problem(0, objectives=2)
    assert describe_front(problem, History())["pareto_front"] == []
    history = history_of(problem, 0)
    failed = replace(history.trials[0], state="failed", values=(), number=99)
    both = History((*history.trials, failed))
    assert describe_front(problem, both) == describe_front(problem, history)
