"""Training losses: the task's loss and distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.exceptions import UsageError
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.loop import Loss, Place
from rankNAS.tasks.base import Prediction, Task

__all__ = ["loss_function"]


def loss_function(
    config: TrainingConfig, task: Task, teacher: nn.Module | None, device: torch.device
) -> Loss:
    """The loss as a function of a batch, the network's prediction for it and the batch's place.

    Args:
        config: The weights of its terms. Without labels, the teacher's prediction is the only
            target, whatever ``config.distill`` is.
        task: Reads batches and outputs.
        teacher: The teacher network, used if ``config.distill`` is above 0 or there are no labels.
        device: The device of the teacher.

    Raises:
        UsageError: A teacher is needed and there is none.
    """
    share = config.distill if task.labelled else 1.0
    if share == 0:
        return lambda batch, prediction, place: prediction.loss(config.label_smoothing)
    if teacher is None:
        why = f"distill is {config.distill}" if task.labelled else "the data have no labels"
        raise UsageError(
            f"{why}, but there is no teacher; give the dense network as teacher"
            + (" or set distill to 0." if task.labelled else ".")
        )
    guide = teacher.to(device).eval()

    def loss(batch: Any, prediction: Prediction, place: Place | None) -> Tensor:
        with torch.no_grad():
            reference = task.run(guide, batch)
        soft = prediction.distillation(reference, config.temperature)
        if share == 1:
            return soft
        return (1 - share) * prediction.loss(config.label_smoothing) + share * soft

    return loss
