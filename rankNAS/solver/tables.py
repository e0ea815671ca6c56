"""Tables of the solvers: one value or cost per choice and layer.

Notation: L layers, C_l choices of layer l, K budgets; value[l] (C_l,), cost[k][l] (C_l,),
limit[k]. An allocation is one index per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rankNAS.exceptions import BudgetError

__all__ = [
    "SLACK",
    "Array",
    "Solution",
    "Table",
    "infeasible",
    "least_cost",
    "least_of_each",
    "meets",
    "total",
]

Array = npt.NDArray[np.float64]
Table = Sequence[Array]  # one array of C_l values per layer
SLACK = 1e-9  # relative tolerance of a budget, for rounding errors only


@dataclass(frozen=True)
class Solution:
    """An optimal allocation and its proven optimality gap.

    Args:
        indices: The choice of each layer, (L,).
        value: Total (or worst) value.
        gap: Proven relative distance to the optimum; 0 is exact.
    """

    indices: tuple[int, ...]
    value: float
    gap: float


def least_cost(cost: Table) -> float:
    """The smallest total cost of any allocation."""
    return float(sum(c.min() for c in cost))


def total(table: Table, indices: Sequence[int]) -> float:
    """The sum over the layers."""
    return float(sum(t[i] for t, i in zip(table, indices, strict=True)))


def meets(costs: Sequence[Table], limits: Sequence[float], indices: Sequence[int]) -> bool:
    """Whether every limit is met."""
    return all(
        total(cost, indices) <= limit * (1 + SLACK)
        for cost, limit in zip(costs, limits, strict=True)
    )


def infeasible(costs: Sequence[Table], limits: Sequence[float]) -> BudgetError:
    """The error for infeasible budgets; it names the least possible costs."""
    least = ", ".join(
        f"{least_cost(cost):.6g} (limit {limit:.6g})"
        for cost, limit in zip(costs, limits, strict=True)
    )
    return BudgetError(f"no allocation meets the budgets; the least possible costs are {least}.")


def least_of_each(values: Array, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Position of the first least value of each layer, in tables that are joined.

    >>> least_of_each(np.array([3.0, 1.0, 1.0, 5.0, 4.0]), np.array([0, 3])).tolist()
    [1, 4]
    """
    layers = np.repeat(np.minimum.reduceat(values, starts), np.diff([*starts, values.size]))
    least = np.flatnonzero(values == layers)
    found: npt.NDArray[np.int64] = least[np.searchsorted(least, starts)]
    return found
