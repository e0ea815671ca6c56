"""Search space and relative errors to the tables of a `Problem`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rankNAS.decompositions.shapes import COSTS, EXACT_COSTS, LAYER_COSTS
from rankNAS.exceptions import BudgetError
from rankNAS.hw_models.base import LatencyTables
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.strategies.problem import Array, Problem
from rankNAS.tasks.base import Task

__all__ = ["build_problem", "check_reachable"]

LARGE = 0.5  # share of a cost from which a part of the model is named in messages


def build_problem(
    space: SearchSpace,
    errors: Mapping[str, Sequence[float]] | None,
    budget: Mapping[str, float],
    *,
    latency: LatencyTables | None = None,
    objectives: Sequence[tuple[str, str]] = (("loss", "minimize"),),
    task: Task | None = None,
    losses: Mapping[str, Sequence[float]] | None = None,
    streamed: bool = False,
) -> Problem:
    """The tables of a space.

    Args:
        space: The space.
        errors: Relative error of each choice by layer; None (zeros) to check budgets alone.
        budget: Cost name to fraction kept.
        latency: Of the same choices; a cost of that name exists if given.
        objectives: Names and directions.
        task: Its metrics; None for those of all built-in tasks.
        losses: Absolute second-order loss of each choice by layer; None if unknown.
        streamed: Whether the factors lie in files.
    """
    costs: dict[str, tuple[Array, ...]] = {
        name: tuple(
            np.array([c[LAYER_COSTS.get(name, name)] for c in x.costs], dtype=float)
            for x in space.layers.values()
        )
        for name in EXACT_COSTS
    }
    remainder_cost = {name: float(space.remainder_cost[name]) for name in COSTS}
    remainder_cost |= dict.fromkeys(LAYER_COSTS, 0.0)
    if latency is not None:
        costs["latency"] = tuple(latency.seconds[name] for name in space.layers)
        remainder_cost["latency"] = latency.remainder_cost[0]
    zeros = {name: [0.0] * len(layer) for name, layer in space.layers.items()}
    found = {"metrics": tuple(task.directions), "divergence": task.divergence_name} if task else {}
    return Problem(
        choices={name: layer.choices for name, layer in space.layers.items()},
        errors=tuple(np.array((errors or zeros)[name]) for name in space.layers),
        costs=costs,
        remainder_cost=remainder_cost,
        budget=dict(budget),
        objectives=tuple(name for name, _ in objectives),
        directions=tuple(direction for _, direction in objectives),  # type: ignore[misc]
        losses=tuple(np.array(losses[name]) for name in space.layers) if losses else (),
        streamed=streamed,
        **found,  # type: ignore[arg-type]
    )


def check_reachable(space: SearchSpace, budgets: Sequence[Mapping[str, float]]) -> None:
    """Raise a BudgetError unless an allocation meets each budget, latency aside.

    The message names the largest part of the model that stays dense.
    """
    for budget in budgets:
        exact = {name: bound for name, bound in budget.items() if name != "latency"}
        problem = build_problem(space, None, exact)
        try:
            problem.check()
        except BudgetError as error:
            missed = [n for n, bound in exact.items() if n in COSTS and problem.least(n) > bound]
            words = "".join(_largest(space, name) for name in missed[:1])
            raise BudgetError(f"{error}{words}") from None


def _largest(space: SearchSpace, cost: str) -> str:
    """The largest part of the model that stays dense, in words."""
    part = max(space.skipped, key=lambda s: s.cost[cost], default=None)
    share = 0.0 if part is None else space.shares[part.name][cost]
    if part is None or share < LARGE:
        return ""
    return f" {100 * share:.0f} % lie in {part.name!r}, which stays dense ({part.reason})."
