"""Min-max allocation within budgets: bisection over the occurring values.

Notation as in `rankNAS.solver.tables`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog

from rankNAS.deadline import check_time
from rankNAS.exceptions import BudgetError
from rankNAS.solver.min_sum import min_sum
from rankNAS.solver.tables import SLACK, Array, Solution, Table, least_cost, least_of_each

__all__ = ["min_max"]

EXACT = 200  # layers up to which an integer programme decides what multipliers leave open
PLANES = 60  # cutting planes of the multipliers


def min_max(value: Table, costs: Sequence[Table], limits: Sequence[float]) -> Solution:
    """The allocation that minimises the worst value; ties by the least total value.

    It is exact for up to one budget and for few layers. For many layers within several budgets, a
    bound that neither is met by rounding nor refuted by multipliers counts as infeasible; the gap
    then says how far the least possible value may be.

    Raises:
        BudgetError: No allocation meets the budgets.
        TimeLimitError: The active deadline has passed.
    """
    thresholds = np.unique(np.concatenate(value))
    thresholds = thresholds[thresholds >= max(v.min() for v in value)]
    low, high = 0, len(thresholds) - 1
    if not _feasible(value, costs, limits, thresholds[high]):
        # Raises the error unless an integer programme meets the budgets.
        min_sum([np.zeros(len(v)) for v in value], costs, limits)
    open_: list[int] = []  # thresholds that were not decided
    while low < high:
        middle = (low + high) // 2
        found = _feasible(value, costs, limits, thresholds[middle])
        if found:
            high = middle
        else:
            low = middle + 1
            open_ += [middle] if found is None else []
    best = min_sum(value, costs, limits, largest=float(thresholds[high]))
    worst = max(float(v[i]) for v, i in zip(value, best.indices, strict=True))
    if not open_:
        return Solution(best.indices, worst, 0.0)
    # Every threshold below the lowest open one that was tried is refuted.
    least = _lowest(value, costs, limits, thresholds[: open_[0] + 1])
    return Solution(best.indices, worst, (worst - least) / (abs(worst) or 1.0))


def _lowest(
    value: Table, costs: Sequence[Table], limits: Sequence[float], thresholds: Array
) -> float:
    """The lowest threshold that multipliers do not refute; the last one is not refuted."""
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if _relaxed(_narrowed(value, costs, thresholds[middle]), limits) is False:
            low = middle + 1
        else:
            high = middle
    return float(thresholds[high])


def _narrowed(value: Table, costs: Sequence[Table], threshold: float) -> list[Table]:
    """The costs of the choices of at most this value."""
    allowed = [v <= threshold for v in value]
    return [[c[a] for c, a in zip(cost, allowed, strict=True)] for cost in costs]


def _feasible(
    value: Table, costs: Sequence[Table], limits: Sequence[float], threshold: float
) -> bool | None:
    """Whether choices of at most this value can meet all budgets; None if it is not decided."""
    check_time()
    narrowed = _narrowed(value, costs, threshold)
    for cost, limit in zip(narrowed, limits, strict=True):
        if least_cost(cost) > limit * (1 + SLACK):
            return False
    if len(limits) < 2:
        return True
    found = _relaxed(narrowed, limits)
    if found is not None or len(value) > EXACT:
        return found
    zero = [np.zeros(len(c)) for c in narrowed[0]]
    try:
        min_sum(zero, narrowed, limits)
    except BudgetError:
        return False
    return True


def _relaxed(costs: Sequence[Table], limits: Sequence[float]) -> bool | None:
    """Whether the budgets can be met, by cutting planes over the multipliers; None if unknown.

    For multipliers m >= 0 with sum 1, no allocation meets the budgets if
    sum_l min_c m . cost[l][c] > m . limit. The minimisers are allocations that may meet them
    (Kelley, SIAM 1960).
    """
    units = [limit if limit > 0 else 1.0 for limit in limits]
    starts = np.cumsum([0, *(len(c) for c in costs[0])])[:-1]
    rows = np.stack([np.concatenate(c) / unit for c, unit in zip(costs, units, strict=True)])
    bounds = np.array([limit / unit for limit, unit in zip(limits, units, strict=True)])
    slack = SLACK * np.abs(bounds)
    K = len(bounds)
    m, planes = np.full(K, 1 / K), []
    for _ in range(PLANES):
        check_time()
        priced = m @ rows
        chosen = least_of_each(priced, starts)
        excess = rows[:, chosen].sum(1) - bounds
        if (excess <= slack).all():
            return True
        if m @ excess > m @ slack + 1e-12 * priced.size:
            return False
        planes.append(excess)
        # Maximise t with t <= m . excess for every allocation so far.
        A = np.hstack([-np.array(planes), np.ones((len(planes), 1))])
        result = linprog(
            np.append(np.zeros(K), -1.0),
            A_ub=A,
            b_ub=np.zeros(len(planes)),
            A_eq=np.append(np.ones(K), 0.0)[np.newaxis],
            b_eq=[1.0],
            bounds=[(0, None)] * K + [(None, None)],
        )
        if result.status != 0 or np.allclose(result.x[:K], m, rtol=0, atol=1e-12):
            return None
        m = np.maximum(result.x[:K], 0)
    return None
