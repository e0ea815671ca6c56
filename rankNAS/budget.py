"""Budgets: upper bounds on costs, each as the fraction kept of the dense model's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rankNAS.exceptions import BudgetError, UnknownNameError

__all__ = ["BUDGET_COSTS", "check_budget", "parse_budget"]

BUDGET_COSTS = ("macs", "params", "weight_bytes", "latency")


def parse_budget(items: Iterable[str], cost: str = "macs") -> dict[str, float]:
    """Budgets as written on the command line.

    Args:
        items: Each a fraction, which bounds `cost`, or ``COST=FRACTION``.
        cost: What a bare fraction bounds.

    Raises:
        BudgetError: Not a number, not in (0, 1], or the same cost twice.
        UnknownNameError: No such cost.

    >>> parse_budget(["0.3", "params=0.4"])
    {'macs': 0.3, 'params': 0.4}
    """
    budget: dict[str, float] = {}
    for item in items:
        name, _, text = item.rpartition("=")
        name = name or cost
        try:
            fraction = float(text)
        except ValueError:
            raise BudgetError(
                f"a budget must be a fraction such as 0.3 or {name}=0.3, got {item!r}."
            ) from None
        if name in budget:
            raise BudgetError(f"the budget for {name!r} is given twice.")
        budget[name] = fraction
    return check_budget(budget)


def check_budget(budget: Mapping[str, float]) -> dict[str, float]:
    """The budget as a plain dict.

    Raises:
        BudgetError: A fraction outside (0, 1].
        UnknownNameError: No such cost.
    """
    for name, fraction in budget.items():
        if name not in BUDGET_COSTS:
            raise UnknownNameError("cost", name, BUDGET_COSTS)
        if not (math.isfinite(fraction) and 0 < fraction <= 1):
            raise BudgetError(
                f"the budget for {name!r} must be in (0, 1], the fraction kept of the dense "
                f"model's {name}; got {fraction}."
            )
    return {name: float(fraction) for name, fraction in budget.items()}
