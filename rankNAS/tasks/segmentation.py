"""Segmentation: one class at each position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from rankNAS.exceptions import DataError
from rankNAS.tasks.base import Direction, Prediction, Task, main_output
from rankNAS.tasks.categorical import Categorical
from rankNAS.tasks.checks import (
    IGNORED,
    check_classes,
    check_length,
    check_some,
    class_weights,
    whole_numbers,
)
from rankNAS.tasks.classification import LIKELIHOOD, likelihood_metrics

__all__ = ["Segmentation"]


@final
@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """A class at each position, as in `torch.nn.functional.cross_entropy`.

    The model returns logits (N, C, ...) for targets (N, ...), or one logit a position (N, 1, ...)
    for the classes 0 and 1 (logistic loss, threshold at 0). Intersection over union is computed
    from a confusion matrix summed over all positions; classes that neither occur nor are predicted
    are left out of the mean.

    Args:
        ignored: The label of positions that do not count; -100 does not count either.
        weights: Class weights of the loss.
    """

    name: ClassVar[str] = "segmentation"
    divergence_name: ClassVar[str] = "kl_divergence"
    ignored: int = IGNORED
    weights: tuple[float, ...] | None = None

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {"miou": "maximize", "accuracy": "maximize", **LIKELIHOOD}

    def predict(self, output: Any, batch: Any) -> Prediction:
        logits = main_output(output, self.name)
        targets = whole_numbers(self.targets_of(batch), self.name)
        check_length(logits, targets, self.name)
        if targets.dim() == logits.dim() and targets.shape[1] == 1:
            targets = targets[:, 0]
        if logits.dim() > 2 and logits.shape[1] == 1:  # one logit: classes 0 and 1
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        if logits.dim() < 3 or logits.shape[:1] + logits.shape[2:] != targets.shape:
            raise DataError(
                f"the task 'segmentation' takes logits (N, C, ...) for targets (N, ...), but the "
                f"model returns {tuple(logits.shape)} for targets {tuple(targets.shape)}; permute "
                "the class axis to position 1."
            )
        flat = self._marked(targets).flatten()
        weights = class_weights(self.weights, logits.shape[1], self.name)
        return Categorical(
            logits.movedim(1, -1).flatten(0, -2), flat, weights=weights, confusion=True
        )

    def check_targets(self, targets: Tensor, output: Any, where: str, row: int) -> None:
        super().check_targets(targets, output, where, row)
        classes = max(2, main_output(output, self.name).shape[1])
        check_classes(self._marked(whole_numbers(targets, self.name)), classes, where, row)

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        check_some(sums, self.name)
        confusion = sums["confusion"]
        hits = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - hits
        occurs = union > 0
        miou = float((hits[occurs] / union[occurs]).mean())
        accuracy = float(sums["correct"] / sums["count"])
        return {"miou": miou, "accuracy": accuracy, **likelihood_metrics(sums)}

    def describe(self) -> str:
        return "segmentation"

    def _marked(self, targets: Tensor) -> Tensor:
        """Targets with -100 for positions that do not count."""
        return (
            targets if self.ignored == IGNORED else targets.where(targets != self.ignored, IGNORED)
        )
