"""Contract tests of strategies, as a test class. Needs pytest."""

from __future__ import annotations

import itertools
import pickle
import random
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from rankNAS.allocation import Allocation
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.history import History
from rankNAS.strategies.problem import Array, Problem
from rankNAS.testing.problems import random_problem, random_trial

__all__ = ["StrategyContract", "Study"]

_STUDIES: dict[tuple[type, int], Study] = {}


@dataclass(frozen=True)
class Study:
    """The proposals of a strategy in a growing study, and its side effects.

    Args:
        rounds: Each history with the proposals made for it.
        generators_kept: Whether global random generators and thread count are unchanged.
        tables_kept: Whether the problem's tables are unchanged.
    """

    rounds: tuple[tuple[History, tuple[Allocation, ...]], ...]
    generators_kept: bool
    tables_kept: bool


class StrategyContract:
    """Contract of a strategy.

    Set `strategy`. Every test uses the same small study of each problem in `problems`: `rounds`
    rounds of `batch` proposals each. The first proposal fails and the others are evaluated.
    """

    strategy: ClassVar[Strategy]
    batch: ClassVar[int] = 3
    rounds: ClassVar[int] = 3
    problems: ClassVar[dict[str, Problem]] = {
        "one_budget": random_problem(1),
        "two_budgets": random_problem(2, budgets=2),
        "two_objectives": random_problem(3, objectives=2),
    }

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise every test that takes a problem or a study over `problems`."""
        if "problem" in metafunc.fixturenames:
            metafunc.parametrize("problem", self.problems, indirect=True)

    @pytest.fixture
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        """A search problem to make proposals for."""
        return self.problems[request.param]

    @pytest.fixture
    def study(self, problem: Problem) -> Study:
        """The study of the problem, shared by all tests."""
        key = type(self), id(problem)
        if key not in _STUDIES:
            _STUDIES[key] = _study(self.strategy, problem, self.rounds, self.batch)
        return _STUDIES[key]

    def test_proposals_are_allocations_of_the_space_within_the_budgets(
        self, problem: Problem, study: Study
    ) -> None:
        assert study.rounds[0][1], "proposes nothing at all"
        for _, proposals in study.rounds:
            assert len(proposals) <= self.batch
            for allocation in proposals:
                assert list(allocation) == list(problem.choices)
                assert problem.meets(problem.indices(allocation))

    def test_proposals_are_new_and_distinct(self, study: Study) -> None:
        for history, proposals in study.rounds:
            assert len(set(proposals)) == len(proposals)
            assert not history.tried & set(proposals)

    def test_what_is_being_evaluated_is_not_proposed(self, problem: Problem, study: Study) -> None:
        for history, proposals in study.rounds[::2]:
            waiting = history.awaiting(proposals)
            again = self.strategy.propose(problem, waiting, self.batch, np.random.default_rng(0))
            assert not waiting.tried & set(again)

    def test_equal_arguments_give_equal_proposals(self, problem: Problem, study: Study) -> None:
        history, proposals = study.rounds[-1]
        copy: Strategy = pickle.loads(pickle.dumps(self.strategy))
        assert copy == self.strategy
        torch.rand(3)  # global generators must have no effect
        np.random.random()
        rng = np.random.default_rng(self.rounds - 1)
        assert tuple(copy.propose(problem, history, self.batch, rng)) == proposals

    def test_the_global_generators_are_left_alone(self, study: Study) -> None:
        assert study.generators_kept

    def test_the_tables_are_left_alone(self, study: Study) -> None:
        assert study.tables_kept


def _state(problem: Problem) -> tuple[list[Array], object]:
    tables = [*problem.errors, *itertools.chain(*problem.costs.values())]
    generators = (
        torch.random.get_rng_state().tolist(),
        pickle.dumps(np.random.get_state()),
        random.getstate(),
        torch.get_num_threads(),
    )
    return [t.copy() for t in tables], generators


def _probed(strategy: Strategy, problem: Problem, history: History) -> History:
    """The history with all probes that a strategy requests."""
    while True:
        probes = dict.fromkeys(strategy.probes(problem, history))
        if not (wanted := [a for a in probes if a not in history.found]):
            return history
        for allocation in wanted:
            problem.indices(allocation)
            trial = random_trial(problem, len(history.trials), allocation)
            trial = replace(trial, probe=True, budget_key=problem.budget_key)
            history = History((*history.trials, trial))


def _study(strategy: Strategy, problem: Problem, rounds: int, batch: int) -> Study:
    tables, generators = _state(problem)
    history, done = History(), []
    for number in range(rounds):
        rng = np.random.default_rng(number)
        history = _probed(strategy, problem, history)
        proposals = tuple(strategy.propose(problem, history, batch, rng))
        done.append((history, proposals))
        trials = list(history.trials)
        for allocation in proposals:
            trial = random_trial(problem, len(trials), allocation)
            if number == 0 and allocation == proposals[0]:
                trial = replace(trial, state="failed", values=(), reason="on purpose")
            trials.append(replace(trial, budget_key=problem.budget_key))
        history = History(tuple(trials))
    tables_after, generators_after = _state(problem)
    same = all(np.array_equal(a, b) for a, b in zip(tables, tables_after, strict=True))
    return Study(tuple(done), generators == generators_after, same)
