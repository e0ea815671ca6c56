"""Strategies that propose one allocation from the tables alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.solver import min_max
from rankNAS.strategies.base import Array, History, Problem, Strategy
from rankNAS.strategies.shares import within_shares

__all__ = ["Energy", "Uniform"]


@final
@dataclass(frozen=True)
class Uniform(Strategy):
    """The same fraction of every layer: the baseline of the literature.

    Each layer takes, of all its choices within that fraction of its own cost, the most accurate;
    the fraction is the largest that meets the budgets.
    """

    name = "uniform"

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        shares: Array = np.ones(len(problem.errors))
        return _once(problem.allocation(within_shares(problem, shares).tolist()), history)


@final
@dataclass(frozen=True)
class Energy(Strategy):
    """The least possible worst relative error over the layers, solved exactly.

    The error of a layer is that of its best operator at its cost, in the chosen metric. Of the
    allocations that attain the minimum, the one of the least total error is taken. ALDS
    (Liebenwein et al., NeurIPS 2021, equation 4) poses the same problem for spectral errors and
    channel groups, and solves it by alternation.
    """

    name = "energy"

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        limits = list(problem.limits.values())
        solution = min_max(problem.errors, problem.budgeted(), limits)
        return _once(problem.allocation(solution.indices), history)


def _once(allocation: Allocation, history: History) -> list[Allocation]:
    return [] if allocation in history.proposed else [allocation]
