"""The rank search of DRONE: front to back, on the compressed layers before, within an allowance.

All layers together may raise the loss by the allowance R. Layer j, the layers before it compressed
and those behind it dense, gets the cheapest choice with a rise of at most R (t_1 + .. + t_j) / T,
with T the time of all: slow layers may do more harm, and what a layer leaves over goes to those
behind it. Bisection over a few choices finds it, and the rise is interpolated between the last
two. R is the least one for which the network meets the budgets, found by a few such walks; the
errors of the last one, all scaled by one factor, use up the budget.

Notation: L layers, R the allowance, t_j the time of layer j.

References:
    Chen, Yu, Dhillon and Hsieh, NeurIPS 2021 (DRONE), section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rankNAS.strategies.bayesian.decode import decode_best, preference
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem

__all__ = ["MissingError", "Row", "Walks", "shares", "spread"]

Row = tuple[int, ...]
CLOSE = 0.98  # of a budget, at which no further allowance is tried
FACTOR = 4.0  # between allowances, until one meets the budgets and another does not


class MissingError(Exception):
    """An allocation has not been measured yet.

    Args:
        row: Its indices.
    """

    def __init__(self, row: Row) -> None:
        super().__init__("an allocation has not been measured yet")
        self.row = row


@dataclass(frozen=True)
class Walks:
    """Walks from the first layer to the last under several allowances.

    Args:
        problem: Tables and budgets.
        rise: Rise of the loss of an allocation over the dense network's; raises a `MissingError`.
        levels: Choices of a layer that may be measured.
        walks: Allowances, at most.
        start: An allocation that meets the budgets; the first allowance is its rise.
    """

    problem: Problem
    rise: Callable[[Row], float]
    levels: int
    walks: int
    start: Row = ()

    def solution(self) -> Row | None:
        """The allocation of the least allowance, scaled onto the budgets; None without one."""
        best, low, high = None, 0.0, 0.0
        allowance = self.rise(self.start)
        if not 0 < allowance < np.inf:
            return None
        for _ in range(self.walks):
            row = self.walk(allowance)
            meets = self.problem.meets(row)
            best = row if best is None or meets else best
            low, high = (low, allowance) if meets else (allowance, high)
            if meets and self._used(row) >= CLOSE:
                break
            if low and high:
                allowance = float(np.sqrt(low * high))
            else:
                allowance = low * FACTOR if low else high / FACTOR
        assert best is not None
        scaled = decode_best(self.problem, preference(self.problem, np.array([best]))[0])
        return None if scaled is None else tuple(scaled.tolist())

    def walk(self, allowance: float) -> Row:
        """The cheapest choices of all layers, front to back, within an allowance."""
        row, before = list(self.problem.all_dense), 0.0
        for j, share in enumerate(np.cumsum(shares(self.problem))):
            row[j], before = self._layer(row, j, before, allowance * float(share))
        return tuple(row)

    def _layer(self, row: list[int], j: int, before: float, most: float) -> tuple[int, float]:
        """The choice of a layer, and the rise with it."""
        errors, cost = self.problem.errors[j], self._cost(j)
        measured = {0.0: before}

        def at(choice: int) -> float:
            found = self.rise((*row[:j], choice, *row[j + 1 :]))
            measured[float(errors[choice])] = found
            return found

        points = [DENSE_INDEX, *spread(errors, self.levels)]
        if before > most or len(points) == 1:
            return DENSE_INDEX, before
        low, high = 0, len(points)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if at(points[middle]) <= most else (low, middle)
        x = float(errors[points[low]])
        limit, y = x, measured[x]
        if high < len(points):
            further = float(errors[points[high]])
            slope = (measured[further] - y) / (further - x) if further > x else np.inf
            limit = x + (most - y) / slope
        allowed = np.flatnonzero(errors <= max(limit, x))
        choice = int(allowed[np.argmin(cost[allowed])])
        if high < len(points) and errors[choice] > x:
            y += slope * (float(errors[choice]) - x)
        return choice, y

    def _cost(self, j: int) -> Array:
        """The budgeted costs of a layer's choices, relative to the limits, (C_j,)."""
        limits = self.problem.limits
        total: Array = np.sum([self.problem.costs[n][j] / limits[n] for n in limits], axis=0)
        return total

    def _used(self, row: Sequence[int]) -> float:
        found = self.problem.fractions(row)
        return max(found[name] / bound for name, bound in self.problem.budget.items())


def shares(problem: Problem) -> Array:
    """The share of each layer in the time of the dense network, (L,): of the MACs if unknown."""
    table = problem.costs.get("latency", problem.costs.get("macs"))
    table = table or next(iter(problem.costs.values()))
    times = np.array([float(cost[DENSE_INDEX]) for cost in table])
    found: Array = times / times.sum()
    return found


def spread(errors: Array, levels: int) -> list[int]:
    """Choices at about evenly spaced roots of the error; the largest error is among them.

    They are in the order of their errors.
    """
    if len(errors) == 1:
        return []
    first = DENSE_INDEX + 1
    roots = np.sqrt(errors[first:])
    wanted = roots.max() * np.arange(1, levels + 1) / levels
    found = {first + int(np.abs(roots - w).argmin()) for w in wanted}
    return sorted(found, key=lambda i: (float(errors[i]), i))
