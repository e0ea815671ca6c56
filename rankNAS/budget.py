"""Budgets: upper bounds on costs, each as the fraction kept of the dense model's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rankNAS.exceptions import BudgetError, UnknownNameError

__all__ = [
    "BUDGET_COSTS",
    "check_budget",
    "check_budgets",
    "budget_key",
    "parse_budget",
    "parse_budgets",
]

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


def parse_budgets(items: Iterable[str], cost: str = "macs") -> list[dict[str, float]]:
    """Several budgets as written on the command line, each to be met by an answer of its own.

    Args:
        items: As for `parse_budget`, with lists of fractions: ``0.5,0.3`` are two budgets. Items
            with several fractions must have equally many; one with a single fraction holds in
            every budget.
        cost: What a bare fraction bounds.

    Raises:
        BudgetError: As for `parse_budget`, or lists of different lengths.
        UnknownNameError: No such cost.

    >>> parse_budgets(["0.5,0.3", "params=0.6"])
    [{'macs': 0.5, 'params': 0.6}, {'macs': 0.3, 'params': 0.6}]
    """
    lists = []
    for item in items:
        name, equals, text = item.rpartition("=")
        lists.append([f"{name}{equals}{part.strip()}" for part in text.split(",")])
    count = max((len(parts) for parts in lists), default=1)
    if any(len(parts) not in (1, count) for parts in lists):
        raise BudgetError(
            f"the budgets list {' and '.join(str(len(parts)) for parts in lists)} fractions; give "
            "one, or equally many, for each cost."
        )
    return check_budgets(
        [parse_budget((parts[i % len(parts)] for parts in lists), cost) for i in range(count)]
    )


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


def check_budgets(
    budgets: Mapping[str, float] | Sequence[Mapping[str, float]] | None,
) -> list[dict[str, float]]:
    """One budget or several as a list; none at all is one empty budget.

    Raises:
        BudgetError: As for `check_budget`, or a budget that is given twice.
        UnknownNameError: No such cost.
    """
    given = [budgets or {}] if budgets is None or isinstance(budgets, Mapping) else budgets
    checked: list[dict[str, float]] = []
    for budget in map(check_budget, given):
        if budget in checked:
            raise BudgetError(f"the budget {budget} is given twice.")
        checked.append(budget)
    return checked or [{}]


def budget_key(budget: Mapping[str, float]) -> str:
    """A budget in words: ``macs<=0.5``, or ``dense`` without any bound."""
    return ",".join(f"{name}<={bound:g}" for name, bound in budget.items()) or "dense"
