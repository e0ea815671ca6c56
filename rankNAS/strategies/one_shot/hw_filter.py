"""Latency filter: only choices that are faster than the dense layer, then min-max allocation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.exceptions import BudgetError, UsageError
from rankNAS.strategies.one_shot.base import OneShot
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.problem import DENSE_INDEX, Problem

__all__ = ["HardwareFilter", "faster_than_dense"]


def faster_than_dense(problem: Problem, margin: float = 0.0) -> Problem:
    """The problem with only the choices that are faster than the dense layer.

    Args:
        problem: Tables; without one of ``latency`` nothing is known and nothing is removed.
        margin: How much faster, as a fraction of the dense layer's latency.

    Returns:
        The same budgets and layers; a layer without a faster choice can only stay dense.
    """
    if "latency" not in problem.costs:
        return problem
    kept = [
        [DENSE_INDEX, *np.flatnonzero(latency < (1 - margin) * latency[DENSE_INDEX]).tolist()]
        for latency in problem.costs["latency"]
    ]
    return problem.restricted(kept)


@final
@dataclass(frozen=True)
class HardwareFilter(OneShot):
    """The min-max allocation over the choices that are faster than the dense layer.

    Fewer operations are not always faster: a decomposed layer reads and writes one more tensor
    and starts one more kernel. Choices whose latency is not below the dense layer's are removed,
    whatever the budget is on; then as `energy`. The latencies are the table's, which has no
    standard deviations: what must exceed measurement noise is `margin`. On tables without
    latencies, nothing is removed.

    Args:
        margin: How much faster a choice must be, as a fraction of the dense layer's latency.

    Raises:
        UsageError: A margin outside [0, 1).
    """

    margin: float = 0.0
    name = "hw-filter"
    needs_latency = True

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise UsageError(f"`margin` must be in [0, 1), got {self.margin}.")

    def solve(self, problem: Problem) -> Allocation:
        """The exact min-max allocation of what is left.

        Raises:
            BudgetError: The layers that get faster cannot meet the budgets alone.
        """
        filtered = faster_than_dense(problem, self.margin)
        try:
            filtered.check()
            return Energy().solve(filtered)
        except BudgetError as error:
            out = [name for name, choices in filtered.choices.items() if len(choices) == 1]
            if not out:
                raise
            raise BudgetError(
                f"{error} Kept dense, because no choice lowers their latency by more than "
                f"{100 * self.margin:g} %: {', '.join(out)}. Raise the budget, lower `margin`, or "
                "use strategy 'energy'."
            ) from None
