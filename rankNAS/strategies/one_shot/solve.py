"""Multiple-choice knapsack (MCKP): the least total error within the budgets, solved exactly.

References:
    Sinha and Zoltners, Operations Research 1979: the multiple-choice knapsack.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, final, get_args

from rankNAS.allocation import Allocation
from rankNAS.exceptions import UsageError
from rankNAS.solver.min_max import min_max
from rankNAS.solver.min_sum import min_sum
from rankNAS.solver.tables import Solution
from rankNAS.strategies.one_shot.base import OneShot
from rankNAS.strategies.problem import Problem

__all__ = ["Solve"]

logger = logging.getLogger(__name__)
Rule = Literal["sum", "max"]


@final
@dataclass(frozen=True)
class Solve(OneShot):
    """The allocation of the least total, or worst, power of the layers' relative errors.

    The degradation of an allocation is modelled as a sum over layers. Its minimum is a
    multiple-choice knapsack, solved to a proven gap; the gap is logged.

    Args:
        rule: ``sum`` or ``max`` of the layers' values.
        power: The value of a choice is its relative squared error to this power; 0.5 sums
            relative errors that are not squared. Under ``max`` it breaks ties only.

    Raises:
        UsageError: An unknown rule, or a power that is not positive.
    """

    rule: Rule = "sum"
    power: float = 1.0
    name = "solve"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule) or not self.power > 0:
            raise UsageError(
                f"`rule` must be 'sum' or 'max' and `power` positive, got {self.rule!r} and "
                f"{self.power}."
            )

    def solution(self, problem: Problem) -> Solution:
        """The optimum, with the gap to which it is proven; its indices are the problem's.

        Raises:
            BudgetError: No allocation meets the budgets.
        """
        value = [errors**self.power for errors in problem.errors]
        solver = min_sum if self.rule == "sum" else min_max
        return solver(value, problem.budgeted(), list(problem.limits.values()))

    def solve(self, problem: Problem) -> Allocation:
        """The optimal allocation."""
        found = self.solution(problem)
        logger.info(
            "%s of error**%g for %s: %.6g, within %.2g %% of the optimum",
            self.rule,
            self.power,
            problem.budget_key,
            found.value,
            100 * found.gap,
        )
        return problem.allocation(found.indices)
