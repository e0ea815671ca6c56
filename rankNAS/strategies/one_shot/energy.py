"""Min-max allocation: the least worst relative error over the layers, solved exactly.

References:
    Liebenwein et al., NeurIPS 2021 (ALDS), equation 4: the same problem for spectral errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from rankNAS.allocation import Allocation
from rankNAS.solver.min_max import min_max
from rankNAS.strategies.one_shot.base import OneShot
from rankNAS.strategies.problem import Problem

__all__ = ["Energy"]


@final
@dataclass(frozen=True)
class Energy(OneShot):
    """The least possible worst relative error over the layers, solved exactly.

    The error of a layer is that of its best operator at its cost, in the chosen metric. Of the
    allocations that attain the minimum, the one of the least total error is taken. ALDS
    (Liebenwein et al., NeurIPS 2021, equation 4) poses the same problem for spectral errors and
    channel groups, and solves it by alternation.
    """

    name = "energy"

    def solve(self, problem: Problem) -> Allocation:
        """The exact min-max allocation."""
        limits = list(problem.limits.values())
        return problem.allocation(min_max(problem.errors, problem.budgeted(), limits).indices)
