"""Greedy PCA rank selection: remove the output component with the least energy per cost.

Notation: sigma_1 >= sigma_2 >= .. the eigenvalues of the covariance of a layer's outputs.

References:
    Zhang, Zou, He and Sun, TPAMI 2016: greedy selection of ranks by the energy of the outputs.
    Liebenwein et al., NeurIPS 2021, in whose code (torchprune) it is the baseline PCA: the score.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from rankNAS.allocation import Allocation, Choice
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.one_shot.base import OneShot
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem
from rankNAS.strategies.spectra import LayerSpectra

__all__ = ["PcaGreedy", "removal_scores"]


@final
@dataclass(frozen=True)
class PcaGreedy(OneShot):
    """From full rank, remove the component of the least score until the budgets are met.

    The score of a layer's last component j is (sigma_j / (sigma_1 + .. + sigma_j)) / cost of one
    rank, as in torchprune. A layer stays dense until its rank is one that the space offers, and
    between two such ranks has the lower. The covariance is that of the calibration data, or, with
    the metric ``weight``, that of white inputs. With several budgets the costs are summed relative
    to their limits; where the least ranks do not meet all of them, the min-max allocation is
    taken.

    Only ``svd`` is used: its rank is a number of output components. Before `bind`, differences of
    the relative errors stand in for the eigenvalues.

    Args:
        spectra: By layer, the eigenvalues, largest first; set by `bind`.
    """

    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False, hash=False)
    name = "pca-greedy"
    needs_spectra = ("outputs",)
    operators = ("svd",)

    def bind(self, spectra: Mapping[str, LayerSpectra]) -> Strategy:
        """The strategy with the layers' eigenvalues."""
        return replace(self, spectra={name: found.outputs for name, found in spectra.items()})

    def solve(self, problem: Problem) -> Allocation:
        """The first allocation on the greedy path that meets the budgets."""
        table = problem.within(self.operators)
        paths = [self._path(table, i) for i in range(len(table.errors))]
        queue = [(path.pop(), i) for i, path in enumerate(paths) if path]
        heapq.heapify(queue)
        indices = list(table.all_dense)
        while not table.meets(indices):
            if not queue:
                return Energy().solve(table)
            (_, choice), i = heapq.heappop(queue)
            indices[i] = choice
            if paths[i]:
                heapq.heappush(queue, (paths[i].pop(), i))
        return table.allocation(indices)

    def _path(self, table: Problem, i: int) -> list[tuple[float, int]]:
        """(score, choice it leads to) of each removal from a layer, the first one last."""
        name, choices = list(table.choices.items())[i]
        order = sorted(range(DENSE_INDEX + 1, len(choices)), key=lambda j: choices[j].rank)
        if not order or not table.limits:
            return []
        ranks = np.array([choices[j].rank[0] for j in order])
        spectrum = np.array(self.spectra.get(name) or _implied(choices, order, table.errors[i]))
        limits = table.limits.values()
        largest = sum(c[i][order[-1]] / b for c, b in zip(table.budgeted(), limits, strict=True))
        scores = removal_scores(spectrum, float(largest) / int(ranks[-1]))
        path = []
        for r in range(int(ranks[0]), len(spectrum)):  # r components are left
            offered = int(np.searchsorted(ranks, r, side="right")) - 1
            path.append((float(scores[r]), DENSE_INDEX if r > ranks[-1] else order[offered]))
        return path


def removal_scores(spectrum: Array, cost: float) -> Array:
    """Score (R,) of removing each component when all before it are kept.

    Args:
        spectrum: (R,), largest first.
        cost: Of one rank.
    """
    kept = np.cumsum(spectrum)
    share = np.divide(spectrum, kept, out=np.zeros_like(kept), where=kept > 0)
    scores: Array = share / cost
    return scores


def _implied(choices: Sequence[Choice], order: Sequence[int], errors: Array) -> list[float]:
    """Eigenvalues that would leave out these errors; dense counts as one rank beyond the last."""
    ranks = [0, *(choices[j].rank[0] for j in order)]
    kept = np.maximum.accumulate([0.0, *(1 - errors[j] for j in order)])
    full = np.interp(np.arange(ranks[-1] + 1), ranks, kept)
    return [*np.diff(full).tolist(), float(1 - full[-1])]
