"""Decoding of cost shares: per layer, the most accurate choice within its share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rankNAS.solver.min_max import min_max
from rankNAS.solver.tables import SLACK
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem

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
    tables = _padded(problem)
    low, high = 0.0, 1 / shares.min()
    best = None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        indices = _pick(tables, middle * shares)
        if problem.meets(indices.tolist()):
            low, best = middle, indices
        else:
            high = middle
    full = _pick(tables, shares / shares.min())
    if problem.meets(full.tolist()):
        return full
    if best is None:
        best = _pick(tables, 0 * shares)
        if not problem.meets(best.tolist()):
            limits = list(problem.limits.values())
            best = np.array(min_max(problem.errors, problem.budgeted(), limits).indices)
    return best


def _padded(problem: Problem) -> tuple[Array, Array]:
    """Errors and largest relative budgeted costs, each (L, most choices), infinite beyond."""
    errors = np.full((len(problem.errors), max(map(len, problem.errors))), np.inf)
    relative = errors.copy()
    tables = problem.budgeted()
    for i, row in enumerate(problem.errors):
        errors[i, : len(row)] = row
        parts = [table[i] / table[i][DENSE_INDEX] for table in tables] or [0 * row]
        relative[i, : len(row)] = np.max(parts, axis=0)
    return errors, relative


def _pick(tables: tuple[Array, Array], shares: Array) -> npt.NDArray[np.int64]:
    """Per layer the least error among choices within the share, else the cheapest choice."""
    errors, relative = tables
    within = relative <= shares[:, np.newaxis] * (1 + SLACK)
    best = np.where(within, errors, np.inf).argmin(1)
    picked: npt.NDArray[np.int64] = np.where(within.any(1), best, relative.argmin(1))
    return picked
