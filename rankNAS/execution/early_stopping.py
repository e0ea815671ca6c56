"""Asynchronous successive halving (ASHA): the pruner of trials.

An evaluation is a sequence of steps: epochs of training if trials are trained, otherwise growing
parts of the validation samples. At each step but the last, a trial continues only if it is among
the best of those that reached the step. No trial waits for another, so workers are never idle.

References:
    Li et al., MLSys 2020 (ASHA), in the variant that stops trials instead of promoting them
    (as in Ray Tune's scheduler and in Syne Tune), here for several objectives as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rankNAS.decompositions.shapes import EXACT_COSTS
from rankNAS.exceptions import UsageError
from rankNAS.objectives.base import Direction
from rankNAS.strategies.history import History
from rankNAS.strategies.problem import Array
from rankNAS.tasks import METRICS

__all__ = ["SuccessiveHalving"]


@dataclass
class SuccessiveHalving:
    """ASHA pruner: decides whether to continue a trial.

    A trial continues from a step if fewer than 1 / `reduction` of the trials that reached the
    step for the same budget, itself included, are better in every objective; the first one always
    continues.

    Args:
        objectives: Names of the objectives; those measured only at the end are ignored.
        directions: Their directions.
        reduction: The number of trials that reach a step per trial that continues.
        metrics: The metrics that are known at every step: those of the task.
        divergence: The metric, to be small, that takes the place of the first objective, as
            strategies rank trials; None compares the objectives themselves.

    Raises:
        UsageError: A reduction below 2, or no objective is known before the end.

    Example:
        >>> pruner = SuccessiveHalving(["accuracy"], ["maximize"], reduction=2)
        >>> [pruner("macs<=0.5", 256, {"accuracy": a}) for a in (0.5, 0.4, 0.6, 0.55)]
        [True, False, True, True]
    """

    objectives: Sequence[str]
    directions: Sequence[Direction]
    reduction: int = 3
    metrics: Sequence[str] = tuple(METRICS)
    divergence: str | None = None
    _seen: dict[tuple[str, int], list[Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reduction < 2:
            raise UsageError(f"`reduction` must be at least 2, got {self.reduction}.")
        known = {*self.metrics, *EXACT_COSTS}
        pairs = zip(self.objectives, self.directions, strict=True)
        self._signs = {n: 1.0 if d == "maximize" else -1.0 for n, d in pairs if n in known}
        if not any(name in self.metrics for name in self._signs):
            raise UsageError(
                "early stopping compares trials that are not finished, but none of the "
                f"objectives {', '.join(self.objectives)} is known then; add one of "
                f"{', '.join(sorted(self.metrics))} or leave early stopping out."
            )

    def __call__(self, budget_key: str, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether to continue a trial, given its metrics at a step; the metrics are kept."""
        own = np.array([sign * metrics.get(n, 0.0) for n, sign in self._signs.items()])
        if self.divergence is not None and self.objectives[0] in self._signs:
            own[0] = -metrics.get(self.divergence, np.inf)
        others = self._seen.setdefault((budget_key, step), [])
        better = sum(bool((other > own).all()) for other in others)
        others.append(own)
        return better < max(1, math.ceil(len(others) / self.reduction))

    def learn(self, history: History) -> None:
        """Add the steps of the trials of an earlier session."""
        for trial in history.trials:
            for step, metrics in steps(trial.metrics).items():
                self(trial.budget_key, step, metrics)


def steps(metrics: Mapping[str, float]) -> dict[int, dict[str, float]]:
    """The metrics before the last step, by step, as a trial's record names them.

    >>> steps({"accuracy@256": 0.5, "accuracy": 0.4})
    {256: {'accuracy': 0.5}}
    """
    found: dict[int, dict[str, float]] = {}
    for name, value in metrics.items():
        stem, _, step = name.partition("@")
        if step.isdecimal():
            found.setdefault(int(step), {})[stem] = value
    return found
