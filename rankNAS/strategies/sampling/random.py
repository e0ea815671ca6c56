"""Random search: random shares of each layer's cost, scaled onto the budget; the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.history import History
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sampling.shares import within_shares

__all__ = ["Random"]


@final
@dataclass(frozen=True)
class Random(Strategy):
    """Every layer keeps a random share of its cost, all scaled together onto the budget.

    Args:
        attempts: How often a draw that was seen before is repeated, for each proposal.
    """

    attempts: int = 20
    name = "random"
    endless = True

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        found: list[Allocation] = []
        for _ in range(n * self.attempts):
            shares = rng.uniform(0.02, 1.0, len(problem.errors))
            allocation = problem.allocation(within_shares(problem, shares).tolist())
            if allocation not in history.proposed and allocation not in found:
                found.append(allocation)
            if len(found) == n:
                break
        return found
