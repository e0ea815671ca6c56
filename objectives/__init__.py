"""Objectives: quantities that a trial measures. `OBJECTIVES` lists the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from rankNAS import renamed
from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.lazy import Catalogue, exports
from rankNAS.plugins import load_callable
from rankNAS.tasks import METRICS

if TYPE_CHECKING:
    from rankNAS.objectives.base import EvaluationResult, Objective, ObjectiveBase
    from rankNAS.objectives.costs import CostObjective, Latency
    from rankNAS.objectives.quality import Metric
    from rankNAS.tasks.base import Direction, Task

__all__ = [
    "CATALOGUE",
    "DIRECTIONS",
    "OBJECTIVES",
    "CostObjective",
    "EvaluationResult",
    "Latency",
    "Metric",
    "Objective",
    "ObjectiveBase",
    "make_objective",
]

_COST = "An exact cost of the whole network: ``macs``, ``params`` or ``weight_bytes``."
_LAYER_COST = "An exact cost of the decomposable layers alone: ``layer_macs`` or ``layer_params``."
#: Name to (class, first line of its docstring), of costs. Listing imports nothing.
COSTS: dict[str, tuple[str, str]] = {
    "macs": ("rankNAS.objectives.costs:CostObjective", _COST),
    "params": ("rankNAS.objectives.costs:CostObjective", _COST),
    "weight_bytes": ("rankNAS.objectives.costs:CostObjective", _COST),
    "layer_macs": ("rankNAS.objectives.costs:CostObjective", _LAYER_COST),
    "layer_params": ("rankNAS.objectives.costs:CostObjective", _LAYER_COST),
    "latency": (
        "rankNAS.objectives.costs:Latency",
        "Median seconds of one forward pass of the compressed network, measured on its device.",
    ),
}
#: Name to (class, description), of the metrics of all built-in tasks and of costs.
CATALOGUE: dict[str, tuple[str, str]] = {
    **{name: ("rankNAS.objectives.quality:Metric", text) for name, (_, text) in METRICS.items()},
    **COSTS,
}
#: Name to direction, for listings.
DIRECTIONS: dict[str, Direction] = {
    name: cast("Direction", METRICS[name][0]) if name in METRICS else "minimize"
    for name in CATALOGUE
}


def _made(name: str, objective: Any) -> ObjectiveBase:
    given = {"direction": DIRECTIONS[name]} if name in METRICS else {}
    made: ObjectiveBase = objective(name=name, **given)
    return made


#: Name to objective, imported on first use.
OBJECTIVES: Mapping[str, ObjectiveBase] = Catalogue(CATALOGUE, _made)

_BASE = ("EvaluationResult", "Objective", "ObjectiveBase")
_MODULES = {home.partition(":")[2]: home.partition(":")[0] for home, _ in CATALOGUE.values()}
_exported = exports(__name__, _MODULES | dict.fromkeys(_BASE, "rankNAS.objectives.base"))


def __getattr__(name: str) -> Any:
    metric = renamed.OBJECTIVE_CLASSES.get(name)
    if metric is None:
        return _exported(name)
    direction = DIRECTIONS[metric]
    renamed.warn_renamed(f"{__name__}.{name}", f"{__name__}.Metric({metric!r}, {direction!r})")
    return partial(_exported("Metric"), metric, direction)


def make_objective(given: str | ObjectiveBase, task: Task | None = None) -> ObjectiveBase:
    """The objective for a name, ``file.py:function[=DIRECTION]``, or an objective itself.

    The direction of a function is the text after ``=``, else its attribute ``direction``, else
    ``maximize``.

    Args:
        given: The name or the objective.
        task: The task whose metrics may be named; None accepts those of all built-in tasks.

    Raises:
        UnknownNameError: There is no such objective.
        UsageError: The file or function cannot be loaded, or the direction is unknown.

    >>> make_objective("loss").direction
    'minimize'
    """
    from rankNAS.objectives.base import Objective, ObjectiveBase

    if isinstance(given, ObjectiveBase):
        return given
    if not isinstance(given, str):
        raise UsageError(
            f"an objective must be a name or an Objective, got {type(given).__name__}; wrap a "
            "function as Objective(fn, direction=...)."
        )
    if ".py:" not in given:
        given = renamed.current_name(renamed.OBJECTIVES, given, what="the objective")
        return _named(given, task)
    path, _, name_direction = given.rpartition(":")
    name, _, direction = name_direction.partition("=")
    fn = load_callable(f"{path}:{name}", "objective")
    return Objective(fn, cast("Direction", direction or getattr(fn, "direction", "maximize")))


def _named(name: str, task: Task | None) -> ObjectiveBase:
    """The objective for a name; a metric must be one of the task."""
    if task is None or name in COSTS:
        if name in OBJECTIVES:
            return OBJECTIVES[name]
        raise UnknownNameError("objective", name, OBJECTIVES, "Or path/to/file.py:function.")
    from rankNAS.objectives.quality import Metric

    if name in task.directions:
        return Metric(name, task.directions[name])
    if name in METRICS:
        raise UsageError(
            f"the objective {name!r} is no metric of this data: the task is {task.describe()}, "
            f"with {', '.join(task.directions)}. Choose one of them, or give another task."
        )
    known = [*task.directions, *COSTS]
    raise UnknownNameError("objective", name, known, "Or path/to/file.py:function.")
