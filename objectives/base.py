"""The contract of an objective: a measured quantity with a direction."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.exceptions import ObjectiveError, UsageError
from rankNAS.renamed import renamed_exports

__all__ = ["EvaluationResult", "Direction", "Objective", "ObjectiveBase"]

Direction = Literal["maximize", "minimize"]
__getattr__ = renamed_exports(__name__, {"Candidate": "EvaluationResult"})


@dataclass(frozen=True)
class EvaluationResult:
    """One allocation under evaluation, with the quantities that an objective may measure.

    Args:
        allocation: The allocation.
        logits: Outputs on the validation inputs, (samples, …).
        dense_logits: Outputs of the dense model.
        targets: Validation targets.
        inputs: Validation inputs.
        costs: Exact costs of the whole network by name.
        build: Builds the compressed network in evaluation mode; called on demand.
    """

    allocation: Allocation
    logits: Tensor
    dense_logits: Tensor
    targets: Tensor
    inputs: Tensor
    costs: Mapping[str, float]
    build: Callable[[], nn.Module]


class ObjectiveBase(ABC):
    """A measured quantity with a name and a direction.

    `measure` must not change the candidate and must return the same number for the same candidate,
    up to measurement noise.
    """

    name: str
    direction: Direction

    @abstractmethod
    def measure(self, candidate: EvaluationResult) -> float:
        """The value for one candidate."""

    @final
    def __call__(self, candidate: EvaluationResult) -> float:
        """The value, checked and measured without gradients.

        Raises:
            ObjectiveError: `measure` raised, or its value is not a finite number.
        """
        try:
            with torch.no_grad():
                value = float(self.measure(candidate))
        except ObjectiveError:
            raise
        except Exception as error:
            raise ObjectiveError(
                f"objective {self.name!r} raised {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value):
            raise ObjectiveError(f"objective {self.name!r} returned {value}, not a finite number.")
        return value


@final
@dataclass(frozen=True)
class Objective(ObjectiveBase):
    """An objective from any function of the compressed network and the validation data.

    Args:
        fn: Takes the network (``nn.Module``, evaluation mode) and the validation data
            (``inputs, targets``); returns a number.
        direction: ``maximize`` or ``minimize``.
        name: Defaults to the function's name.

    Raises:
        UsageError: `fn` is not callable, or the direction is unknown.

    Example:
        >>> def depth(network, data):
        ...     return sum(1 for _ in network.modules())
        >>> Objective(depth, direction="minimize").name
        'depth'
    """

    fn: Callable[[nn.Module, tuple[Tensor, Tensor]], float]
    direction: Direction = "maximize"
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise UsageError(f"`fn` must be callable, got {type(self.fn).__name__}.")
        if self.direction not in ("maximize", "minimize"):
            raise UsageError(
                f"`direction` must be 'maximize' or 'minimize', got {self.direction!r}."
            )
        if not self.name:
            object.__setattr__(self, "name", getattr(self.fn, "__name__", "objective"))

    def measure(self, candidate: EvaluationResult) -> float:
        return self.fn(candidate.build(), (candidate.inputs, candidate.targets))
