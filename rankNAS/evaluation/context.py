"""The context of a search: the model, its factors and its data, on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rankNAS.compression.factorisation import Factorisation
from rankNAS.data.splits import Splits
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.io.files import cache_folder
from rankNAS.io.fingerprints import fingerprint
from rankNAS.phases import Phases
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.trainer import Recovery
from rankNAS.tasks.base import Task
from rankNAS.trees import named_tensors

__all__ = ["Progress", "SearchContext", "silent"]

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class SearchContext:
    """State of a search that is built once and shared by all trials, strategies and budgets.

    Args:
        factorisation: The dense model, its space and its factors.
        splits: Training, calibration, validation and test data.
        evaluator: Evaluates allocations.
        task: What the model is for.
        device: Where to run.
        seed: The random seed.
        report: Called with a stage's name, the steps done, and the total number of steps.
        phases: CPU seconds by phase.
        complete: Whether all layers were factorised for all their choices; false if a time limit
            ended before, and only the choices of uniform answers are there.
    """

    factorisation: Factorisation
    splits: Splits
    evaluator: Evaluator
    task: Task
    device: torch.device | str = "cpu"
    seed: int = 0
    report: Progress = silent
    phases: Phases = field(default_factory=Phases)
    complete: bool = True

    def dense(self) -> dict[str, float]:
        """Metrics of the dense model on the validation data, and its costs."""
        space = self.factorisation.space
        return {**self.evaluator.dense(), **self.evaluator.costs(space.dense)}

    def recovery(self, config: TrainingConfig, samples: int | None = None) -> Recovery:
        """A training on the study's training data, with the study's seed.

        Args:
            config: The training configuration; its seed is replaced.
            samples: Maximum number of training samples; None for all.
        """
        return Recovery.of(self.splits, self.task, config, self.seed, samples)

    def checkpoint(self, key: str) -> Path:
        """Path for the state of a long computation; equal for equal models, data and keys.

        Args:
            key: All other dependencies of the computation, in words.
        """
        tensors = dict(self.factorisation.model.state_dict())
        for i, batch in enumerate(self.splits.calibration.batches(256)):
            tensors |= {f"calibration {i} {name}": x for name, x in named_tensors(batch)}
        return cache_folder() / "checkpoints" / f"{fingerprint(tensors, f'{self.seed} {key}')}.pt"
