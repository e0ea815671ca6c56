"""Uniform allocation: the same fraction of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.strategies.one_shot.base import OneShot
from rankNAS.strategies.problem import Array, Problem
from rankNAS.strategies.sampling.shares import within_shares

__all__ = ["Uniform"]


@final
@dataclass(frozen=True)
class Uniform(OneShot):
    """The same fraction of every layer: the baseline of the literature.

    Each layer takes, of all its choices within that fraction of its own cost, the most accurate;
    the fraction is the largest that meets the budgets.
    """

    name = "uniform"

    def solve(self, problem: Problem) -> Allocation:
        """The largest common share."""
        shares: Array = np.ones(len(problem.errors))
        return problem.allocation(within_shares(problem, shares).tolist())
