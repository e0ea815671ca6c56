"""Pareto fronts and hypervolume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["hypervolume", "non_dominated", "pareto_filter", "pareto_screen"]

Array = npt.NDArray[np.float64]


def non_dominated(values: npt.ArrayLike | Sequence[Any]) -> npt.NDArray[np.bool_]:
    """Mask of the non-dominated points; larger is better in every column.

    Args:
        values: (points, objectives).

    Returns:
        (points,), true on the front. Equal points are on it together.

    >>> non_dominated([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]]).tolist()
    [True, True, False]
    """
    v = np.asarray(values, dtype=float)
    as_good = (v[:, None, :] >= v[None, :, :]).all(2)
    better = (v[:, None, :] > v[None, :, :]).any(2)
    dominated: npt.NDArray[np.bool_] = np.any(as_good & better, axis=0)
    return ~dominated


def hypervolume(values: npt.ArrayLike | Sequence[Any], reference: npt.ArrayLike) -> float:
    """Hypervolume dominated by points above a reference point; larger is better in every column.

    Args:
        values: (points, objectives).
        reference: (objectives,); points that are not better in every objective do not count.

    >>> hypervolume([[1.0, 2.0], [2.0, 1.0]], [0.0, 0.0])
    3.0
    """
    import torch
    from botorch.utils.multi_objective.hypervolume import Hypervolume

    points = np.asarray(values, dtype=float).reshape(-1, len(np.asarray(reference)))
    floor = torch.as_tensor(np.asarray(reference, dtype=float))
    better = points[(points > floor.numpy()).all(1)]
    if len(better) == 0:
        return 0.0
    front = torch.from_numpy(better[non_dominated(better)])
    return float(Hypervolume(floor).compute(front))


def pareto_filter(errors: npt.ArrayLike, costs: Sequence[npt.ArrayLike], most: int) -> list[int]:
    """The non-dominated choices of a layer in error and every cost, cheapest first.

    Dominated choices cannot be part of an optimal allocation.

    Args:
        errors: Relative error of each choice.
        costs: One sequence per relevant cost.
        most: Largest number of choices to keep, evenly spaced in the first cost.

    >>> pareto_filter([0.0, 0.2, 0.3, 0.1], [[9, 4, 5, 6]], most=64)
    [1, 3, 0]
    """
    columns = np.stack([np.asarray(errors), *(np.asarray(c, dtype=float) for c in costs)], axis=1)
    front = np.flatnonzero(_first_of_equals(columns) & non_dominated(-columns))
    front = front[np.argsort(columns[front, 1], kind="stable")]
    if len(front) > most:
        front = front[np.linspace(0, len(front) - 1, most).round().astype(int)]
    return [int(i) for i in front]


def pareto_screen(
    errors: npt.ArrayLike, estimates: npt.ArrayLike, costs: Sequence[npt.ArrayLike]
) -> list[int]:
    """The choices with an estimated error that no choice with a known error dominates.

    Args:
        errors: Error of each choice, infinite where it is not known.
        estimates: For some choices a number that is at most the error, infinite for the others.
        costs: One sequence per relevant cost.

    >>> inf = float("inf")
    >>> pareto_screen([0.0, 0.2, inf, inf], [inf, inf, 0.3, 0.1], costs=[[9, 4, 5, 6]])
    [3]
    """
    known, guessed = (np.asarray(column, dtype=float) for column in (errors, estimates))
    rows, others = np.flatnonzero(np.isfinite(guessed)), np.flatnonzero(np.isfinite(known))
    dominates = known[others, None] <= guessed[rows]
    for cost in costs:
        column = np.asarray(cost, dtype=float)
        dominates &= column[others, None] <= column[rows]
    return [int(i) for i in rows[~dominates.any(0)]]


def _first_of_equals(columns: Array) -> npt.NDArray[np.bool_]:
    """Mask of the first row of each set of equal rows."""
    first = np.zeros(len(columns), dtype=bool)
    first[np.unique(columns, axis=0, return_index=True)[1]] = True
    return first
