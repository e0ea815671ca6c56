"""Strategies that propose one allocation from the tables alone; or one a budget, for a front."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.exceptions import BudgetError
from rankNAS.solver.programmes import min_max
from rankNAS.strategies.base import Array, History, Problem, Strategy
from rankNAS.strategies.sampling.shares import within_shares

__all__ = ["Energy", "OneShot", "Uniform", "sweep"]

SWEEP = 12  # budgets of a front


class OneShot(Strategy):
    """A strategy whose answer follows from the tables alone.

    Where a cost is an objective there is no single answer: the budget on it is swept down to the
    least possible, which gives a front.
    """

    @abstractmethod
    def solve(self, problem: Problem) -> Allocation:
        """The answer to a problem.

        Raises:
            BudgetError: The strategy finds no allocation that meets the budgets.
        """

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """The answer; or, where a cost is an objective, the answers to a sweep of budgets."""
        found: list[Allocation] = []
        for swept in sweep(problem):
            try:
                allocation = self.solve(swept)
            except BudgetError:
                if swept is problem:
                    raise
                continue
            if allocation not in history.proposed and allocation not in found:
                found.append(allocation)
            if len(found) == n:
                break
        return found


def sweep(problem: Problem, points: int = SWEEP) -> list[Problem]:
    """The problem; and, where costs are objectives, with their budgets lowered step by step.

    Args:
        problem: Tables and budgets; a cost that is an objective need not be budgeted.
        points: Budgets from the largest allowed fraction to the least possible one.
    """
    swept = [name for name in problem.objectives if name in problem.costs]
    if not swept:
        return [problem]
    steps = np.linspace(0, 1, points)[1:-1]
    problems = [problem]
    for step in steps:
        lowered = dict(problem.budget)
        for name in swept:
            high = problem.budget.get(name, 1.0)
            lowered[name] = float(high - step * (high - problem.least(name)))
        problems.append(replace(problem, budget=lowered))
    return problems


@final
@dataclass(frozen=True)
class Uniform(OneShot):
    """The same fraction of every layer: the baseline of the literature.

    Each layer takes, of all its choices within that fraction of its own cost, the most accurate;
    the fraction is the largest that meets the budgets.
    """

    name = "uniform"

    def solve(self, problem: Problem) -> Allocation:
        """The largest common share."""
        shares: Array = np.ones(len(problem.errors))
        return problem.allocation(within_shares(problem, shares).tolist())


@final
@dataclass(frozen=True)
class Energy(OneShot):
    """The least possible worst relative error over the layers, solved exactly.

    The error of a layer is that of its best operator at its cost, in the chosen metric. Of the
    allocations that attain the minimum, the one of the least total error is taken. ALDS
    (Liebenwein et al., NeurIPS 2021, equation 4) poses the same problem for spectral errors and
    channel groups, and solves it by alternation.
    """

    name = "energy"

    def solve(self, problem: Problem) -> Allocation:
        """The exact min-max allocation."""
        limits = list(problem.limits.values())
        return problem.allocation(min_max(problem.errors, problem.budgeted(), limits).indices)
