"""Matching: no labels; the target is the dense model's own output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from rankNAS.exceptions import DataError, UsageError
from rankNAS.tasks.base import Direction, Prediction, Task, main_output
from rankNAS.tasks.categorical import Categorical
from rankNAS.tasks.checks import check_some
from rankNAS.tasks.classification import likelihood_metrics
from rankNAS.tasks.continuous import Outputs, normalised_distance
from rankNAS.trees import floating_tensors

__all__ = ["Matching", "distance_of", "outputs_of"]


@final
@dataclass(frozen=True, kw_only=True)
class Matching(Task):
    """No labels: a network is as good as it is close to the dense model.

    Args:
        by: ``distance``, the squared distance of all floating-point tensors of the output relative
            to their variance; or ``kl``, for a model that returns logits with classes last.

    Raises:
        UsageError: Another `by`.
    """

    name: ClassVar[str] = "matching"
    labelled: ClassVar[bool] = False
    invariant: ClassVar[bool] = True
    by: Literal["distance", "kl"] = "distance"

    def __post_init__(self) -> None:
        if self.by not in ("distance", "kl"):
            raise UsageError(f"`by` must be 'distance' or 'kl', got {self.by!r}.")

    @property
    def divergence_name(self) -> str:  # type: ignore[override]
        return "distance" if self.by == "distance" else "kl_divergence"

    @property
    def directions(self) -> Mapping[str, Direction]:
        if self.by == "distance":
            return {"distance": "minimize"}
        return {"kl_divergence": "minimize", "reverse_kl": "minimize"}

    def predict(self, output: Any, batch: Any) -> Prediction:
        mask = self.mask_of(batch)
        if self.by == "distance":
            return outputs_of(output, mask)
        logits = main_output(output, self.name)
        counts = None
        if mask is not None and mask.shape == logits.shape[:-1]:
            counts = mask.flatten()
        return Categorical(logits.flatten(0, -2), counts=counts)

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        check_some(sums, self.name)
        return likelihood_metrics(sums) if self.by == "kl" else distance_of(sums)

    def describe(self) -> str:
        how = "distance" if self.by == "distance" else "KL divergence"
        return f"matching the dense model's outputs without labels ({how})"


def outputs_of(output: Any, mask: Tensor | None = None) -> Outputs:
    """The floating-point tensors of an output.

    Raises:
        DataError: It has none.
    """
    found = floating_tensors(output)
    if not found:
        raise DataError(
            f"the model returns a {type(output).__name__} without floating-point tensors; its "
            "outputs cannot be compared with those of the dense model."
        )
    return Outputs(found, mask)


def distance_of(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The normalised distance from the sums of `Outputs`; empty without a reference."""
    if "distance" not in sums:
        return {}
    distance, total, squares = (sums[k] for k in ("distance", "reference", "reference_squares"))
    return {"distance": normalised_distance(distance, total, squares, sums["sizes"])}
