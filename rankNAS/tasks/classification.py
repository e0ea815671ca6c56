"""Classification: one class a sample, or several labels a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from rankNAS.data.labels import check_labels
from rankNAS.data.samples import Samples
from rankNAS.exceptions import DataError
from rankNAS.tasks.base import Direction, Prediction, Task, main_output
from rankNAS.tasks.binary import Bernoulli
from rankNAS.tasks.categorical import Categorical
from rankNAS.tasks.checks import (
    IGNORED,
    check_classes,
    check_length,
    check_some,
    check_unit,
    class_weights,
    whole_numbers,
)

__all__ = ["LIKELIHOOD", "Classification", "MultiLabel", "likelihood_metrics"]

#: The metrics of every task whose predictions are distributions; see `likelihood_metrics`.
LIKELIHOOD: dict[str, Direction] = {
    "loss": "minimize",
    "kl_divergence": "minimize",
    "reverse_kl": "minimize",
}


@final
@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """One class a sample.

    The model returns logits (N, C), or one logit a sample, (N,) or (N, 1), for the classes 0 and 1
    (logistic loss, threshold at 0). Targets are class numbers (N,) or (N, 1) of any number type;
    -100 marks samples that do not count.

    Args:
        classes: The number of classes, for messages; None if unknown.
        weights: Class weights of the loss.
    """

    name: ClassVar[str] = "classification"
    divergence_name: ClassVar[str] = "kl_divergence"
    invariant: ClassVar[bool] = True
    classes: int | None = None
    weights: tuple[float, ...] | None = None

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {"accuracy": "maximize", **LIKELIHOOD}

    def predict(self, output: Any, batch: Any) -> Prediction:
        logits = main_output(output, self.name)
        targets = whole_numbers(self.targets_of(batch), self.name)
        check_length(logits, targets, self.name)
        if targets.dim() == 2 and targets.shape[1] == 1:
            targets = targets[:, 0]
        if logits.dim() == targets.dim() or (logits.shape[-1] == 1 and logits.dim() == 2):
            return self._binary(logits.reshape(len(logits), -1), targets)
        if logits.dim() != 2 or targets.dim() != 1:
            raise DataError(
                f"classification takes logits (N, C) and targets (N,), but the model returns "
                f"{tuple(logits.shape)} for targets {tuple(targets.shape)}; for a class at each "
                "position use the task 'segmentation' (N, C, ...) or 'masked_lm' (N, T, C)."
            )
        return self._categorical(logits, targets)

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        check_some(sums, self.name)
        found = {"accuracy": float(sums["correct"] / sums["count"])}
        return found | likelihood_metrics(sums)

    def check(self, samples: Samples, where: str, output: Any) -> None:
        check_labels(samples, where, self._outputs(output))
        super().check(samples, where, output)

    def check_targets(self, targets: Tensor, output: Any, where: str, row: int) -> None:
        super().check_targets(targets, output, where, row)
        check_classes(whole_numbers(targets, self.name), self._outputs(output), where, row)

    def describe(self) -> str:
        if self.classes == 1:
            return "classification of 2 classes by one logit"
        return f"classification of {self.classes} classes" if self.classes else "classification"

    def _binary(self, logits: Tensor, targets: Tensor) -> Prediction:
        if targets.dim() != 1 or logits.shape[1] != 1:
            raise DataError(
                f"one logit a sample needs targets (N,), but the model returns "
                f"{tuple(logits.shape)} for targets {tuple(targets.shape)}."
            )
        counts = targets != IGNORED
        if bool(((targets != 0) & (targets != 1) & counts).any()):
            raise DataError(
                "the model returns one logit a sample, so targets must be 0 or 1, but there is "
                f"{int(targets[counts].max())}; give a model with an output for each class."
            )
        # The logit of class 1 beside 0 for class 0: the softmax of both is the logistic function.
        return self._categorical(torch.cat([torch.zeros_like(logits), logits], 1), targets)

    def _categorical(self, logits: Tensor, targets: Tensor) -> Prediction:
        weights = class_weights(self.weights, logits.shape[1], self.name)
        return Categorical(logits, targets, weights=weights)

    def _outputs(self, output: Any) -> int:
        """The number of classes that an output distinguishes."""
        logits = main_output(output, self.name)
        return 2 if logits.dim() == 1 or logits.shape[-1] == 1 else logits.shape[-1]


@final
@dataclass(frozen=True, kw_only=True)
class MultiLabel(Task):
    """Several labels a sample, each yes or no.

    The model returns logits (N, L); targets (N, L) are bool, 0 and 1, or probabilities in [0, 1];
    -100 marks labels that do not count.

    Args:
        weights: Weights of the positive labels in the loss.
    """

    name: ClassVar[str] = "multilabel"
    divergence_name: ClassVar[str] = "kl_divergence"
    invariant: ClassVar[bool] = True
    weights: tuple[float, ...] | None = None

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {"f1": "maximize", "accuracy": "maximize", **LIKELIHOOD}

    def predict(self, output: Any, batch: Any) -> Prediction:
        logits = main_output(output, self.name)
        targets = self.targets_of(batch)
        check_length(logits, targets, self.name)
        if logits.shape != targets.shape or logits.dim() < 2:
            raise DataError(
                f"the task 'multilabel' takes logits and targets of one shape (N, L), but the "
                f"model returns {tuple(logits.shape)} for targets {tuple(targets.shape)}."
            )
        targets = targets.float()
        counts = targets != IGNORED
        check_unit(targets[counts], self.name)
        weights = class_weights(self.weights, logits[0].numel(), self.name)
        flat = logits.flatten(1)
        kept = None if bool(counts.all()) else counts.flatten(1)
        return Bernoulli(flat, targets.clamp_min(0).flatten(1), kept, weights)

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        check_some(sums, self.name)
        positives = float(sums["positives"])
        f1 = 2 * float(sums["true_positives"]) / positives if positives else 1.0
        accuracy = float(sums["correct"] / sums["labels"])
        return {"f1": f1, "accuracy": accuracy, **likelihood_metrics(sums)}

    def describe(self) -> str:
        return "several labels a sample"


def likelihood_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Loss and divergences in nats from the sums of `Categorical` or `Bernoulli`."""
    found = {}
    if "loss" in sums:
        weight = sums["weight"] if "weight" in sums else sums["labels"]
        found["loss"] = float(sums["loss"] / weight)
    if "kl" in sums:
        found["kl_divergence"] = float(sums["kl"] / sums["count"])
        found["reverse_kl"] = float(sums["reverse_kl"] / sums["count"])
    return found
