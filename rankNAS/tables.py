"""Space and factors to tables: what a strategy and the solver see.

Choices that another one beats in error and in every cost that matters can never be part of an
optimal allocation, so they are dropped before the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rankNAS.decompositions.shapes import COSTS
from rankNAS.pareto import non_dominated
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.strategies.base import Array, Problem

__all__ = ["make_problem", "worthwhile"]


def make_problem(
    space: SearchSpace,
    errors: Mapping[str, Sequence[float]] | None,
    budget: Mapping[str, float],
    *,
    latency: Mapping[str, Sequence[float]] | None = None,
    objectives: Sequence[tuple[str, str]] = (("accuracy", "maximize"),),
) -> Problem:
    """The tables of a space.

    Args:
        space: The space.
        errors: Relative error of each choice by layer; None (zeros) to check budgets alone.
        budget: Cost name to fraction kept.
        latency: Seconds of each choice by layer; a cost of that name exists if given.
        objectives: Names and directions.
    """
    costs: dict[str, tuple[Array, ...]] = {
        name: tuple(
            np.array([c[name] for c in x.costs], dtype=float) for x in space.layers.values()
        )
        for name in COSTS
    }
    rest = {name: float(space.rest[name]) for name in COSTS}
    if latency is not None:
        costs["latency"] = tuple(np.array(latency[name]) for name in space.layers)
        rest["latency"] = 0.0
    zeros = {name: [0.0] * len(layer) for name, layer in space.layers.items()}
    return Problem(
        choices={name: layer.choices for name, layer in space.layers.items()},
        errors=tuple(np.array((errors or zeros)[name]) for name in space.layers),
        costs=costs,
        rest=rest,
        budget=dict(budget),
        objectives=tuple(name for name, _ in objectives),
        directions=tuple(direction for _, direction in objectives),  # type: ignore[misc]
    )


def worthwhile(errors: Sequence[float], costs: Sequence[Sequence[float]], most: int) -> list[int]:
    """The choices of a layer that no other beats in error and in every cost, cheapest first.

    Args:
        errors: Relative error of each choice.
        costs: One sequence a cost that matters.
        most: Keep at most this many, evenly spaced in the first cost.

    >>> worthwhile([0.0, 0.2, 0.3, 0.1], [[9, 4, 5, 6]], most=64)
    [1, 3, 0]
    """
    columns = np.stack([np.asarray(errors), *(np.asarray(c, dtype=float) for c in costs)], axis=1)
    front = np.flatnonzero(_first_of_equals(columns) & non_dominated(-columns))
    front = front[np.argsort(columns[front, 1], kind="stable")]
    if len(front) > most:
        front = front[np.linspace(0, len(front) - 1, most).round().astype(int)]
    return [int(i) for i in front]


def _first_of_equals(columns: Array) -> npt.NDArray[np.bool_]:
    """True for the first of each set of equal rows."""
    first = np.zeros(len(columns), dtype=bool)
    first[np.unique(columns, axis=0, return_index=True)[1]] = True
    return first
