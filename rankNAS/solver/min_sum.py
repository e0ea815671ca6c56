"""Min-sum allocation within budgets: multiple-choice knapsack (MCKP), solved to a proven gap.

Notation as in `rankNAS.solver.tables`.

References:
    Pisinger, European Journal of Operational Research 1995: the core algorithm.
    HiGHS (Huangfu and Hall, 2018), through ``scipy.optimize.milp``: the integer solver.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import eye

from rankNAS.deadline import check_time, seconds_left
from rankNAS.exceptions import BudgetError, RankNASError
from rankNAS.solver.pareto import pareto_filter
from rankNAS.solver.relaxation import Indices, joined, relaxed
from rankNAS.solver.states import best_state
from rankNAS.solver.tables import (
    SLACK,
    Array,
    Solution,
    Table,
    infeasible,
    least_cost,
    meets,
    total,
)

__all__ = ["min_sum"]

SHARPNESS = 1e3  # HiGHS meets constraints to 1e-6 in absolute terms
PRECISION = 1e4  # largest scaled value; HiGHS proves optima to 1e-6 in absolute terms
RESOLUTION = 1e-10  # of the largest value; HiGHS does not tell smaller differences from zero
NODES = 100_000  # branching nodes of a programme, divided by the number of layers
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

    The linear relaxation gives a lower bound of the optimum, the increase due to each choice, and
    with one budget an allocation. If it is not close enough, dynamic programming finds the best
    one (`rankNAS.solver.states`). Otherwise a programme of the choices with a small increase (the
    core) gives an allocation. Choices whose increase exceeds the distance of this allocation to
    the bound cannot improve it. If the core contains all other choices, its optimum is the global
    optimum. A few cores suffice.

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
    relaxation = relaxed(value, costs, limits, kept)
    least, extra = relaxation.bound, relaxation.extra
    bound = least
    resolution = RESOLUTION * max(float(np.abs(v).max()) for v in value)
    rounded = None
    if relaxation.rounded is not None:
        rounded = _solution(value, relaxation.rounded, bound, resolution)
        if rounded.gap <= gap:
            return rounded
        margin = rounded.value - gap * abs(rounded.value) - least + resolution
        states, proven = best_state(value, costs[0], limits[0], kept, extra, margin)
        if proven:
            # Whatever is not among the states is at most the gap better than the rounded one.
            found = rounded.indices if states is None else states
            return _closest(value, found, rounded, bound + margin, resolution)
    sizes = np.sort(np.concatenate(extra))
    width = float(sizes[min(CORE * len(value), len(sizes)) - 1])
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
                if rounded is not None:
                    return rounded
                limit = f"{seconds:g} seconds" if np.isfinite(seconds) else f"{nodes} nodes"
                raise RankNASError(f"the solver found no allocation in {limit}.")
            return best
        indices, lower = solved
        # A choice outside the core adds at least the core's width to the bound.
        bound = max(bound, lower if whole else min(lower, least + width))
        for known in (best, rounded):
            if known is not None and known.value <= total(value, indices):
                indices = known.indices
        best = _solution(value, indices, bound, resolution)
        needed = best.value - gap * abs(best.value) - least
        if best.gap <= gap or whole or needed <= width:
            return best
        width = needed


def _closest(
    value: Table, found: tuple[int, ...], known: Solution, bound: float, resolution: float
) -> Solution:
    """The better one of two allocations, of which the first one is optimal below a bound."""
    best = total(value, found)
    if known.value < best:
        return _solution(value, known.indices, bound, resolution)
    return _solution(value, found, min(bound, best), resolution)


def _solution(value: Table, indices: tuple[int, ...], bound: float, resolution: float) -> Solution:
    """An allocation with its distance to a lower bound of the total."""
    found = total(value, indices)
    rise = found - bound if found - bound > resolution else 0.0
    return Solution(indices, found, rise / (abs(found) or 1.0))


def _worthwhile(value: Array, costs: Sequence[Array], largest: float) -> Indices:
    """The allowed choices of a layer that are non-dominated in value and every cost."""
    allowed = np.flatnonzero(value <= largest)
    columns = [cost[allowed] for cost in costs] or [np.zeros(len(allowed))]
    kept: Indices = allowed[pareto_filter(value[allowed], columns, max(1, len(allowed)))]
    return kept


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
    objective, rows, bounds, _ = joined(value, costs, limits, kept)
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
