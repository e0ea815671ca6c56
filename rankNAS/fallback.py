"""The uniform answer of a search whose time limit ends before any trial has finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.deadline import limited_by
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.exceptions import BudgetError
from rankNAS.hw_models import LatencyTables
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.strategies.history import Trial
from rankNAS.strategies.one_shot.uniform import Uniform
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.tables import build_problem

__all__ = ["UNNUMBERED", "sparse_space", "uniform_space", "uniform_trial"]

#: The number of a trial that is not in the study's record.
UNNUMBERED = -1
#: Of several operators a layer takes the first that it offers: one rank then decides its cost.
PREFERRED = ("spatial_svd", "svd", "group_svd", "tucker2")
FEW = 5  # choices of a layer whose latency is measured although the time has ended


def uniform_space(
    space: SearchSpace,
    budgets: Sequence[Mapping[str, float]],
    latency: LatencyTables | None = None,
) -> SearchSpace:
    """The space with only the choices of the uniform answers, which follow from costs alone.

    Args:
        space: The space, before any layer is factorised.
        budgets: One for each answer.
        latency: Of the same choices, if it is known.

    Raises:
        BudgetError: No allocation meets a budget.
    """
    kept: dict[str, set[Choice]] = {name: {DENSE} for name in space.layers}
    with limited_by(None):  # an answer needs it
        for budget in budgets:
            for name, choice in _by_costs(space, budget, latency).items():
                kept[name].add(choice)
    return space.restrict({name: list(choices) for name, choices in kept.items()})


def sparse_space(space: SearchSpace, start: Sequence[Allocation] = ()) -> SearchSpace:
    """The space with a few choices of each layer, whose latency takes little time to measure.

    Args:
        space: The space.
        start: Allocations whose choices are kept.
    """
    kept = {}
    for name, layer in space.layers.items():
        ordered = sorted(_of_one_operator(layer), key=lambda c: layer[c].macs)
        spread = np.linspace(0, len(ordered) - 1, min(FEW, len(ordered))).round().astype(int)
        found = {DENSE, *(ordered[i] for i in spread), *(a[name] for a in start)}
        for cost in ("macs", "params"):  # perhaps of another operator
            found.add(layer.choices[int(np.argmin([c[cost] for c in layer.costs]))])
        kept[name] = [choice for choice in layer.choices if choice in found]
    return space.restrict(kept)


def _by_costs(
    space: SearchSpace, budget: Mapping[str, float], latency: LatencyTables | None
) -> Allocation:
    """The uniform answer where no error is known: the most costly choice within each share."""
    preferred = {name: _of_one_operator(layer) for name, layer in space.layers.items()}
    for choices in (preferred, {name: layer.choices for name, layer in space.layers.items()}):
        few = space.restrict(choices)
        table = None if latency is None else latency.restrict(choices)
        problem = build_problem(few, None, budget, latency=table)
        names = list(budget) or ["macs"]
        costs = [[c / c[0] for c in problem.costs[name]] for name in names]
        errors = [1 - np.max(layer, axis=0) for layer in zip(*costs, strict=True)]
        for error in errors:
            error[0] = 0.0  # dense
        guessed = replace(problem, errors=tuple(errors))
        try:
            guessed.check()
            return Uniform().solve(guessed)
        except BudgetError:
            if choices is not preferred:
                raise
    raise AssertionError


def _of_one_operator(layer: Layer) -> tuple[Choice, ...]:
    offered = {choice.operator for choice in layer.choices}
    operator = next((name for name in PREFERRED if name in offered), None)
    return tuple(c for c in layer.choices if operator is None or c.operator in (operator, "dense"))


def uniform_trial(problem: Problem, evaluator: Evaluator) -> Trial:
    """The uniform answer of a problem as a trial; it is not in the study's record.

    It is measured as its network is built for a user, without a training.
    """
    allocation = Uniform().solve(problem)
    metrics = evaluator.evaluate(allocation)
    values = tuple(metrics[name] for name in problem.objectives)
    return Trial(
        UNNUMBERED, allocation, "complete", values, metrics, budget_key=problem.budget_key
    )
