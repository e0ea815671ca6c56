"""Multiple-choice knapsack (MCKP): the least total loss or error within the budgets, exactly.

References:
    Sinha and Zoltners, Operations Research 1979: the multiple-choice knapsack.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.exceptions import UsageError
from rankNAS.solver.min_max import min_max
from rankNAS.solver.min_sum import min_sum
from rankNAS.solver.tables import Solution
from rankNAS.strategies.history import History, Trial, degradation
from rankNAS.strategies.one_shot.base import OneShot, sweep
from rankNAS.strategies.problem import Array, Problem

__all__ = ["Solve"]

logger = logging.getLogger(__name__)
Rule = Literal["sum", "max"]
Form = Literal["best", "absolute", "relative", "mean"]
FORMS: tuple[Form, ...] = ("absolute", "mean", "relative")  # that "best" compares


@final
@dataclass(frozen=True)
class Solve(OneShot):
    """The allocation of the least total, or worst, loss or error of the layers.

    The degradation of an allocation is modelled as a sum over layers. Its minimum is a
    multiple-choice knapsack, solved to a proven gap; the gap is logged.

    Args:
        rule: ``sum`` or ``max`` of the layers' values.
        power: The value of a choice is its loss or relative squared error to this power; 0.5 sums
            relative errors that are not squared. Under ``max`` it breaks ties only.
        form: ``absolute`` for the second-order losses, ``relative`` for the relative squared
            errors, ``mean`` for their geometric mean. ``best`` evaluates one solution of each, and
            takes the least degradation.

    Raises:
        UsageError: An unknown rule or form, or a power that is not positive.
    """

    rule: Rule = "sum"
    power: float = 1.0
    form: Form = "best"
    name = "solve"
    needs_losses = True

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule) or not self.power > 0:
            raise UsageError(
                f"`rule` must be 'sum' or 'max' and `power` positive, got {self.rule!r} and "
                f"{self.power}."
            )
        if self.form not in get_args(Form):
            raise UsageError(f"`form` must be one of {get_args(Form)}, got {self.form!r}.")

    def solution(self, problem: Problem, form: Form | None = None) -> Solution:
        """The optimum, with the gap to which it is proven; its indices are the problem's.

        Args:
            problem: The problem.
            form: Replaces that of the strategy; ``best`` stands for ``absolute``.

        Raises:
            BudgetError: No allocation meets the budgets.
        """
        tables = _tables(problem, form or self.form)
        value = [table**self.power for table in tables]
        solver = min_sum if self.rule == "sum" else min_max
        return solver(value, problem.budgeted(), list(problem.limits.values()))

    def solve(self, problem: Problem) -> Allocation:
        """The optimal allocation; of the absolute form if the best one is to be found."""
        return self._solved(problem, self.form)

    def solutions(self, problem: Problem) -> list[Allocation]:
        """The distinct optima of all forms that are compared."""
        forms = FORMS if self.form == "best" and problem.losses else (self.form,)
        return list(dict.fromkeys(self._solved(problem, form) for form in forms))

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """The solutions; or, where a cost is an objective, those of a sweep of budgets."""
        if len(sweep(problem)) > 1:
            return super().propose(problem, history, n, rng)
        return [a for a in self.solutions(problem) if a not in history.proposed][:n]

    def select(self, problem: Problem, history: History) -> Trial:
        """The trial of the least degradation, or the best one of a front.

        Raises:
            StudyError: No trial has succeeded yet.
        """
        trials = history.feasible(problem)
        if not trials or self.form != "best" or len(problem.objectives) > 1:
            return super().select(problem, history)
        return min(trials, key=lambda t: (degradation(problem, t), t.number))

    def _solved(self, problem: Problem, form: Form) -> Allocation:
        found = self.solution(problem, form)
        logger.info(
            "%s of %s**%g for %s: %.6g, within %.2g %% of the optimum",
            self.rule,
            "error" if form == "relative" or not problem.losses else "loss",
            self.power,
            problem.budget_key,
            found.value,
            100 * found.gap,
        )
        return problem.allocation(found.indices)


def mixed(problem: Problem, losses: Sequence[Array], share: float) -> tuple[Array, ...]:
    """Weighted geometric means of losses and relative errors.

    Args:
        problem: Its relative errors.
        losses: One array a layer.
        share: Power of the losses, in [0, 1]; the rest is that of the errors.
    """
    pairs = zip(losses, problem.errors, strict=True)
    return tuple(h**share * e ** (1 - share) for h, e in pairs)


def _tables(problem: Problem, form: Form) -> Sequence[Array]:
    """The values of the choices."""
    if form == "relative":
        return problem.errors
    return mixed(problem, problem.absolute, 0.5 if form == "mean" else 1.0)
