"""The linear relaxation of min-sum allocation: a bound, the price of each choice, an allocation.

For any multipliers m >= 0, sum_l min_c (value + m cost) - m limit is a lower bound of the total
(weak duality). The best multipliers are those of the linear programme. With one budget they follow
from the lower convex hulls of the layers: their steps, taken in the order of what they save for
what they cost, meet the budget within one step.

Notation as in `rankNAS.solver.tables`.

References:
    Sinha and Zoltners, Operations Research 1979: the relaxation of the multiple-choice knapsack.
    Kelley, Journal of SIAM 1960: cutting planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from rankNAS.deadline import check_time
from rankNAS.solver.tables import SLACK, Array, Table, least_of_each, meets, total

__all__ = ["Indices", "Relaxation", "joined", "relaxed"]

Indices = npt.NDArray[np.int64]
LARGE = 20_000  # choices beyond which cutting planes are faster than the linear programme
CLOSE = 1e-7  # relative distance of the multipliers' bound to the best one
PLANES = 300  # cutting planes of the multipliers


@dataclass(frozen=True)
class Relaxation:
    """A lower bound of the total, and how each choice raises it.

    Args:
        bound: The bound.
        extra: The increase due to each kept choice, one array a layer.
        rounded: An allocation within the budgets, as indices of choices; None if none is known.
    """

    bound: float
    extra: list[Array]
    rounded: tuple[int, ...] | None = None


def relaxed(
    value: Table, costs: Sequence[Table], limits: Sequence[float], kept: Sequence[Indices]
) -> Relaxation:
    """The relaxation over the kept choices, which meet the budgets.

    Its proof is independent of the accuracy of the multipliers.

    Args:
        value: The values to sum.
        costs: One table per budget.
        limits: One bound per budget.
        kept: Indices of choices, one array a layer; with one budget, the cheapest choice first and
            each further one of less value.
    """
    objective, rows, bounds, one = joined(value, costs, limits, kept)
    scale = float(np.abs(objective).max()) or 1.0
    multipliers, rounded = np.zeros(len(limits)), None
    if len(limits) == 1:
        steps = _steps_of_hulls([value[i][k] for i, k in enumerate(kept)], rows[0])
        multipliers[0], taken = _filled(steps, rows[0], bounds[0], kept)
        indices = tuple(int(k[j]) for k, j in zip(kept, taken, strict=True))
        if meets(costs, limits, indices):
            rounded = _improved(value, costs[0], limits[0], kept, indices)
    elif limits and len(objective) > LARGE:
        multipliers = _multipliers(objective, rows, bounds, kept)
    elif limits and np.ptp(objective) > 0:
        result = linprog(
            objective / scale, A_ub=rows, b_ub=bounds, A_eq=one, b_eq=np.ones(len(kept))
        )
        if result.status == 0:
            multipliers = np.maximum(-result.ineqlin.marginals, 0) * scale
    priced = objective + multipliers @ rows
    parts = np.split(priced, np.cumsum([len(k) for k in kept])[:-1])
    bound = float(sum(p.min() for p in parts) - multipliers @ bounds)
    return Relaxation(bound, [p - p.min() for p in parts], rounded)


def _steps_of_hulls(values: Sequence[Array], row: Array) -> list[tuple[float, int, int, int]]:
    """Saved value per cost, layer, from and to of the steps of all lower hulls, best first."""
    steps, start = [], 0
    for layer, v in enumerate(values):
        c = row[start : start + len(v)]
        start += len(v)
        hull = _hull(c, v)
        steps += [
            (float((v[a] - v[b]) / (c[b] - c[a])), layer, a, b)
            for a, b in zip(hull, hull[1:], strict=False)
        ]
    return sorted(steps, key=lambda step: -step[0])


def _hull(c: Array, v: Array) -> list[int]:
    """The positions of the lower convex hull of points with growing c and falling v."""
    hull: list[int] = []
    for j in range(len(c)):
        while hull and c[j] <= c[hull[-1]]:  # of equal cost, the later one has less value
            hull.pop()
        while len(hull) > 1:
            a, b = hull[-2:]
            if (v[a] - v[b]) * (c[j] - c[b]) > (v[b] - v[j]) * (c[b] - c[a]):
                break
            hull.pop()
        hull.append(j)
    return hull


def _filled(
    steps: Sequence[tuple[float, int, int, int]],
    row: Array,
    bound: float,
    kept: Sequence[Indices],
) -> tuple[float, list[int]]:
    """The multiplier of the budget, and the positions after all steps that fit into it."""
    starts = np.cumsum([0, *(len(k) for k in kept)])
    taken = [0] * len(kept)
    left, multiplier = bound - float(row[starts[:-1]].sum()), 0.0
    for slope, layer, a, b in steps:
        more = float(row[starts[layer] + b] - row[starts[layer] + a])
        if more > left:
            multiplier = multiplier or slope
        elif taken[layer] == a:
            left -= more
            taken[layer] = b
    return multiplier, taken


def _improved(
    value: Table, cost: Table, limit: float, kept: Sequence[Indices], indices: tuple[int, ...]
) -> tuple[int, ...]:
    """The allocation after changes of single layers, the one that saves most first."""
    found = list(indices)
    while True:
        left = limit - total(cost, found)
        best, change = 0.0, None
        for i, k in enumerate(kept):
            saved = np.where(
                cost[i][k] - cost[i][found[i]] <= left, value[i][found[i]] - value[i][k], 0.0
            )
            j = int(np.argmax(saved))
            if saved[j] > best:
                best, change = float(saved[j]), (i, int(k[j]))
        if change is None:
            return tuple(found)
        found[change[0]] = change[1]


def _multipliers(objective: Array, rows: Array, bounds: Array, kept: Sequence[Indices]) -> Array:
    """Multipliers (K,) that nearly maximise the Lagrangian bound, by cutting planes."""
    starts = np.cumsum([0, *(len(k) for k in kept)])[:-1]
    K = len(bounds)
    spread = np.maximum.reduceat(objective, starts) - np.minimum.reduceat(objective, starts)
    scale = box = float(spread.sum()) or 1.0
    m = best = np.zeros(K)
    most, planes, heights = -np.inf, list[Array](), list[float]()
    for _ in range(PLANES):
        check_time()
        priced = objective + m @ rows
        chosen = least_of_each(priced, starts)
        excess, height = rows[:, chosen].sum(1) - bounds, float(objective[chosen].sum())
        if (found := height + float(m @ excess)) > most:
            most, best = found, m
        planes.append(np.append(-excess, 1.0))
        heights.append(height / scale)
        result = linprog(
            np.append(np.zeros(K), -1.0),
            A_ub=np.array(planes),
            b_ub=np.array(heights),
            bounds=[(0, box / scale)] * K + [(None, None)],
        )
        if result.status != 0:
            break
        m = np.maximum(result.x[:K], 0) * scale
        if m.max() >= box * (1 - SLACK):
            box *= 10
        elif -result.fun * scale - most <= CLOSE * (abs(most) or 1.0):
            break
    return best


def joined(
    value: Table, costs: Sequence[Table], limits: Sequence[float], kept: Sequence[Indices]
) -> tuple[Array, Array, Array, csr_matrix]:
    """Values (N,), costs (K, N) relative to the limits, bounds (K,), and one choice a layer."""

    def flat(table: Table) -> Array:
        joined: Array = np.concatenate([t[k] for t, k in zip(table, kept, strict=True)])
        return joined

    layer = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    one = csr_matrix((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    units = [limit if limit > 0 else 1.0 for limit in limits]
    rows = [flat(cost) / unit for cost, unit in zip(costs, units, strict=True)]
    bounds = np.array([limit / unit for limit, unit in zip(limits, units, strict=True)])
    return flat(value), np.reshape(rows, (len(limits), len(layer))), bounds, one
