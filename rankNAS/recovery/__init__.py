"""Winning back the accuracy that compression costs."""

from __future__ import annotations

from rankNAS.compression.batch_norm import has_batch_norm, reestimate_batch_norm
from rankNAS.recovery.training import (
    RECIPE_VERSION,
    TrainingConfig,
    default_config,
    default_steps,
    train,
)

__all__ = [
    "RECIPE_VERSION",
    "TrainingConfig",
    "default_config",
    "default_steps",
    "has_batch_norm",
    "reestimate_batch_norm",
    "train",
]
