"""Min-sum allocation within one budget by dynamic programming over undominated states.

A state is a choice for each of the first layers. It is dropped if another one has no larger cost
and value, if the cheapest choices of the other layers exceed the budget, or if the linear
relaxation shows that it cannot lead to an allocation better than the known one: each choice raises
the bound by a known amount. Few states are left if the known allocation is close to the bound.

References:
    Dudzinski and Walukiewicz, European Journal of Operational Research 1987: the multiple-choice
    knapsack by dynamic programming with bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankNAS.deadline import check_time
from rankNAS.solver.relaxation import Indices
from rankNAS.solver.tables import SLACK, Array, Table

__all__ = ["best_state"]

MOST = 200_000  # states of a layer, times its choices, beyond which another solver is faster


def best_state(
    value: Table,
    cost: Table,
    limit: float,
    kept: Sequence[Indices],
    extra: Sequence[Array],
    margin: float,
) -> tuple[tuple[int, ...] | None, bool]:
    """The best allocation whose bound is raised by at most a margin, and whether it is proven.

    Args:
        value: The values to sum.
        cost: The costs.
        limit: Their bound.
        kept: Indices of choices, one array a layer.
        extra: The increase of the bound of the total due to each kept choice.
        margin: Allocations beyond it are of no interest.

    Returns:
        The allocation as indices of choices, None if there is none, and True; or None and False
        if there are too many states.
    """
    allowed = [np.flatnonzero(e <= margin) for e in extra]
    if not all(map(len, allowed)):
        return None, True
    least = [float(cost[i][k].min()) for i, k in enumerate(kept)]
    behind = limit * (1 + SLACK) - (np.sum(least) - np.cumsum(least))
    costs, values, raised = np.zeros(1), np.zeros(1), np.zeros(1)
    parents: list[tuple[Indices, Indices]] = []
    for i, (k, j) in enumerate(zip(kept, allowed, strict=True)):
        check_time()
        if len(costs) * len(j) > MOST:
            return None, False
        chosen = k[j]
        c, v, r = (
            np.add.outer(states, choices).ravel()
            for states, choices in (
                (costs, cost[i][chosen]),
                (values, value[i][chosen]),
                (raised, extra[i][j]),
            )
        )
        useful = np.flatnonzero((r <= margin) & (c <= behind[i]))
        useful = useful[np.lexsort((v[useful], c[useful]))]
        lowest = np.minimum.accumulate(v[useful])
        useful = useful[np.append(True, v[useful][1:] < lowest[:-1])[: len(useful)]]
        if not len(useful):
            return None, True
        costs, values, raised = c[useful], v[useful], r[useful]
        parents.append((useful // len(j), chosen[useful % len(j)]))
    state = int(np.argmin(values))
    found = []
    for before, choice in reversed(parents):
        found.append(int(choice[state]))
        state = int(before[state])
    return tuple(reversed(found)), True
