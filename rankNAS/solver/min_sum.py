"""Min-sum allocation within budgets: multiple-choice knapsack (MCKP), solved to a proven gap.

Notation as in `rankNAS.solver.tables`.

References:
    Sinha and Zoltners, Operations Research 1979: the multiple-choice knapsack.
    Pisinger, European Journal of Operational Research 1995: the core algorithm.
    Kelley, Journal of SIAM 1960: cutting planes.
    HiGHS (Huangfu and Hall, 2018), through ``scipy.optimize.milp``: the integer solver.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix, eye

from rankNAS.deadline import check_time, seconds_left
from rankNAS.exceptions import BudgetError, RankNASError
from rankNAS.solver.pareto import pareto_filter
from rankNAS.solver.tables import (
    SLACK,
    Array,
    Solution,
    Table,
    infeasible,
    least_cost,
    least_of_each,
    meets,
    total,
)

__all__ = ["min_sum"]

Indices = npt.NDArray[np.int64]
SHARPNESS = 1e3  # HiGHS meets constraints to 1e-6 in absolute terms
PRECISION = 1e4  # largest scaled value; HiGHS proves optima to 1e-6 in absolute terms
RESOLUTION = 1e-10  # of the largest value; HiGHS does not tell smaller differences from zero
NODES = 100_000  # branching nodes of a programme, divided by the number of layers
LARGE = 20_000  # choices beyond which cutting planes are faster than the linear programme
CLOSE = 1e-7  # relative distance of the multipliers' bound to the best one
PLANES = 300  # cutting planes of the multipliers
CORE = 5  # average number of choices per layer in the first programme


def min_sum(
    value: Table,
    costs: Sequence[Table],
    limits: Sequence[float],
    *,
    largest: float = np.inf,
    gap: float = 1e-4,
    seconds: float = np.inf,
    nodes: int | None = None,
) -> Solution:
    """The allocation of least total value (MCKP), by mixed-integer programming on a core.

    The duals of the linear relaxation give a lower bound of the optimum and of the increase due to
    each choice. A programme of the choices with a small increase (the core) gives an allocation.
    Choices whose increase exceeds the distance of this allocation to the bound cannot improve it.
    If the core contains all other choices, its optimum is the global optimum. A few cores suffice.

    Args:
        value: The values to sum; finite.
        costs: One table per budget.
        limits: One bound per budget.
        largest: Choices with a greater value are excluded.
        gap: Relative optimality gap at which the solver may stop.
        seconds: Time limit; the best allocation so far is returned with its proven gap. There is
            none by default, so that the same tables always give the same allocation.
        nodes: Limit on the branching nodes of each programme, with the same effect.

    Raises:
        BudgetError: No allocation meets the budgets.
        RankNASError: No allocation was found within the limits.
        TimeLimitError: The active deadline has passed.
    """
    deadline = time.monotonic() + seconds
    nodes = nodes or 1 + NODES // max(1, len(value))
    kept = [
        _worthwhile(v, [cost[i] for cost in costs], largest) for i, v in enumerate(value)
    ]  # indices of choices, one array per layer
    if not all(map(len, kept)) or any(
        least_cost(cost) > limit * (1 + SLACK) for cost, limit in zip(costs, limits, strict=True)
    ):
        raise infeasible(costs, limits)
    least, extra = _relaxation(value, costs, limits, kept)
    bound = least
    sizes = np.sort(np.concatenate(extra))
    width = float(sizes[min(CORE * len(value), len(sizes)) - 1])
    resolution = RESOLUTION * max(float(np.abs(v).max()) for v in value)
    best = None
    while True:
        check_time()
        core = [k[e <= width] for k, e in zip(kept, extra, strict=True)]
        whole = width >= sizes[-1]
        try:
            solved = _programme(value, costs, limits, core, gap, deadline, nodes)
        except BudgetError:
            if whole:
                raise
            width = 4 * width if width > 0 else float(sizes[-1])
            continue
        if solved is None:
            if best is None:
                if not whole and np.isinf(seconds):
                    width = 4 * width if width > 0 else float(sizes[-1])
                    continue
                limit = f"{seconds:g} seconds" if np.isfinite(seconds) else f"{nodes} nodes"
                raise RankNASError(f"the solver found no allocation in {limit}.")
            return best
        indices, lower = solved
        # A choice outside the core adds at least the core's width to the bound.
        bound = max(bound, lower if whole else min(lower, least + width))
        if best is None or total(value, indices) < best.value:
            best = Solution(indices, total(value, indices), 0.0)
        rise = best.value - bound if best.value - bound > resolution else 0.0
        best = replace(best, gap=rise / (abs(best.value) or 1.0))
        needed = best.value - gap * abs(best.value) - least
        if best.gap <= gap or whole or needed <= width:
            return best
        width = needed


def _worthwhile(value: Array, costs: Sequence[Array], largest: float) -> Indices:
    """The allowed choices of a layer that are non-dominated in value and every cost."""
    allowed = np.flatnonzero(value <= largest)
    columns = [cost[allowed] for cost in costs] or [np.zeros(len(allowed))]
    kept: Indices = allowed[pareto_filter(value[allowed], columns, max(1, len(allowed)))]
    return kept


def _relaxation(
    value: Table, costs: Sequence[Table], limits: Sequence[float], kept: Sequence[Indices]
) -> tuple[float, list[Array]]:
    """A lower bound of the total (Lagrangian), and its increase for each kept choice.

    For any multipliers m >= 0, sum_l min_c (value + m cost) - m limit is a lower bound of the
    total (weak duality), so the proof is independent of the accuracy of the linear programme.
    """
    objective, rows, bounds, one = _matrices(value, costs, limits, kept)
    scale = float(np.abs(objective).max()) or 1.0
    multipliers = np.zeros(len(limits))
    if limits and len(objective) > LARGE:
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
    return bound, [p - p.min() for p in parts]


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


def _programme(
    value: Table,
    costs: Sequence[Table],
    limits: Sequence[float],
    kept: Sequence[Indices],
    gap: float,
    deadline: float,
    nodes: int,
) -> tuple[tuple[int, ...], float] | None:
    """The best allocation among the kept choices, and a lower bound; None at a limit.

    The variables are the steps from one choice of a layer to the next more expensive one. Each
    step requires the previous one, and the first is always taken. Branching on a step halves a
    layer's choices; branching on a choice excludes almost nothing if the choice is not taken.

    Raises:
        BudgetError: No allocation of the kept choices meets the budgets.
    """
    objective, rows, bounds, _ = _matrices(value, costs, limits, kept)
    N, starts = len(objective), np.cumsum([0, *(len(k) for k in kept)])[:-1]
    scale = float(np.abs(objective).max()) / PRECISION or 1.0
    inner = np.delete(np.arange(N), starts)
    previous = eye(N, format="csr")[inner - 1]
    constraints = [LinearConstraint(previous - eye(N, format="csr")[inner], 0, np.inf)]
    if limits:
        relative = SHARPNESS * _steps(rows, starts)
        constraints.append(LinearConstraint(relative, -np.inf, SHARPNESS * bounds))
    while True:
        result = milp(
            _steps(objective, starts) / scale,
            constraints=constraints,
            integrality=np.ones(N, dtype=np.int64),
            bounds=Bounds(np.isin(np.arange(N), starts).astype(float), 1),
            options={
                "mip_rel_gap": gap,
                "node_limit": nodes,
                **_time_limit(deadline),
            },
        )
        check_time()
        if result.status == 2:
            raise infeasible(costs, limits)
        if result.x is None:
            return None
        last = [int((y > 0.5).sum()) - 1 for y in np.split(result.x, starts[1:])]
        indices = tuple(int(k[j]) for k, j in zip(kept, last, strict=True))
        if meets(costs, limits, indices):
            return indices, float(result.mip_dual_bound) * scale
        # The solution violates a budget by solver tolerance: add a no-good cut.
        again = np.zeros(N)
        for i, j, k in zip(starts, last, kept, strict=True):
            again[i + j] = 1
            if j + 1 < len(k):
                again[i + j + 1] = -1
        constraints.append(LinearConstraint(again[np.newaxis], -np.inf, len(kept) - 1))


def _time_limit(deadline: float) -> dict[str, float]:
    """The solver's option for a deadline, its own or that of the search, if there is one."""
    left = min(deadline - time.monotonic(), seconds_left())
    return {} if np.isinf(left) else {"time_limit": max(0.0, left)}


def _steps(table: Array, starts: Indices) -> Array:  # (..., N) -> (..., N)
    """Difference of each choice to the previous one of its layer; the first choice's own value."""
    steps: Array = np.diff(table, axis=-1, prepend=0)
    steps[..., starts] = table[..., starts]
    return steps


def _matrices(
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
