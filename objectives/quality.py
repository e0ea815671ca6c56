"""Quality objectives: the metrics of the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from rankNAS.exceptions import ObjectiveError
from rankNAS.objectives.base import Direction, EvaluationResult, ObjectiveBase

__all__ = ["Metric"]


@final
@dataclass(frozen=True)
class Metric(ObjectiveBase):
    """A metric of the task on the validation data, such as ``accuracy`` or ``r2``.

    Args:
        name: The metric; see ``Task.directions``.
        direction: ``maximize`` or ``minimize``.
    """

    name: str
    direction: Direction

    def measure(self, candidate: EvaluationResult) -> float:
        if self.name not in candidate.metrics:
            raise ObjectiveError(
                f"{self.name!r} is no metric of the task {candidate.task.name!r}, which has "
                f"{', '.join(candidate.metrics)}."
            )
        return candidate.metrics[self.name]
