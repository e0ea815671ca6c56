"""Recovery of accuracy after compression: training, refinement, batch-norm re-estimation."""

from __future__ import annotations

from rankNAS.compression.batch_norm import has_batch_norm, reestimate_batch_norm
from rankNAS.recovery.config import Refinement, TrainingConfig, default_config, default_steps
from rankNAS.recovery.trainer import RECIPE_VERSION, train

__all__ = [
    "RECIPE_VERSION",
    "Refinement",
    "TrainingConfig",
    "default_config",
    "default_steps",
    "has_batch_norm",
    "reestimate_batch_norm",
    "train",
]
