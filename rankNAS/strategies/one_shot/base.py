"""Strategies that propose one allocation from the tables alone; or one a budget, for a front."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.exceptions import BudgetError
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.history import History
from rankNAS.strategies.problem import Problem

__all__ = ["OneShot", "sweep"]

SWEEP = 12  # budgets of a front


class OneShot(Strategy):
    """A strategy whose solution follows from the tables alone.

    Where a cost is an objective, the budget on it is swept down to the least possible one, which
    gives a front.
    """

    @abstractmethod
    def solve(self, problem: Problem) -> Allocation:
        """The solution of a problem.

        Raises:
            BudgetError: The strategy finds no allocation that meets the budgets.
        """

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """The solution; or, where a cost is an objective, the solutions of a sweep of budgets."""
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
