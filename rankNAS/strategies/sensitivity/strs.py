"""STRS (ASVD): sensitivity-based truncation rank search.

Each layer is measured alone at several ratios; the least sensitive truncations are applied until
the budget is met.

References:
    Yuan et al., 2023, arXiv 2312.05821 (ASVD), sensitivity-based truncation rank searching.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.exceptions import BudgetError
from rankNAS.solver.tables import SLACK
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.one_shot.base import OneShot, sweep
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem

__all__ = ["Measured", "Strs", "truncate"]

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
FURTHER = (0.3, 0.2, 0.1, 0.0)  # 0: the cheapest choice


class Measured(NamedTuple):
    """The measured sensitivity of one layer at one ratio.

    Args:
        layer: Its position.
        ratio: The share of its cost that it keeps.
        choice: Index of the choice that keeps so much.
        score: The sensitivity; smaller is better.
    """

    layer: int
    ratio: float
    choice: int
    score: float


def truncate(
    measured: Sequence[Measured], sizes: Sequence[Sequence[Array]], target: Sequence[float]
) -> list[int] | None:
    """The largest allocation within the target that one cut through the sorted scores gives.

    Every truncation with a score below the cut is applied: a layer gets its smallest ratio below
    the cut, and stays dense if it has none. Of equal scores the larger ratio comes first.
    The released search bisects the cut and may stop one step above the target; this is the
    largest cut with a size of at most the target.

    Args:
        measured: Layers at ratios.
        sizes: One table a budget, of one array a layer; dense at `DENSE_INDEX`.
        target: One bound a budget.

    Returns:
        One index a layer; None if not even all of them applied meet the target.
    """
    chosen = [DENSE_INDEX] * len(sizes[0]) if sizes else []
    smallest = [np.inf] * len(chosen)

    def fits() -> bool:
        totals = [sum(float(s[i]) for s, i in zip(t, chosen, strict=True)) for t in sizes]
        return all(a <= b * (1 + SLACK) for a, b in zip(totals, target, strict=True))

    for layer, ratio, choice, _ in sorted(measured, key=lambda m: (m.score, -m.ratio, m.layer)):
        if fits():
            break
        if ratio < smallest[layer]:
            chosen[layer], smallest[layer] = choice, ratio
    return chosen if fits() else None


@final
@dataclass(frozen=True)
class Strs(Strategy):
    """Sensitivity-based truncation rank searching, of ASVD.

    Each layer alone is measured at keep-ratios 0.9 to 0.4, each by the most accurate choice
    within that share of the layer's budgeted costs; all are sorted by loss (without a loss, by
    the first objective), and `truncate` cuts. The paper measures perplexity on language models
    and counts parameters; its activation-aware scaling of the decomposition is the norm ``asvd``.
    Where all layers at 0.4 do not meet the budgets, which the paper does not treat, ratios 0.3,
    0.2, 0.1 and the cheapest choice are measured too, as far as needed. Failed probes count as the
    most sensitive; without any measurement the tables' errors take their place. If several budgets
    pull in different directions so that no cut fits, the solution is the min-max allocation.

    Args:
        operators: Whose choices may be used; None for all.
    """

    operators: tuple[str, ...] | None = ("svd",)
    name = "strs"
    norm = "asvd"

    def probes(self, problem: Problem, history: History) -> list[Allocation]:
        """Each layer alone at every ratio that the budgets, or a sweep down of them, call for."""
        problem = problem.within(self.operators)
        points = _grid(sweep(problem)[-1])
        rows = {problem.alone(layer, choice) for layer, _, choice in points}
        return [problem.allocation(row) for row in sorted(rows)]

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """The truncated allocation; or, where a cost is an objective, one for each budget."""
        return _Truncated(history.found, self.operators).propose(problem, history, n, rng)


@dataclass(frozen=True)
class _Truncated(OneShot):
    """The solution once the layers are measured."""

    found: Mapping[Allocation, Trial]
    operators: tuple[str, ...] | None
    name = "strs"

    def solve(self, problem: Problem) -> Allocation:
        narrowed = problem.within(self.operators)
        limits = list(narrowed.limits.values())
        if not limits:
            return narrowed.allocation(narrowed.all_dense)
        chosen = truncate(self._measured(narrowed), narrowed.budgeted(), limits)
        if chosen is not None and narrowed.meets(chosen):
            return narrowed.allocation(chosen)
        try:
            narrowed.check()
        except BudgetError as error:
            if self.operators is None:
                raise
            raise BudgetError(
                f"of the choices of {', '.join(self.operators)}: {error} `operators=None` allows "
                "those of every operator."
            ) from None
        return Energy().solve(narrowed)

    def _measured(self, problem: Problem) -> list[Measured]:
        sign, grid = float(problem.signs[0]), list(_grid(problem))
        trials = [self.found.get(problem.allocation(problem.alone(i, j))) for i, _, j in grid]
        if not any(t is not None and t.state == "complete" for t in trials):
            return [Measured(i, r, c, float(problem.errors[i][c])) for i, r, c in grid]
        return [
            Measured(
                *point,
                trial.metrics.get("loss", -sign * trial.values[0])
                if trial is not None and trial.state == "complete"
                else np.inf,
            )
            for point, trial in zip(grid, trials, strict=True)
        ]


def _grid(problem: Problem) -> Iterator[tuple[int, float, int]]:
    """Layer, ratio and choice of every measurement; nothing where nothing is budgeted."""
    names = [n for n in problem.costs if n in problem.budget or n in problem.objectives]
    if not names:
        return
    costs = [
        np.max([problem.costs[n][i] / problem.costs[n][i][DENSE_INDEX] for n in names], axis=0)
        for i in range(len(problem.errors))
    ]
    lowest = list(problem.all_dense)
    for ratio in RATIOS + FURTHER:
        if ratio < RATIOS[-1] and problem.meets(lowest):
            break
        for layer, (cost, errors) in enumerate(zip(costs, problem.errors, strict=True)):
            within = cost <= (ratio or cost.min()) * (1 + SLACK)
            choice = (
                int(np.argmin(np.where(within, errors, np.inf))) if within.any() else DENSE_INDEX
            )
            if choice != DENSE_INDEX:
                lowest[layer] = choice
                yield layer, ratio, choice
