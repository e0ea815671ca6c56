"""Decoding of preferences: continuous layer multipliers to allocations on the budget.

A preference is one positive multiplier per layer. Its allocation minimises the worst
multiplier x error within the budgets, and then spends what is left on the layers that are worst
off. With one budget this is exact; with several, each preference also draws a weighting of the
costs, and only allocations that meet every budget are returned.

An additive decoding minimises the sum of multiplier x error instead, by one Lagrange multiplier on
the cost: each layer takes the choice at which a further saving does more harm than that. The same
bisection does it, with the harm of a choice per cost that it saves in place of its error.

Notation: P preferences, L layers, C the largest number of choices, K budgets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rankNAS.exceptions import BudgetError
from rankNAS.solver.min_max import min_max
from rankNAS.solver.min_sum import min_sum
from rankNAS.solver.tables import SLACK
from rankNAS.strategies.problem import DENSE_INDEX, Problem

__all__ = [
    "additive_preference",
    "decode",
    "decode_best",
    "lowered",
    "lowered_by",
    "preference",
]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
BISECTIONS = 60


@dataclass(frozen=True)
class _Front:
    """Per layer the choices that are not dominated, from expensive to cheap, padded to C.

    Args:
        errors: (L, C), increasing along C; padding is infinite. For an additive decoding, the
            slopes of the lower convex hull: the rise of the error per cost saved by each step.
        costs: (K, L, C), relative to the limits.
        order: (L, C), the choice in the problem's tables.
        last: (L,), the position of the cheapest choice.
    """

    errors: Array
    costs: Array
    order: Indices
    last: Indices


def decode(
    problem: Problem, multipliers: Array, rng: np.random.Generator, *, additive: bool = False
) -> Indices:
    """Allocations for preferences.

    Args:
        problem: Tables and budgets; without budgets everything is dense.
        multipliers: (P, L), positive.
        rng: Draws the weightings of several budgets.
        additive: Minimise the sum of multiplier x error, in place of the largest one.

    Returns:
        Indices (at most P, L), one row per preference that can be met; never empty.
    """
    K = len(problem.limits)
    if K == 0:
        return np.full((len(multipliers), len(problem.errors)), DENSE_INDEX)
    if K == 1:
        return _decode(_front(problem, np.ones(1), additive), multipliers)
    weightings = [*np.eye(K), np.full(K, 1 / K), *rng.dirichlet(np.ones(K), 4)]
    parts = np.array_split(multipliers, len(weightings))
    found = [
        _decode(_front(problem, w, additive), part)
        for w, part in zip(weightings, parts, strict=True)
        if len(part)
    ]
    rows = np.concatenate(found)
    return rows if len(rows) else _exact(problem, multipliers[:1], additive)


def decode_best(problem: Problem, multipliers: Array) -> Indices | None:  # (L,) -> (L,)
    """The allocation of one preference: with several budgets, the best over weightings of them.

    A function of its arguments alone. None if the budgets cannot be met.
    """
    count = len(problem.limits) + 5 if len(problem.limits) > 1 else 1  # as many as weightings
    try:
        rows = decode(problem, np.tile(multipliers, (count, 1)), np.random.default_rng(0))
    except BudgetError:
        return None
    errors = [e[rows[:, i]] for i, e in enumerate(problem.errors)]
    weighted = np.stack(errors, axis=1) * multipliers
    for best in np.lexsort((weighted.sum(1), weighted.max(1))):
        row: Indices = rows[best]
        if problem.meets(row.tolist()):
            return row
    return None


def lowered(problem: Problem, share: float) -> Problem:
    """The problem with a smaller budget on the cost that is an objective, the first if several.

    Args:
        problem: Tables and budgets; the cost need not be budgeted.
        share: 1 keeps the budget, 0 leaves the least possible; in between on a logarithmic scale.
    """
    name, least, most = _traded(problem)
    return replace(problem, budget={**problem.budget, name: least ** (1 - share) * most**share})


def lowered_by(problem: Problem, indices: Indices) -> float:
    """The share at which `lowered` leaves just what an allocation costs."""
    name, least, most = _traded(problem)
    if most <= least:
        return 1.0
    kept = problem.fractions(indices.tolist())[name]
    return float(np.clip(np.log(kept / least) / np.log(most / least), 0, 1))


def _traded(problem: Problem) -> tuple[str, float, float]:
    """A cost that is an objective, and the least and the largest fraction that may be kept."""
    name = next(name for name in problem.objectives if name in problem.costs)
    least = problem.least(name)
    return name, least, max(least, problem.budget.get(name, 1.0))


def preference(problem: Problem, indices: Indices) -> Array:  # (P, L) -> (P, L)
    """Multipliers under which an allocation is worst everywhere alike: one over its errors."""
    errors = np.stack([e[indices[:, i]] for i, e in enumerate(problem.errors)], axis=1)  # (P, L)
    smallest = np.array([e[e > 0].min() if (e > 0).any() else 1.0 for e in problem.errors])
    return 1 / np.maximum(errors, 0.5 * smallest)


def additive_preference(problem: Problem, indices: Indices) -> Array:  # (P, L) -> (P, L)
    """Multipliers under which additive decoding gives about these allocations.

    One over the slope at each layer's choice: the geometric mean of those on either side.
    """
    K = len(problem.limits)
    front = _front(problem, np.full(K, 1 / max(K, 1)), True)
    found = np.ones(indices.shape)
    for i, errors in enumerate(problem.errors):
        last = front.last[i]
        if last > 0:
            hull = errors[front.order[i, : last + 1]]
            at = np.abs(errors[indices[:, i], np.newaxis] - hull).argmin(1)  # (P,)
            slopes = np.append(front.errors[i, 1 : last + 1], 2 * front.errors[i, last])
            below = np.append(slopes[0] / 2, slopes[:-1])
            found[:, i] = 1 / np.sqrt(slopes[at] * below[at])
    return found


def _front(problem: Problem, weighting: Array, additive: bool = False) -> _Front:
    limits = np.array(list(problem.limits.values()))
    rows = []
    for i, errors in enumerate(problem.errors):
        costs = np.stack([table[i] for table in problem.budgeted()]) / limits[:, None]
        cost = weighting @ costs
        keep = _non_dominated(errors, cost)
        if additive:
            keep, errors = _hull(errors, cost, keep)
        rows.append((errors, costs, keep))
    L, C, K = len(rows), max(len(keep) for *_, keep in rows), len(limits)
    front = _Front(
        np.full((L, C), np.inf),
        np.zeros((K, L, C)),
        np.zeros((L, C), dtype=np.int64),
        np.array([len(keep) - 1 for *_, keep in rows]),
    )
    for i, (errors, costs, keep) in enumerate(rows):
        front.errors[i, : len(keep)] = errors[keep]
        front.costs[:, i, : len(keep)] = costs[:, keep]
        front.order[i, : len(keep)] = keep
    return front


def _non_dominated(errors: Array, cost: Array) -> Indices:
    """Choices that no other beats in both, from expensive and exact to cheap."""
    order = np.lexsort((errors, cost))
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], errors[order]]))[:-1]
    kept: Indices = order[errors[order] < lowest][::-1].copy()
    return kept


def _hull(errors: Array, cost: Array, keep: Indices) -> tuple[Indices, Array]:
    """The choices on the lower convex hull, and by choice the slope of the step to it."""
    hull: list[int] = []
    for j in keep.tolist():
        while len(hull) > 1 and _slope(errors, cost, hull[-1], j) <= _slope(
            errors, cost, hull[-2], hull[-1]
        ):
            hull.pop()
        hull.append(j)
    slopes = np.zeros(len(errors))
    for before, after in pairwise(hull):
        slopes[after] = _slope(errors, cost, before, after)
    return np.array(hull, dtype=np.int64), slopes


def _slope(errors: Array, cost: Array, before: int, after: int) -> float:
    return float((errors[after] - errors[before]) / (cost[before] - cost[after]))


def _decode(front: _Front, multipliers: Array) -> Indices:
    """Bisection on the worst weighted error, then upgrades of the worst layers that fit."""
    weighted = multipliers[:, :, None] * front.errors  # (P, L, C)
    finite = np.where(np.isfinite(weighted), weighted, 0)
    low, high = np.zeros(len(weighted)), finite.max((1, 2)) * (1 + 1e-12)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = _fits(front, _at_most(front, weighted, middle))
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    positions = _at_most(front, weighted, high)
    feasible = _fits(front, positions)
    positions = _spend(front, weighted[feasible], positions[feasible])
    return np.take_along_axis(front.order, positions.T, 1).T


def _at_most(front: _Front, weighted: Array, threshold: Array) -> Indices:
    """Position (P, L) of the cheapest choice whose weighted error is at most the threshold."""
    below = (weighted <= threshold[:, None, None]).sum(2) - 1
    positions: Indices = np.clip(below, 0, front.last)
    return positions


def _cost(front: _Front, positions: Indices) -> Array:  # (P, L) -> (K, P)
    layers = np.arange(positions.shape[1])
    total: Array = front.costs[:, layers, positions].sum(2)
    return total


def _fits(front: _Front, positions: Indices) -> npt.NDArray[np.bool_]:
    fits: npt.NDArray[np.bool_] = np.all(_cost(front, positions) <= 1 + SLACK, axis=0)
    return fits


def _spend(front: _Front, weighted: Array, positions: Indices) -> Indices:
    """Upgrade, one layer at a time and the worst first, while anything fits."""
    P, L = positions.shape
    layers, rows = np.arange(L), np.arange(P)
    while P:
        better = np.maximum(positions - 1, 0)
        extra = front.costs[:, layers, better] - front.costs[:, layers, positions]  # (K, P, L)
        room = 1 + SLACK - _cost(front, positions)
        fits = (extra <= room[:, :, None]).all(0) & (positions > 0)
        if not fits.any():
            break
        now = np.where(fits, np.take_along_axis(weighted, positions[:, :, None], 2)[:, :, 0], -1)
        worst = now.argmax(1)
        positions[rows, worst] -= fits[rows, worst]
    return positions


def _exact(problem: Problem, multipliers: Array, additive: bool) -> Indices:
    """One preference by integer programming: the fallback when no weighting of costs works."""
    value = [w * e for w, e in zip(multipliers[0], problem.errors, strict=True)]
    solve = min_sum if additive else min_max
    solution = solve(value, problem.budgeted(), list(problem.limits.values()))
    return np.array([solution.indices], dtype=np.int64)
