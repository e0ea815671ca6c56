"""DRONE rank selection: the smallest ranks within an equal loss increase per layer.

It minimises the largest loss increase that one layer causes alone. This is a reconstruction: the
closed form for one layer is in `rankNAS.decompositions`; the search of ranks is rebuilt from
descriptions of the paper.

References:
    Chen, Yu, Dhillon and Hsieh, NeurIPS 2021: data-aware low-rank compression (DRONE).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import numpy as np
from scipy.optimize import isotonic_regression

from rankNAS.allocation import DENSE, Allocation
from rankNAS.exceptions import UsageError
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem

__all__ = ["Drone"]

TIE = 1e-3  # of the largest loss: noise may make measured losses flat, more error is still worse


@final
@dataclass(frozen=True)
class Drone(Strategy):
    """The smallest ranks whose measured loss increases stay within an equal share each.

    Reconstruction of DRONE's rank selection, which grants each layer a share of an allowed loss
    and takes the smallest rank within it. Here the rise of each layer alone is measured at a few
    choices (`probes`) and interpolated, increasing in the layer's data-aware error, so the order
    in which layers are taken does not matter. The common share is the least that meets the
    budgets, found exactly; what is left over goes where the total rise falls most.

    The rise is that of the metric ``loss`` or, where it is not measured, of the first objective.
    Until every layer has been measured, its relative errors stand in.

    Args:
        levels: Measurements a layer.
        operators: Whose choices are used; None for all.

    Raises:
        UsageError: `levels` below one.
    """

    levels: int = 4
    operators: tuple[str, ...] | None = ("svd",)
    name = "drone"

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise UsageError(f"`levels` must be at least 1, got {self.levels}.")

    def probes(self, problem: Problem, history: History) -> list[Allocation]:
        """The dense model, and each layer alone at a few choices over its range of errors."""
        table = problem.within(self.operators)
        rows = [table.all_dense]
        for i, errors in enumerate(table.errors):
            rows += [table.alone(i, j) for j in self._spread(errors)]
        return [table.allocation(row) for row in sorted(rows)]

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """The least common rise; where a cost is an objective, for a sweep of budgets."""
        table = problem.within(self.operators)
        rises = _rises(problem, table, history)
        return Energy().propose(replace(table, errors=rises), history, n, rng)

    def _spread(self, errors: Array) -> list[int]:
        """Choices at about evenly spaced roots of the error; the largest error is among them."""
        if len(errors) == 1:
            return []
        first = DENSE_INDEX + 1
        roots = np.sqrt(errors[first:])
        wanted = roots.max() * np.arange(1, self.levels + 1) / self.levels
        return sorted({first + int(np.abs(roots - w).argmin()) for w in wanted})


def _rises(problem: Problem, table: Problem, history: History) -> tuple[Array, ...]:
    """Rise of the loss of each choice of `table`; the errors, where measurements are missing."""
    dense = history.found.get(problem.allocation(problem.all_dense))
    if dense is None or dense.state == "failed":
        return table.errors
    points = _alone(problem, dense, history)
    if any(len(e) > 1 and not found for e, found in zip(table.errors, points, strict=True)):
        return table.errors
    rises = []
    for errors, found in zip(table.errors, points, strict=True):
        x, y = np.array(sorted([(0.0, 0.0), *found])).T
        rise = np.interp(errors, x, isotonic_regression(y).x.clip(0))
        rise[DENSE_INDEX] = 0.0  # dense itself, whatever the noise
        rises.append(rise)
    scale = max(float(rise.max()) for rise in rises) or 1.0
    return tuple(r + TIE * scale * e for r, e in zip(rises, table.errors, strict=True))


def _alone(problem: Problem, dense: Trial, history: History) -> list[list[tuple[float, float]]]:
    """Per layer, (error, rise of the loss) of the trials in which it alone is not dense."""
    points: list[list[tuple[float, float]]] = [[] for _ in problem.errors]
    for trial in history.complete:
        changed = [i for i, c in enumerate(trial.allocation.values()) if c != DENSE]
        if len(changed) == 1:
            (i,) = changed
            error = float(problem.errors[i][problem.indices(trial.allocation)[i]])
            points[i].append((error, _increase(problem, trial, dense)))
    return points


def _increase(problem: Problem, trial: Trial, dense: Trial) -> float:
    """The loss increase of a trial over the dense model."""
    if "loss" in trial.metrics and "loss" in dense.metrics:
        return trial.metrics["loss"] - dense.metrics["loss"]
    return float(problem.signs[0]) * (dense.values[0] - trial.values[0])
