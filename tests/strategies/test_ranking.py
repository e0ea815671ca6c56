"""Trials are ranked by their divergence where the first objective is the task's main metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.bayesian.bo import BayesianOptimisation
from rankNAS.strategies.history import History, Trial, rankings
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sampling.beam import Beam
from rankNAS.strategies.sampling.nsga2 import Nsga2
from rankNAS.strategies.sampling.random import Random
from rankNAS.strategies.sampling.tpe import Tpe
from rankNAS.testing import random_problem

PROBLEM = random_problem(4, layers=6, choices=12)
SAMPLERS = [BayesianOptimisation(pool=64), Tpe(), Nsga2(population=8)]
ALL = [*SAMPLERS, Random(), Beam()]


def named(strategy: Strategy) -> str:
    return strategy.name


def trials(divergences: list[float], accuracies: list[float]) -> tuple[Trial, ...]:
    """Random allocations on the budget, with these metrics."""
    found: list[rankNAS.Allocation] = []
    rng = np.random.default_rng(0)
    while len(found) < len(divergences):
        found += Random().propose(PROBLEM, History(), 1, rng)
        found = list(dict.fromkeys(found))
    rows = zip(found, divergences, accuracies, strict=True)
    return tuple(
        Trial(
            i,
            allocation,
            "complete",
            (accuracy,),
            {"kl_divergence": divergence, "accuracy": accuracy},
            budget_key=PROBLEM.budget_key,
        )
        for i, (allocation, divergence, accuracy) in enumerate(rows)
    )


@pytest.mark.parametrize("strategy", ALL, ids=named)
def test_the_answer_has_the_least_divergence_where_accuracy_says_otherwise(
    strategy: Strategy,
) -> None:
    history = History(trials([0.3, 0.1, 0.2], [0.92, 0.90, 0.91]))
    assert strategy.select(PROBLEM, history).number == 1
    tied = History(trials([0.3, 0.1, 0.2], [0.9, 0.9, 0.9]))
    assert strategy.select(PROBLEM, tied).number == 1
    own = replace(PROBLEM, objectives=("taste",))
    assert strategy.select(own, history).number == 0
    without = History((*history.trials, replace(history.trials[0], number=3, metrics={})))
    assert strategy.select(PROBLEM, without).number == 0


@pytest.mark.parametrize("strategy", SAMPLERS, ids=named)
def test_proposals_follow_the_divergence_and_not_the_accuracy(strategy: Strategy) -> None:
    rng = np.random.default_rng(1)
    divergences, noise = (rng.random(24).tolist() for _ in range(2))

    def proposed(accuracies: list[float], problem: Problem = PROBLEM) -> list[rankNAS.Allocation]:
        history = History(trials(divergences, accuracies))
        return strategy.propose(problem, history, 3, np.random.default_rng(0))

    own = replace(PROBLEM, objectives=("taste",))
    assert proposed(noise) == proposed(noise[::-1])
    assert proposed(noise, own) != proposed(noise[::-1], own)


def test_rankings_replace_the_first_objective_alone() -> None:
    problem = random_problem(3, objectives=2)
    allocation = problem.allocation(problem.all_dense)
    both = [
        Trial(i, allocation, "complete", (0.9, 100.0 + i), {"kl_divergence": 0.1 * i})
        for i in range(3)
    ]
    assert rankings(problem, both).tolist() == [[-0.1 * i, -100.0 - i] for i in range(3)]
    loss = replace(problem, objectives=("loss", "macs"), directions=("minimize", "minimize"))
    assert rankings(loss, both)[:, 0].tolist() == [-0.9] * 3


def test_of_several_objectives_the_answer_is_on_the_front() -> None:
    problem = replace(random_problem(3, objectives=2), budget={})
    rows = [problem.all_dense, problem.alone(0, 1), problem.alone(1, 1), problem.alone(2, 1)]
    values = [(0.9, 9.0), (0.8, 5.0), (0.7, 6.0), (0.85, 4.0)]
    divergences = [0.4, 0.2, 0.1, 0.3]  # the least belongs to a trial that others dominate
    found = tuple(
        Trial(i, problem.allocation(row), "complete", v, {"kl_divergence": d})
        for i, (row, v, d) in enumerate(zip(rows, values, divergences, strict=True))
    )
    assert Random().select(problem, History(found)).number == 3


@pytest.mark.parametrize("strategy", ["random", "tpe", "bo"])
def test_values_stay_the_objective_and_a_resumed_search_gives_the_same_answer(
    small_net: nn.Module,
    small_data: tuple[TensorDataset, TensorDataset],
    tmp_path: Path,
    strategy: str,
) -> None:
    settings = rankNAS.Settings(calibration=64, validation=50)
    options = {"budget": {"macs": 0.5}, "strategy": strategy, "settings": settings}

    def search(n_trials: int, **more: object) -> rankNAS.Study:
        return rankNAS.search(small_net, small_data, n_trials=n_trials, **options, **more)  # type: ignore[arg-type]

    whole, storage = search(7), f"sqlite:///{tmp_path}/study.db"
    search(3, storage=storage)
    study = search(7, storage=storage, resume=True)
    assert [t.allocation for t in study.trials] == [t.allocation for t in whole.trials]
    assert study.best.allocation == whole.best.allocation
    assert study.best.metrics["kl_divergence"] == min(
        t.metrics["kl_divergence"] for t in study.trials
    )
    assert study.best in study.pareto_front()
    stored = study.store.study.trials
    assert [t.values for t in stored] == [[t.metrics["accuracy"]] for t in study.trials]
