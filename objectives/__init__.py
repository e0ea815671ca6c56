"""Objectives: what a trial measures. `OBJECTIVES` lists the built-in ones."""

from __future__ import annotations

from typing import cast

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.objectives.base import Direction, EvaluationResult, Objective, ObjectiveBase
from rankNAS.objectives.costs import CostObjective, Latency
from rankNAS.objectives.quality import Accuracy, KLDivergence, Loss, ReverseKL
from rankNAS.plugins import load_callable

__all__ = [
    "OBJECTIVES",
    "Accuracy",
    "KLDivergence",
    "EvaluationResult",
    "CostObjective",
    "Direction",
    "Latency",
    "Loss",
    "Objective",
    "ObjectiveBase",
    "ReverseKL",
    "make_objective",
]

OBJECTIVES: dict[str, ObjectiveBase] = {
    objective.name: objective
    for objective in (
        Accuracy(),
        Loss(),
        KLDivergence(),
        ReverseKL(),
        CostObjective("macs"),
        CostObjective("params"),
        CostObjective("weight_bytes"),
        Latency(),
    )
}


def make_objective(given: str | ObjectiveBase) -> ObjectiveBase:
    """An objective from a name, ``file.py:function[=DIRECTION]``, or an objective itself.

    A function's direction is what follows ``=``, else its attribute ``direction``, else
    ``maximize``.

    Raises:
        UnknownNameError: No such objective.
        UsageError: The file or function cannot be loaded, or an unknown direction.

    >>> make_objective("loss").direction
    'minimize'
    """
    if isinstance(given, ObjectiveBase):
        return given
    if not isinstance(given, str):
        raise UsageError(
            f"an objective must be a name or an Objective, got {type(given).__name__}; wrap a "
            "function as Objective(fn, direction=...)."
        )
    if ".py:" not in given:
        if given not in OBJECTIVES:
            raise UnknownNameError("objective", given, OBJECTIVES, "Or path/to/file.py:function.")
        return OBJECTIVES[given]
    path, _, name_direction = given.rpartition(":")
    name, _, direction = name_direction.partition("=")
    fn = load_callable(f"{path}:{name}", "objective")
    return Objective(fn, cast(Direction, direction or getattr(fn, "direction", "maximize")))
