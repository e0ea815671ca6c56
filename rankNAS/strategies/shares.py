"""Allocations from the share of its own cost that each layer may keep."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rankNAS.solver import SLACK, min_max
from rankNAS.strategies.base import Array, Problem

__all__ = ["within_shares"]

BISECTIONS = 50


def within_shares(problem: Problem, shares: Array) -> npt.NDArray[np.int64]:
    """The most accurate choice of each layer within a common multiple of its share.

    Args:
        problem: Tables and budgets.
        shares: (L,), positive; layer l may keep t x shares[l] of each of its budgeted costs,
            and at least its cheapest choice, with the largest t that meets the budgets.

    Returns:
        Indices (L,). If budgets pull in different directions so that no t fits, the min-max
        allocation.
    """
    low, high = 0.0, 1 / shares.min()
    best = None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        indices = _pick(problem, middle * shares)
        if problem.meets(indices.tolist()):
            low, best = middle, indices
        else:
            high = middle
    full = _pick(problem, shares / shares.min())
    if problem.meets(full.tolist()):
        return full
    if best is None:
        best = _pick(problem, 0 * shares)
        if not problem.meets(best.tolist()):
            limits = list(problem.limits.values())
            best = np.array(min_max(problem.errors, problem.budgeted(), limits).indices)
    return best


def _pick(problem: Problem, shares: Array) -> npt.NDArray[np.int64]:
    """Per layer the least error among choices within the share, else the cheapest choice."""
    picked = []
    tables = problem.budgeted()
    for i, (errors, share) in enumerate(zip(problem.errors, shares, strict=True)):
        relative = np.max([table[i] / table[i][0] for table in tables] or [0 * errors], axis=0)
        within = relative <= share * (1 + SLACK)
        picked.append(
            int(np.argmin(np.where(within, errors, np.inf)))
            if within.any()
            else int(np.argmin(relative))
        )
    return np.array(picked, dtype=np.int64)
