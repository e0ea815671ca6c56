"""Per-layer sensitivity: the loss increase when one layer alone is compressed.

At equal relative error, layer sensitivities differ by an order of magnitude, so relative errors
alone do not rank layers. Each layer is measured alone at a few relative errors; a power law
through these points gives the sensitivity of all its choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from rankNAS.allocation import Allocation
from rankNAS.strategies.history import History, Trial, degradation
from rankNAS.strategies.problem import DENSE_INDEX, Array, Problem

__all__ = ["sensitivity_probes", "sensitivity_tables"]

EXPONENTS = 0.5, 4.0  # bounds of the power law's exponent between and beyond measured points
FLOOR = 1e-3  # the smallest sensitivity of a measured choice, relative to the largest


def sensitivity_probes(problem: Problem, errors: Sequence[float]) -> list[Allocation]:
    """The dense model, and each layer alone at the choices nearest to some relative errors.

    Neighbours agree in the first layers.
    """
    rows = {problem.all_dense}
    for layer, table in enumerate(problem.errors):
        rows |= {problem.alone(layer, _nearest(table, error)) for error in errors}
    return [problem.allocation(row) for row in sorted(rows)]


def sensitivity_tables(
    problem: Problem, history: History, errors: Sequence[float]
) -> tuple[Array, ...] | None:
    """The sensitivity of each choice of each layer.

    Args:
        problem: Its relative errors e are the argument of the power laws.
        history: Holds the probes of `sensitivity_probes`; failed ones are left out.
        errors: As for `sensitivity_probes`.

    Returns:
        One array a layer, 0 for dense, positive elsewhere: a e^b between and beyond the measured
        points, through them in between. None if the dense model or all layers failed.
    """
    base = history.found.get(problem.allocation(problem.all_dense))
    if base is None or base.state != "complete":
        return None
    points = [_measured(problem, history, base, i, errors) for i in range(len(problem.errors))]
    largest = max((sensitivity for found in points for _, sensitivity in found), default=0.0)
    if largest <= 0:
        return None
    floored = [[(e, max(h, FLOOR * largest)) for e, h in found] for found in points]
    typical = _typical(floored)
    return tuple(
        _interpolated(table, found or typical)
        for table, found in zip(problem.errors, floored, strict=True)
    )


def _nearest(table: Array, error: float) -> int:
    """The choice of the nearest error; dense only where there is no other."""
    others = table[DENSE_INDEX + 1 :]
    if not len(others):
        return DENSE_INDEX
    return DENSE_INDEX + 1 + int(np.argmin(np.abs(others - error)))


def _measured(
    problem: Problem, history: History, base: Trial, layer: int, errors: Sequence[float]
) -> list[tuple[float, float]]:
    """The (error, sensitivity) points of a layer, both increasing."""
    found: dict[float, float] = {}
    for error in errors:
        choice = _nearest(problem.errors[layer], error)
        trial = history.found.get(problem.allocation(problem.alone(layer, choice)))
        value = float(problem.errors[layer][choice])
        if choice != DENSE_INDEX and value > 0 and trial is not None and trial.state == "complete":
            found[value] = degradation(problem, trial) - degradation(problem, base)
    ordered = sorted(found)
    sensitivities = accumulate((found[e] for e in ordered), max)
    return list(zip(ordered, sensitivities, strict=True))


def _typical(points: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The substitute for a layer whose probes all failed: the medians over all points."""
    flat = np.array([point for found in points for point in found])
    return [(float(np.median(flat[:, 0])), float(np.median(flat[:, 1])))]


def _interpolated(table: Array, points: Sequence[tuple[float, float]]) -> Array:
    """Power laws through the points, linear in the logarithms of both."""
    x = np.log([e for e, _ in points])
    y = np.log([h for _, h in points])
    at = np.log(np.maximum(table, 1e-12))
    if len(points) == 1:
        logarithm: npt.NDArray[np.float64] = y[0] + 1.5 * (at - x[0])
    else:
        slopes = np.clip(np.diff(y) / np.diff(x), *EXPONENTS)
        logarithm = np.interp(at, x, y)
        logarithm = np.where(at < x[0], y[0] + slopes[0] * (at - x[0]), logarithm)
        logarithm = np.where(at > x[-1], y[-1] + slopes[-1] * (at - x[-1]), logarithm)
    sensitivity: Array = np.where(table > 0, np.exp(logarithm), 0.0)
    return sensitivity
