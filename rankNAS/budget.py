"""Budgets: upper bounds on costs, each as a fraction of the dense model's cost.

``layer_macs`` and ``layer_params`` count the decomposable layers alone, as many papers do; the
other costs are those of the whole model.
"""

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

BUDGET_COSTS = ("macs", "params", "weight_bytes", "layer_macs", "layer_params", "latency")


def parse_budget(items: Iterable[str], cost: str = "macs") -> dict[str, float]:
    """The budget from its command-line form.

    Args:
        items: Each item is a fraction, which bounds `cost`, or ``COST=FRACTION``.
        cost: The cost that a bare fraction bounds.

    Raises:
        BudgetError: A fraction is not a number or not in (0, 1], or a cost is given twice.
        UnknownNameError: There is no such cost.

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
    """Several budgets from their command-line form; each one has its own solution.

    Args:
        items: As for `parse_budget`, with lists of fractions: ``0.5,0.3`` are two budgets. Items
            with several fractions must have equal numbers of them; a single fraction applies to
            every budget.
        cost: The cost that a bare fraction bounds.

    Raises:
        BudgetError: As for `parse_budget`, or lists have different lengths.
        UnknownNameError: There is no such cost.

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
        BudgetError: A fraction is outside (0, 1].
        UnknownNameError: There is no such cost.
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
    """One or several budgets as a list; no budget gives one empty budget.

    Raises:
        BudgetError: As for `check_budget`, or a budget is given twice.
        UnknownNameError: There is no such cost.
    """
    given = [budgets or {}] if budgets is None or isinstance(budgets, Mapping) else budgets
    checked: list[dict[str, float]] = []
    for budget in map(check_budget, given):
        if budget in checked:
            raise BudgetError(f"the budget {budget} is given twice.")
        checked.append(budget)
    return checked or [{}]


def budget_key(budget: Mapping[str, float]) -> str:
    """A budget as text: ``macs<=0.5``, or ``dense`` without any bound."""
    return ",".join(f"{name}<={bound:g}" for name, bound in budget.items()) or "dense"
