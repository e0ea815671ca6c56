"""The candidates of a super-net, and decoding of its logits to an allocation.

Notation: p_lj the probability of candidate j of layer l.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from rankNAS.allocation import Choice
from rankNAS.decompositions import LayerShape
from rankNAS.solver.min_sum import min_sum
from rankNAS.solver.pareto import pareto_filter
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem

__all__ = ["coarse", "equal_ranks", "picked"]

STEPS = 8  # candidates of a layer, if nothing else is asked for, up to its full rank
SPENT = 0.9  # of a budget, by the argmax, for that to be the answer
DECIDED = 5.0  # difference of logits that the expected costs do not undo


def coarse(
    problem: Problem,
    shapes: Mapping[str, LayerShape],
    operators: Sequence[str] | None,
    granularity: int | None = None,
) -> Problem:
    """The problem with the candidates of the super-net as its only choices.

    For each multiple r of the granularity, the offered choice nearest to (r, r); further the
    cheapest choice, so that a budget which can be met stays so. Candidates that another beats in
    error and in every budgeted cost are dropped: where a larger rank costs no more time, the
    smaller one leaves.

    Args:
        problem: Tables, and at least one budget.
        shapes: Of every layer.
        operators: In order of preference; None is ``tucker2``, ``svd``, then all others.
        granularity: In ranks; None takes an eighth of each layer's smaller side.
    """
    kept = []
    for i, (name, choices) in enumerate(problem.choices.items()):
        costs = [table[i] for table in problem.budgeted()]
        allowed = [
            j for j, c in enumerate(choices) if operators is None or c.operator in operators
        ]
        cheapest = {min(allowed, key=cost.__getitem__, default=DENSE_INDEX) for cost in costs}
        nearest = _nearest(choices, shapes[name], operators, granularity)
        rows = sorted({DENSE_INDEX} | cheapest | nearest)
        found = pareto_filter(problem.errors[i][rows], [cost[rows] for cost in costs], len(rows))
        kept.append(sorted({DENSE_INDEX, *(rows[j] for j in found)}))
    return problem.restricted(kept)


def equal_ranks(
    choices: Sequence[Choice],
    shape: LayerShape,
    operators: Sequence[str] | None,
    granularity: int | None = None,
) -> list[Choice]:
    """The choices (r, r) for the multiples r, of the first operator that a layer offers.

    Args:
        choices: Those that it offers.
        shape: Its shape.
        operators: In order of preference; as for `coarse`.
        granularity: As for `coarse`.
    """
    operator = _operator(choices, operators)
    if operator is None:
        return []
    length = next(len(c.rank) for c in choices if c.operator == operator)
    return [Choice(operator, (r,) * length) for r in _multiples(shape, granularity)]


def _operator(choices: Sequence[Choice], operators: Sequence[str] | None) -> str | None:
    offered = {c.operator for c in choices if c.rank}
    order = operators or ("tucker2", "svd", *sorted(offered))
    return next((name for name in order if name in offered), None)


def _multiples(shape: LayerShape, granularity: int | None) -> range:
    full = min(shape.outputs, shape.inputs) // shape.groups
    step = granularity or max(1, round(full / STEPS))
    return range(step, full + 1, step)


def _nearest(
    choices: Sequence[Choice],
    shape: LayerShape,
    operators: Sequence[str] | None,
    granularity: int | None,
) -> set[int]:
    """Positions of the choices nearest to (r, r) for the multiples r, of one operator."""
    operator = _operator(choices, operators)
    rows = [j for j, c in enumerate(choices) if c.operator == operator]
    if not rows:
        return set()

    def distance(j: int, r: int) -> tuple[int, int, tuple[int, ...]]:
        rank = choices[j].rank
        return max(abs(x - r) for x in rank), max(rank) - min(rank), rank

    return {min(rows, key=lambda j: distance(j, r)) for r in _multiples(shape, granularity)}


def picked(problem: Problem, logits: Sequence[Tensor], *, within: bool = True) -> tuple[int, ...]:
    """Positions of the candidates that the logits select.

    The argmax of every layer, if that spends the budget; within the budgets, the most probable
    allocation. Where a short search leaves logits soft, the argmax can cost a fraction of a tight
    budget although the expected cost is on it. Then the candidates are those whose costs are
    nearest to the layers' expected costs (`_expected`), in sum.

    Args:
        problem: Its choices are the candidates.
        logits: (J,), one a layer.
        within: Meet the budgets, exactly; otherwise take the best of every layer.

    Raises:
        BudgetError: No allocation of the candidates meets the budgets.
    """
    limits = list(problem.limits.values())
    ratios = [[c / t for c in table] for table, t in zip(problem.budgeted(), limits, strict=True)]
    values = [-torch.log_softmax(x.detach().double().cpu(), -1).numpy() for x in logits]
    likely = [int(np.argmin(value)) for value in values]
    if max(sum(c[i] for c, i in zip(table, likely, strict=True)) for table in ratios) < SPENT:
        units = [np.sum(costs, axis=0) for costs in zip(*ratios, strict=True)]
        means = _expected(values, ratios, units)
        values = [np.abs(c - mean) for c, mean in zip(units, means, strict=True)]
    if not within:
        return tuple(int(np.argmin(value)) for value in values)
    return tuple(min_sum(values, problem.budgeted(), limits, gap=0.0).indices)


def _expected(
    surprise: Sequence[Array], ratios: Sequence[Sequence[Array]], units: Sequence[Array]
) -> list[float]:
    """Each layer's expected cost, in all just within the budgets.

    It is sum_j q_lj c_lj, with q the distribution nearest to p, by its divergence from p, whose
    expected cost is the budget: q_lj ~ p_lj exp(m c_lj), m bounded.

    Args:
        surprise: -log p, (J,), one a layer.
        ratios: By budget, the costs c in units of it.
        units: The sum of these over the budgets.
    """

    def tilted(m: float) -> list[Array]:
        return [softmax(m * c - s) for c, s in zip(units, surprise, strict=True)]

    def exceeds(m: float) -> bool:
        q = tilted(m)
        totals = [sum(c @ x for c, x in zip(table, q, strict=True)) for table in ratios]
        return bool(max(totals) > 1)

    steepest = DECIDED / max(c.max() for c in units)
    low, high = -steepest, steepest
    while high - low > 1e-6 * steepest:
        middle = (low + high) / 2
        low, high = (low, middle) if exceeds(middle) else (middle, high)
    return [float(c @ q) for c, q in zip(units, tilted(low), strict=True)]
