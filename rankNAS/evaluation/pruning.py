"""Early stopping of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["PARTS", "PruneCallback", "PrunedError", "check_pruning", "part_ends"]

#: Pruning callback: takes the step (validation samples or epochs) and the metrics; returns whether
#: to continue.
PruneCallback = Callable[[int, Mapping[str, float]], bool]
PARTS = (0.25, 0.5, 1.0)  # of the epochs, or of the validation samples


class PrunedError(Exception):
    """An evaluation that was stopped early.

    Args:
        step: The last step, in words.
        metrics: The metrics after that step.
    """

    def __init__(self, step: str, metrics: Mapping[str, float]) -> None:
        super().__init__(f"stopped after {step}")
        self.step, self.metrics = step, dict(metrics)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, self.metrics)


def check_pruning(
    should_continue: PruneCallback, step: int, words: str, metrics: Mapping[str, float]
) -> None:
    """Raise a PrunedError unless the evaluation continues after a step.

    Args:
        should_continue: Decides.
        step: The number of the step.
        words: The step in words, such as ``2 of 4 epochs``.
        metrics: The metrics after it.
    """
    if not should_continue(step, metrics):
        raise PrunedError(words, metrics)


def part_ends(shares: Sequence[float], count: int) -> list[int]:
    """Cumulative numbers of items, out of `count`, at which the shares end; at least 1."""
    return sorted({max(1, round(share * count)) for share in shares})
