"""Recipe ``plain``: a short supervised training with distillation, as ``--finetune`` does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, final

from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.losses import loss_function
from rankNAS.recovery.recipe import Job, Recipe, Setup

__all__ = ["Plain"]


@final
@dataclass(frozen=True, kw_only=True)
class Plain(Recipe):
    """SGD on labels and soft targets.

    Args:
        distill: Weight in [0, 1] of the dense network's soft targets (Hinton et al. 2015).
        temperature: Softmax temperature of the soft targets.
        weight_decay: Applied to matrices and kernels, factors apart.
        label_smoothing: Share of the label spread over all classes (Szegedy et al. 2016).
    """

    name: ClassVar[str] = "plain"
    epochs: int = 5
    distill: float = 0.5
    temperature: float = 4.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    speed: str = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        TrainingConfig(
            1,
            distill=self.distill,
            temperature=self.temperature,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
        )

    @property
    def needs_dense(self) -> bool:
        return self.distill > 0

    def default_rate(self, optimizer: str, job: Job) -> float:
        return 3e-4 if optimizer == "adamw" else 0.01

    @property
    def other_decay(self) -> float:
        return self.weight_decay

    def config(self, job: Job) -> TrainingConfig:
        return replace(
            super().config(job),
            distill=self.distill,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
        )

    @contextmanager
    def prepared(self, job: Job) -> Iterator[Setup]:
        yield Setup(loss_function(self.config(job), job.task, job.dense, job.device))
