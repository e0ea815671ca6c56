"""The optimiser of a training, and its learning rate at each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from rankNAS.exceptions import UsageError
from rankNAS.recovery.config import TrainingConfig

__all__ = ["learning_rate", "make_optimizer"]

WARM_UP = 0.1  # of all steps


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up to ``peak``, then a cosine that would be 0 at ``step == total``."""
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up + 1) / (total - warm_up + 1))) / 2


def make_optimizer(
    network: nn.Module, config: TrainingConfig, exempt: set[int]
) -> torch.optim.Optimizer:
    """The optimiser of what is trained; vectors and exempt parameters have no weight decay."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise UsageError(
            "all parameters of the network are frozen, so there is nothing to train; call "
            "model.requires_grad_() before, or leave the training out."
        )
    decayed = [p.dim() > 1 and id(p) not in exempt for p in parameters]
    pairs = list(zip(parameters, decayed, strict=True))
    groups = [
        {"params": [p for p, own in pairs if own], "weight_decay": config.weight_decay},
        {"params": [p for p, own in pairs if not own], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)
