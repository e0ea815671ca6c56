"""Training losses: cross-entropy and distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.exceptions import UsageError
from rankNAS.recovery.config import TrainingConfig

__all__ = ["hard_loss", "loss_function", "soft_loss"]


def loss_function(
    config: TrainingConfig, teacher: nn.Module | None, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss as a function of (inputs, logits, targets).

    Args:
        config: The weights of its terms.
        teacher: The teacher network, used if ``config.distill`` is above 0.
        device: The device of the teacher.

    Raises:
        UsageError: ``config.distill`` is above 0 and there is no teacher.
    """
    if config.distill == 0:
        return lambda inputs, logits, targets: hard_loss(logits, targets, config)
    if teacher is None:
        raise UsageError(
            f"distill is {config.distill}, but there is no teacher; give the dense network as "
            "teacher or set distill to 0."
        )
    guide = teacher.to(device).eval()

    def loss(inputs: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            guide_logits = guide(inputs)
        soft = soft_loss(logits, guide_logits, config.temperature)
        return (1 - config.distill) * hard_loss(logits, targets, config) + config.distill * soft

    return loss


def hard_loss(logits: Tensor, targets: Tensor, config: TrainingConfig) -> Tensor:
    """Cross-entropy of logits (…, classes) and labels, with label smoothing."""
    return functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), label_smoothing=config.label_smoothing
    )


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² KL(teacher ‖ student)``; T² keeps gradients independent of T (Hinton et al. 2015)."""
    divergence = functional.kl_div(
        functional.log_softmax(student.flatten(0, -2) / temperature, dim=-1),
        functional.log_softmax(teacher.flatten(0, -2) / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence
