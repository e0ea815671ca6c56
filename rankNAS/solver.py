"""Exact allocation: pick one choice per layer, within budgets, at the least total or worst value.

Notation: L layers, C_l choices of layer l, K budgets; value[l] (C_l,), cost[k][l] (C_l,),
limit[k]. Every function returns one index per layer.

References:
    Sinha and Zoltners, Operations Research 1979: the multiple-choice knapsack (`min_sum`).
    HiGHS (Huangfu and Hall, 2018), through ``scipy.optimize.milp``, solves it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from rankNAS.exceptions import BudgetError, RankNASError

__all__ = ["Solution", "least_cost", "min_max", "min_sum"]

Array = npt.NDArray[np.float64]
Table = Sequence[Array]  # one array of C_l values a layer
SLACK = 1e-9  # relative: budgets are met to rounding error, never beyond
SHARPNESS = 1e3  # HiGHS meets constraints to 1e-6 in absolute terms


@dataclass(frozen=True)
class Solution:
    """An optimal allocation and how well its optimality is proven.

    Args:
        indices: The choice of each layer, (L,).
        value: Total (or worst) value.
        gap: Proven relative distance to the optimum; 0 is exact.
    """

    indices: tuple[int, ...]
    value: float
    gap: float


def least_cost(cost: Table) -> float:
    """The smallest total cost that any allocation has."""
    return float(sum(c.min() for c in cost))


def min_sum(
    value: Table,
    costs: Sequence[Table],
    limits: Sequence[float],
    *,
    largest: float = np.inf,
    gap: float = 1e-4,
    seconds: float = 30.0,
) -> Solution:
    """The allocation of the least total value, as a mixed-integer programme.

    Args:
        value: What is summed; finite.
        costs: One table a budget.
        limits: One bound a budget.
        largest: Choices with a greater value are not allowed.
        gap: Relative optimality gap at which the solver may stop.
        seconds: Time limit; the best allocation found by then is returned with its proven gap.

    Raises:
        BudgetError: No allocation meets the budgets.
    """
    layer = np.concatenate([np.full(len(v), i) for i, v in enumerate(value)])
    flat = np.concatenate(value)
    scale = float(np.abs(flat).max()) or 1.0
    one = csr_matrix((np.ones(len(flat)), (layer, np.arange(len(flat)))))
    constraints = [LinearConstraint(one, 1, 1)]
    if limits:
        rows = np.stack([np.concatenate(c) / b for c, b in zip(costs, limits, strict=True)])
        constraints.append(LinearConstraint(SHARPNESS * rows, -np.inf, SHARPNESS))
    offsets = np.cumsum([0, *(len(v) for v in value[:-1])])
    deadline = time.monotonic() + seconds
    while True:
        result = milp(
            flat / scale,
            constraints=constraints,
            integrality=np.ones(len(flat), dtype=np.int64),
            bounds=Bounds(0, (flat <= largest).astype(float)),
            options={
                "mip_rel_gap": gap,
                "time_limit": max(0.0, deadline - time.monotonic()),
            },
        )
        if result.x is None:
            raise _infeasible(costs, limits) if result.status == 2 else _unsolved(seconds)
        chosen = [int(np.argmax(np.where(layer == i, result.x, -1))) for i in range(len(value))]
        indices = tuple(int(i) for i in chosen - offsets)
        if _meets(costs, limits, indices):
            return Solution(indices, _total(value, indices), float(result.mip_gap or 0.0))
        # Rounding inside the solver let it pass a limit by a hair: never that allocation again.
        again = np.zeros((1, len(flat)))
        again[0, chosen] = 1
        constraints.append(LinearConstraint(again, -np.inf, len(value) - 1))


def min_max(value: Table, costs: Sequence[Table], limits: Sequence[float]) -> Solution:
    """The allocation whose worst value is least, exactly; ties go to the least total value.

    Raises:
        BudgetError: No allocation meets the budgets.
    """
    thresholds = np.unique(np.concatenate(value))
    thresholds = thresholds[thresholds >= max(v.min() for v in value)]
    low, high = 0, len(thresholds) - 1
    if not _feasible(value, costs, limits, thresholds[high]):
        raise _infeasible(costs, limits)
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


def _meets(costs: Sequence[Table], limits: Sequence[float], indices: Sequence[int]) -> bool:
    return all(
        _total(cost, indices) <= limit * (1 + SLACK)
        for cost, limit in zip(costs, limits, strict=True)
    )


def _total(table: Table, indices: Sequence[int]) -> float:
    return float(sum(t[i] for t, i in zip(table, indices, strict=True)))


def _infeasible(costs: Sequence[Table], limits: Sequence[float]) -> BudgetError:
    least = ", ".join(
        f"{least_cost(cost):.6g} (limit {limit:.6g})"
        for cost, limit in zip(costs, limits, strict=True)
    )
    return BudgetError(f"no allocation meets the budgets; the least possible costs are {least}.")


def _unsolved(seconds: float) -> RankNASError:
    return RankNASError(f"the solver found no allocation in {seconds:g} seconds.")
