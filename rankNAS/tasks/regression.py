"""Regression: real-valued targets, one or many a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from rankNAS.exceptions import DataError
from rankNAS.tasks.base import Direction, Prediction, Task, at_least_float32, main_output
from rankNAS.tasks.checks import check_finite, check_length, check_some
from rankNAS.tasks.continuous import ROUNDING, Gaussian, normalised_distance

__all__ = ["Regression"]


@final
@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Real-valued targets.

    Outputs and targets have one shape, (N, ...); (N,) and (N, 1) are the same. The metrics are
    ``r2``, which is the mean over outputs of 1 - (squared error) / (variance of the targets), the
    mean absolute error ``mae``, and ``loss``, the mean squared error. An output whose targets are
    constant has an ``r2`` of 1 if it is predicted exactly and of 0 otherwise, as in scikit-learn.
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
        if targets.is_complex() or mean.is_complex():
            raise DataError(
                "the task 'regression' takes real numbers, but there are complex ones; give their "
                "real and imaginary parts, or Custom(loss, metrics)."
            )
        check_finite(targets)
        targets = targets.to(at_least_float32(mean).dtype)
        return Gaussian(mean.reshape(len(mean), -1), targets.reshape(len(targets), -1))

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        check_some(sums, self.name)
        count, squared = sums["count"], sums["squared"]
        outputs = squared.numel()
        found = {
            "r2": _r2(squared, sums["target"], sums["target_squares"], count),
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


def _r2(squared: Tensor, total: Tensor, squares: Tensor, count: Tensor) -> float:
    """The mean over outputs of the coefficient of determination, from sums (D,)."""
    variance = squares - total.square() / count
    constant = variance <= ROUNDING * squares
    explained = 1 - squared / torch.where(constant, torch.ones_like(variance), variance)
    return float(torch.where(constant, (squared == 0).double(), explained).mean())
