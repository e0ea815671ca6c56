"""The Pareto front of the trials within a budget, and the dominating trial of each other one."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from rankNAS.solver.pareto import hypervolume
from rankNAS.strategies.history import History
from rankNAS.strategies.problem import Problem
from rankNAS.study import front

__all__ = ["describe_front"]


def describe_front(problem: Problem, history: History) -> dict[str, Any]:
    """The Pareto front of the trials that meet a problem's budgets, probes included.

    Args:
        problem: Budgets and objectives.
        history: The trials.

    Returns:
        ``feasible``, the numbers of the trials within the budgets, and ``pareto_front``, those of
        the non-dominated trials, the best in the first objective first. With several objectives
        also ``dominated_by``, for each dominated trial the first trial of the front that dominates
        it; and ``hypervolume``, the volume between the front and the point ``reference``. The
        reference is the worst value of all successful trials of the study in each objective, in
        the objective's units. Front points equal to the reference in one objective add no volume.
    """
    feasible, best = history.feasible(problem), front(problem, history)
    numbers = {"feasible": [t.number for t in feasible], "pareto_front": [t.number for t in best]}
    if len(problem.objectives) < 2 or not feasible:
        return numbers
    sign = problem.signs
    values, fronts = (sign * np.array([t.values for t in some]) for some in (feasible, best))
    reference = (sign * np.array([t.values for t in history.complete])).min(0)
    as_good = (fronts[None] >= values[:, None]).all(2)  # (feasible, front)
    better = (fronts[None] > values[:, None]).any(2)
    first = (as_good & better).argmax(1)
    with warnings.catch_warnings():
        # from the import of linear_operator, a dependency of botorch
        warnings.simplefilter("ignore", FutureWarning)
        volume = hypervolume(values, reference)
    return numbers | {
        "dominated_by": {
            str(t.number): best[i].number
            for t, i in zip(feasible, first, strict=True)
            if t.number not in numbers["pareto_front"]
        },
        "hypervolume": volume,
        "reference": (sign * reference).tolist(),
    }
