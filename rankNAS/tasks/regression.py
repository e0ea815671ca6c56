"""Regression: real-valued targets, one or many a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from rankNAS.exceptions import DataError
from rankNAS.tasks.base import Direction, Prediction, Task, main_output
from rankNAS.tasks.checks import check_finite, check_length, check_some
from rankNAS.tasks.continuous import Gaussian, normalised_distance

__all__ = ["Regression"]


@final
@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Real-valued targets.

    Outputs and targets have one shape, (N, ...); (N,) and (N, 1) are the same. The metrics are
    ``r2``, which is the mean over outputs of 1 - (squared error) / (variance of the targets), the
    mean absolute error ``mae``, and ``loss``, the mean squared error.
    """

    name: ClassVar[str] = "regression"
    divergence_name: ClassVar[str] = "distance"

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {"r2": "maximize", "mae": "minimize", "loss": "minimize", "distance": "minimize"}

    def predict(self, output: Any, batch: Any) -> Prediction:
        mean, targets = main_output(output, self.name), self.targets_of(batch)
        check_length(mean, targets, self.name)
        if mean.reshape(len(mean), -1).shape != targets.reshape(len(targets), -1).shape or (
            mean.squeeze().shape != targets.squeeze().shape
        ):
            raise DataError(
                f"the model returns {tuple(mean.shape)} for targets {tuple(targets.shape)}; the "
                "task 'regression' needs equal shapes."
            )
        targets = targets.to(mean.dtype)
        check_finite(targets, self.name)
        return Gaussian(mean.reshape(len(mean), -1), targets.reshape(len(targets), -1))

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        check_some(sums, self.name)
        count, squared = sums["count"], sums["squared"]
        error = normalised_distance(squared, sums["target"], sums["target_squares"], count)
        outputs = squared.numel()
        found = {
            "r2": 1 - error,
            "mae": float(sums["absolute"].sum() / count / outputs),
            "loss": float(squared.sum() / count / outputs),
        }
        if "distance" in sums:
            found["distance"] = normalised_distance(
                sums["distance"], sums["reference"], sums["reference_squares"], count
            )
        return found

    def describe(self) -> str:
        return "regression"
