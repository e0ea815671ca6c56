"""The optimiser of a training, its learning rate at each step, and the steps of its epochs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import final

import torch
from torch import nn

from rankNAS.exceptions import UsageError
from rankNAS.recovery.config import TrainingConfig

__all__ = ["Epochs", "learning_rate", "make_optimizer"]

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


@final
class Epochs:
    """Which steps belong to which epoch.

    Args:
        steps: The steps of the first epochs; all later ones have as many as the last of these.

    >>> epochs = Epochs([4, 2])
    >>> [epochs.of(step) for step in range(9)], epochs.total(3)
    ([0, 0, 0, 0, 1, 1, 2, 2, 3], 8)
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self._ends = list(accumulate(steps))
        self._last = steps[-1]

    def of(self, step: int) -> int:
        """The epoch of a step; both are numbered from 0."""
        later = step - self._ends[-1]
        if later >= 0:
            return len(self._ends) + later // self._last
        return bisect_right(self._ends, step)

    def total(self, count: int) -> int:
        """The steps of the first `count` epochs, which are 1 or more."""
        known = min(count, len(self._ends))
        return self._ends[known - 1] + (count - known) * self._last
