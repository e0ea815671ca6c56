"""DRONE rank selection: the smallest ranks within a total loss allowance, front to back.

References:
    Chen, Yu, Dhillon and Hsieh, NeurIPS 2021: data-aware low-rank compression (DRONE). The closed
    form for one layer is the norm ``input``. The search of ranks is rebuilt from descriptions of
    its section 3.4, as the text was not available to us.
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
from rankNAS.strategies.sensitivity.front_to_back import MissingError, Row, Walks, spread

__all__ = ["Drone"]

TIE = 1e-3  # of the largest loss: noise may make measured losses flat, more error is still worse


@final
@dataclass(frozen=True)
class Drone(Strategy):
    """The smallest ranks front to back within a total loss allowance, shared by time.

    A walk goes through the layers from the first to the last, each on the compressed layers before
    it, and gives each the cheapest choice within its part of the allowance, in proportion to its
    time (`rankNAS.strategies.sensitivity.front_to_back`). A budget takes the place of the given
    allowance: the least allowance that meets it is found by a few walks.

    With `front_to_back` off, and where a cost is an objective too, each layer is measured alone
    instead and all layers have one allowance, found exactly from interpolated rises.

    The rise is that of the metric ``loss`` or, where it is not measured, of the first objective.
    Where measurements fail, the relative errors stand in.

    Args:
        levels: Choices of a layer that may be measured.
        operators: Whose choices are used; None for all.
        front_to_back: Measure each layer on the compressed layers before it.
        walks: Allowances that are tried, at most.

    Raises:
        UsageError: `levels` or `walks` below one.
    """

    levels: int = 4
    operators: tuple[str, ...] | None = ("svd",)
    front_to_back: bool = True
    walks: int = 6
    name = "drone"
    norm = "input"
    screens = True

    def __post_init__(self) -> None:
        for name in ("levels", "walks"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def probes(self, problem: Problem, history: History) -> list[Allocation]:
        """The dense model, and then the next step of a walk; or each layer alone."""
        table = problem.within(self.operators)
        if not self._walks(problem):
            return self._alone(table)
        dense = table.allocation(table.all_dense)
        if dense not in history.found:
            return [dense]
        try:
            self._walked(problem, table, history)
        except MissingError as missing:
            return [table.allocation(missing.row)]
        return []

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """The allocation at the end of the walks, or that of the least common rise."""
        table = problem.within(self.operators)
        if self._walks(problem):
            if history.candidates(problem):
                return []
            row = self._walked(problem, table, history, complete=True)
            allocation = Energy().solve(table) if row is None else table.allocation(row)
            return [] if allocation in history.tried else [allocation][:n]
        rises = _rises(problem, table, history)
        return Energy().propose(replace(table, errors=rises), history, n, rng)

    def _walks(self, problem: Problem) -> bool:
        traded = any(name in problem.costs for name in problem.objectives)
        return self.front_to_back and bool(problem.budget) and not traded

    def _walked(
        self, problem: Problem, table: Problem, history: History, *, complete: bool = False
    ) -> Row | None:
        """The solution of the walks; None if measurements fail, or lack although all are made.

        Raises:
            MissingError: An allocation has not been measured yet, and more can be measured.
        """
        dense = history.found.get(problem.allocation(problem.all_dense))
        if dense is None or dense.state != "complete":
            return None

        def rise(row: Row) -> float:
            trial = history.found.get(table.allocation(row))
            if trial is None:
                raise MissingError(row)
            return _increase(problem, trial, dense) if trial.state == "complete" else np.inf

        try:
            start = tuple(table.indices(Energy().solve(table)))
            return Walks(table, rise, self.levels, self.walks, start).solution()
        except MissingError:
            if complete:
                return None
            raise

    def _alone(self, table: Problem) -> list[Allocation]:
        """The dense model, and each layer alone at a few choices over its range of errors."""
        rows = [table.all_dense]
        for i, errors in enumerate(table.errors):
            rows += [table.alone(i, j) for j in spread(errors, self.levels)]
        return [table.allocation(row) for row in sorted(rows)]


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
