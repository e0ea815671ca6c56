"""Objectives: quantities that a trial measures. `OBJECTIVES` lists the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from rankNAS import renamed
from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.lazy import Catalogue, exports
from rankNAS.plugins import load_callable

if TYPE_CHECKING:
    from rankNAS.objectives.base import Direction, EvaluationResult, Objective, ObjectiveBase
    from rankNAS.objectives.costs import CostObjective, Latency
    from rankNAS.objectives.quality import Accuracy, KLDivergence, Loss, ReverseKL

__all__ = [
    "CATALOGUE",
    "DIRECTIONS",
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

_COST = (
    "rankNAS.objectives.costs:CostObjective",
    "An exact cost of the whole network: ``macs``, ``params`` or ``weight_bytes``.",
)
#: Name to (class, first line of its docstring). Listing imports nothing.
CATALOGUE: dict[str, tuple[str, str]] = {
    "accuracy": (
        "rankNAS.objectives.quality:Accuracy",
        "Classification accuracy on the validation data, in [0, 1].",
    ),
    "loss": (
        "rankNAS.objectives.quality:Loss",
        "Loss on the validation data: cross entropy in nats, or mean squared error.",
    ),
    "kl_divergence": (
        "rankNAS.objectives.quality:KLDivergence",
        "Divergence from the dense model's outputs, KL(dense || compressed) in nats.",
    ),
    "reverse_kl": (
        "rankNAS.objectives.quality:ReverseKL",
        "Divergence from the dense model's outputs, KL(compressed || dense) in nats.",
    ),
    "macs": _COST,
    "params": _COST,
    "weight_bytes": _COST,
    "latency": (
        "rankNAS.objectives.costs:Latency",
        "Median seconds of one forward pass of the compressed network, measured on its device.",
    ),
}
#: Name to direction, for listings.
DIRECTIONS: dict[str, Direction] = {
    name: "maximize" if name == "accuracy" else "minimize" for name in CATALOGUE
}
#: Name to objective, imported on first use.
OBJECTIVES: Mapping[str, ObjectiveBase] = Catalogue(
    CATALOGUE, lambda name, objective: objective(name=name)
)

_BASE = ("Direction", "EvaluationResult", "Objective", "ObjectiveBase")
_MODULES = {home.partition(":")[2]: home.partition(":")[0] for home, _ in CATALOGUE.values()}
__getattr__ = renamed.renamed_exports(
    __name__,
    {"Agreement": "KLDivergence", "ReverseAgreement": "ReverseKL"},
    exports(__name__, _MODULES | dict.fromkeys(_BASE, "rankNAS.objectives.base")),
)


def make_objective(given: str | ObjectiveBase) -> ObjectiveBase:
    """The objective for a name, ``file.py:function[=DIRECTION]``, or an objective itself.

    The direction of a function is the text after ``=``, else its attribute ``direction``, else
    ``maximize``.

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
        if given not in OBJECTIVES:
            raise UnknownNameError("objective", given, OBJECTIVES, "Or path/to/file.py:function.")
        return OBJECTIVES[given]
    path, _, name_direction = given.rpartition(":")
    name, _, direction = name_direction.partition("=")
    fn = load_callable(f"{path}:{name}", "objective")
    return Objective(fn, cast("Direction", direction or getattr(fn, "direction", "maximize")))
