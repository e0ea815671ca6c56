"""Learning-compression (LC), its allocation step: Lagrangian allocation with a single multiplier.

It minimises the total energy left out plus lambda times the total cost.

Notation: energy_l(r) the energy that rank r of layer l leaves out, cost_l(r) relative to the
budget, lambda the multiplier.

References:
    Idelbayev and Carreira-Perpinan, CVPR 2020: the C step. Its two reshapings of a
    convolution, schemes 1 and 2, are the operators ``svd`` and ``spatial_svd``.
    Liebenwein et al., NeurIPS 2021, in whose code it is the baseline L-Rank: bisection on lambda.
    Everett, Operations Research 1963: what such an allocation is optimal for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from rankNAS.allocation import Allocation
from rankNAS.solver.min_sum import min_sum
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.one_shot.base import OneShot
from rankNAS.strategies.problem import Array, Problem
from rankNAS.strategies.spectra import LayerSpectra

__all__ = ["LearningCompression", "c_step"]

OCTAVES = 80.0  # lambda is looked for within a factor of 2^80 of the largest energy
BISECTIONS = 60


@final
@dataclass(frozen=True)
class LearningCompression(OneShot):
    """Per layer the minimum of lambda x cost + energy, with the least lambda within the budgets.

    This is the allocation step alone: the method alternates it with training towards the truncated
    weights, which a search of ranks does not do. With the metric ``weight`` the energies are the
    published ones. Only allocations on the lower convex hull of energy against cost can be
    reached, so some of the budget may be left over; it is never exceeded. With several budgets
    lambda multiplies the sum of the costs, each relative to its limit; where no lambda meets all
    of them, the least total energy is found by integer programming.

    Args:
        relative: Divide each layer's energy by that of the whole layer.
        operators: Whose choices are used; None for all.
        energies: By layer, the energy of the dense layer; set by `bind`, and until then 1, as if
            relative.
    """

    relative: bool = False
    operators: tuple[str, ...] | None = ("svd", "spatial_svd")
    energies: Mapping[str, float] = field(default_factory=dict, repr=False, hash=False)
    name = "lc"
    needs_spectra = ("energy",)

    def bind(self, spectra: Mapping[str, LayerSpectra]) -> Strategy:
        """The strategy with the layers' energies."""
        found = {name: own.energy for name, own in spectra.items() if own.energy is not None}
        return replace(self, energies=found)

    def solve(self, problem: Problem) -> Allocation:
        """The C step at the least lambda that the budgets allow."""
        table = problem.within(self.operators)
        left = [e * self._scale(n) for n, e in zip(table.choices, table.errors, strict=True)]
        return table.allocation(_bisected(table, left))

    def _scale(self, name: str) -> float:
        return 1.0 if self.relative or not self.energies else self.energies[name]


def c_step(left: Sequence[Array], costs: Sequence[Array], price: float) -> list[int]:
    """Per layer the choice of the least price x cost + energy left out; ties go to the cheaper.

    Args:
        left: Energy that each choice leaves out, one array a layer.
        costs: Their costs.
        price: The multiplier lambda.
    """
    pairs = zip(left, costs, strict=True)
    return [int(np.lexsort((cost, price * cost + e))[0]) for e, cost in pairs]


def _bisected(problem: Problem, left: Sequence[Array]) -> Sequence[int]:
    limits = list(problem.limits.values())
    shares = [
        [cost / limit for cost in table]
        for table, limit in zip(problem.budgeted(), limits, strict=True)
    ]
    costs = [sum((share[i] for share in shares), 0 * e) for i, e in enumerate(left)]
    best = [int(np.lexsort((e, cost))[0]) for e, cost in zip(left, costs, strict=True)]
    if not problem.meets(best):
        return min_sum(left, problem.budgeted(), limits).indices
    scale = max(float(e.max()) for e in left) or 1.0
    low, high = -OCTAVES, OCTAVES
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        indices = c_step(left, costs, scale * 2**middle)
        if problem.meets(indices):
            high, best = middle, indices
        else:
            low = middle
    return best
