"""Small random search problems for tests of strategies."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

import numpy as np

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.objectives.base import Direction
from rankNAS.strategies.history import Trial
from rankNAS.strategies.problem import Problem

__all__ = ["Budgets", "random_problem", "random_trial"]

Budgets = Literal[0, 1, 2]


def random_problem(
    seed: int, *, layers: int = 5, choices: int = 8, budgets: Budgets = 1, objectives: int = 1
) -> Problem:
    """A random search problem with feasible budgets.

    Args:
        seed: Equal seeds give equal problems.
        layers: Number of layers.
        choices: Choices of each layer, including dense; some dominate others.
        budgets: 1 for a budget on ``macs``, 2 for a second one on ``params``.
        objectives: 1 for accuracy, 2 for accuracy and ``macs``.
    """
    rng = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(layers)]
    options = (DENSE, *(Choice("svd", (r,)) for r in range(choices - 1, 0, -1)))
    errors, macs, params = [], [], []
    for _ in names:
        size = rng.uniform(50, 1000)
        kept = np.sort(rng.uniform(0.03, 0.97, choices - 1))[::-1]
        wrong = rng.uniform(0.1, 1) * (1 - kept) ** rng.uniform(0.5, 4)
        wrong = wrong * rng.uniform(0.8, 1.2, choices - 1)
        errors.append(np.concatenate([[0.0], wrong.clip(1e-6, 1)]))
        macs.append(size * np.concatenate([[1.0], kept]))
        noise = rng.uniform(0.7, 1.0, choices - 1)
        params.append(rng.uniform(5, 50) * np.concatenate([[1.0], kept * noise]))
    costs = {"macs": tuple(macs), "params": tuple(params)}
    remainder_cost = {"macs": float(rng.uniform(0, 200)), "params": float(rng.uniform(0, 20))}
    problem = Problem(
        dict.fromkeys(names, options),
        tuple(errors),
        costs,
        remainder_cost,
        {},
        ("accuracy", "macs")[:objectives],
        cast("tuple[Direction, ...]", ("maximize", "minimize")[:objectives]),
    )
    met = problem.fractions([int(i) for i in rng.integers(0, choices, layers)])
    return replace(problem, budget={name: met[name] for name in ("macs", "params")[:budgets]})


def random_trial(problem: Problem, number: int, allocation: Allocation) -> Trial:
    """A trial of an allocation: accuracy falls with each layer's error, by unequal amounts."""
    indices = problem.indices(allocation)
    slopes = np.random.default_rng(0).uniform(0.1, 2, len(indices))
    degradation = sum(s * e[i] for s, e, i in zip(slopes, problem.errors, indices, strict=True))
    values = (1 - float(degradation), problem.fractions(indices)["macs"])
    return Trial(number, allocation, "complete", values[: len(problem.objectives)])
