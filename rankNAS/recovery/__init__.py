"""Recovery of accuracy after compression: recipes of training, refinement, batch norms."""

from __future__ import annotations

from rankNAS.compression.batch_norm import has_batch_norm, reestimate_batch_norm
from rankNAS.recovery.config import Refinement, TrainingConfig, default_config, default_steps
from rankNAS.recovery.recipe import RECIPES, Recipe, make_recipe
from rankNAS.recovery.trainer import RECIPE_VERSION, train

__all__ = [
    "RECIPES",
    "RECIPE_VERSION",
    "Recipe",
    "Refinement",
    "TrainingConfig",
    "default_config",
    "default_steps",
    "has_batch_norm",
    "make_recipe",
    "reestimate_batch_norm",
    "train",
]
