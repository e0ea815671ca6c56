"""Min-max allocation within budgets: exact bisection over the occurring values.

Notation as in `rankNAS.solver.tables`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankNAS.exceptions import BudgetError
from rankNAS.solver.min_sum import min_sum
from rankNAS.solver.tables import SLACK, Solution, Table, infeasible, least_cost

__all__ = ["min_max"]


def min_max(value: Table, costs: Sequence[Table], limits: Sequence[float]) -> Solution:
    """The allocation that minimises the worst value, exactly; ties by the least total value.

    Raises:
        BudgetError: No allocation meets the budgets.
    """
    thresholds = np.unique(np.concatenate(value))
    thresholds = thresholds[thresholds >= max(v.min() for v in value)]
    low, high = 0, len(thresholds) - 1
    if not _feasible(value, costs, limits, thresholds[high]):
        raise infeasible(costs, limits)
    while low < high:
        middle = (low + high) // 2
        if _feasible(value, costs, limits, thresholds[middle]):
            high = middle
        else:
            low = middle + 1
    best = min_sum(value, costs, limits, largest=float(thresholds[high]))
    worst = max(float(v[i]) for v, i in zip(value, best.indices, strict=True))
    return Solution(best.indices, worst, 0.0)


def _feasible(
    value: Table, costs: Sequence[Table], limits: Sequence[float], threshold: float
) -> bool:
    """Whether choices of at most this value can meet all budgets."""
    allowed = [v <= threshold for v in value]
    for cost, limit in zip(costs, limits, strict=True):
        if least_cost([c[a] for c, a in zip(cost, allowed, strict=True)]) > limit * (1 + SLACK):
            return False
    if len(limits) < 2:
        return True
    zero = [np.zeros(int(a.sum())) for a in allowed]
    narrowed = [[c[a] for c, a in zip(cost, allowed, strict=True)] for cost in costs]
    try:
        min_sum(zero, narrowed, limits)
    except BudgetError:
        return False
    return True
