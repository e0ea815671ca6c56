"""The contract of an objective: a measured quantity with a direction."""

from __future__ import annotations

import contextlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.data.samples import Samples
from rankNAS.data.sizes import affordable_samples
from rankNAS.exceptions import ObjectiveError, UsageError
from rankNAS.renamed import renamed_exports
from rankNAS.tasks.base import Direction, Task
from rankNAS.trees import Inputs, channels_last, tree_map

__all__ = ["EvaluationResult", "Direction", "Objective", "ObjectiveBase"]

__getattr__ = renamed_exports(__name__, {"Candidate": "EvaluationResult"})


@dataclass(frozen=True)
class EvaluationResult:
    """One allocation under evaluation, with the quantities that an objective may measure.

    Args:
        allocation: The allocation.
        metrics: The task's metrics on the validation samples.
        costs: Exact costs of the whole network by name.
        task: Reads batches and outputs.
        samples: The validation samples.
        build: Builds the compressed network in evaluation mode; called on demand.
        device: The device of the network.
        batch_size: Samples per batch of `batches`, at most; fewer if they are sequences of many
            tokens.
    """

    allocation: Allocation
    metrics: Mapping[str, float]
    costs: Mapping[str, float]
    task: Task
    samples: Samples
    build: Callable[[], nn.Module]
    device: torch.device | str = "cpu"
    batch_size: int = 256

    def data(self) -> Any:
        """All validation samples as one batch, such as ``(inputs, targets)``; a copy.

        Raises:
            DataError: Their shapes differ.
        """
        return tree_map(torch.clone, channels_last(self.samples.batch(self.device)))

    def batches(self) -> Iterator[Any]:
        """The validation samples in batches, each a copy."""
        size = affordable_samples(self.batch_size, self.samples)
        batches = self.samples.batches(size, device=self.device)
        return (tree_map(torch.clone, batch) for batch in batches)

    def example(self, count: int) -> Inputs:
        """The model's arguments for the first samples; a copy."""
        batch = channels_last(self.samples.example(count, self.device))
        return self.task.inputs_of(batch).copied()


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

        What `measure` prints goes to stderr: stdout is for results.

        Raises:
            ObjectiveError: `measure` raised or exited, or its value is not a finite number.
        """
        try:
            with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
                value = float(self.measure(candidate))
        except ObjectiveError:
            raise
        except SystemExit as error:
            raise ObjectiveError(
                f"objective {self.name!r} called sys.exit({error.code!r}); return a number, or "
                "raise an error for a trial that fails."
            ) from error
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
        fn: Takes the network (``nn.Module``, evaluation mode) and the validation data: all samples
            as one batch in the form of the data, such as ``(inputs, targets)``; returns a number.
        direction: ``maximize`` or ``minimize``.
        name: Defaults to the function's name.
        batches: Give the function an iterable of batches instead, for data that are too large or
            too unequal for one batch.

    Raises:
        UsageError: `fn` is not callable, or the direction is unknown.

    Example:
        >>> def depth(network, data):
        ...     return sum(1 for _ in network.modules())
        >>> Objective(depth, direction="minimize").name
        'depth'
    """

    fn: Callable[[nn.Module, Any], float]
    direction: Direction = "maximize"
    name: str = ""
    batches: bool = False

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
        data = candidate.batches() if self.batches else candidate.data()
        return self.fn(candidate.build(), data)
