"""Training configuration and its default length."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rankNAS.data.samples import Samples
from rankNAS.data.sizes import PASS, affordable_samples
from rankNAS.exceptions import UsageError

__all__ = [
    "Refinement",
    "TrainingConfig",
    "affordable_training",
    "default_config",
    "default_steps",
    "steps_per_epoch",
]

# PyTorch on two CPU cores trains at 6 to 12 thousand million forward multiply-adds per second
# (ResNet-18 and ResNet-20 at 32 x 32), so this budget takes 40 to 85 s. It gives ResNet-18 12
# epochs on the digits; with 9 epochs, one of two seeds stayed below 97 % validation accuracy.
_FORWARD_MACS = 500_000_000_000


_MOST_EPOCHS = 60


@dataclass(frozen=True)
class TrainingConfig:
    """Configuration of a training.

    Attributes:
        epochs: Passes over the data.
        max_steps: Largest number of steps, possibly within an epoch; the schedule ends there too.
        batch_size: Inputs per step.
        learning_rate: Peak learning rate, after linear warm-up and before cosine decay to 0
            (Loshchilov & Hutter 2017).
        weight_decay: Applied to matrices and kernels; biases and norms are exempt.
        optimizer: ``"sgd"`` with Nesterov momentum 0.9, or ``"adamw"``.
        distill: Weight in [0, 1] of the teacher's soft targets (Hinton et al. 2015).
        temperature: Softmax temperature of teacher and student in the distillation term.
        label_smoothing: Share of the label spread over all classes (Szegedy et al. 2016).
        augment: Whether to augment images, as the data set allows; see `Augmentation`.
        clip: Largest gradient norm of a step; None for no limit. Low-rank factors may have
            gradients so large that training diverges.
        seed: Random seed of the order, the augmentation and dropout. A study replaces it with
            its own.
    """

    epochs: int
    max_steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    distill: float = 0.0
    temperature: float = 4.0
    label_smoothing: float = 0.0
    augment: bool = True
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check("epochs", self.epochs, self.epochs >= 1, "at least 1")
        _check(
            "max_steps",
            self.max_steps,
            self.max_steps is None or self.max_steps >= 1,
            "≥ 1 or None",
        )
        _check("batch_size", self.batch_size, self.batch_size >= 2, "at least 2")
        _check("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "above 0")
        _check("clip", self.clip, self.clip is None or self.clip > 0, "above 0 or None")
        _check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _check("optimizer", self.optimizer, self.optimizer in ("sgd", "adamw"), "sgd or adamw")
        _check("distill", self.distill, 0 <= self.distill <= 1, "in [0, 1]")
        _check("temperature", self.temperature, 0 < self.temperature < math.inf, "above 0")
        _check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)")

    def to_json(self) -> dict[str, Any]:
        """The fields, as part of what identifies a training."""
        found = asdict(self)
        if self.clip is None:  # checkpoints from before `clip` existed
            del found["clip"]
        return found


@dataclass(frozen=True)
class Refinement:
    """Configuration of a block-wise refinement; see `refine`.

    Attributes:
        samples: Training samples, at most; their labels are not used.
        blocks: Neighbouring blocks that are trained together.
        steps: Steps of the optimiser for them.
        learning_rate: Peak learning rate of Adam, after linear warm-up and before cosine decay.
        batch_size: Samples per step, at most.
    """

    samples: int = 4096
    blocks: int = 2
    steps: int = 300
    learning_rate: float = 1e-3
    batch_size: int = 32

    def __post_init__(self) -> None:
        _check("samples", self.samples, self.samples >= 2, "at least 2")
        _check("blocks", self.blocks, self.blocks >= 1, "at least 1")
        _check("steps", self.steps, self.steps >= 1, "at least 1")
        _check("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "above 0")
        _check("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")


def _check(field: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise UsageError(f"{field} is {value!r}, but it must be {expected}.")


def default_steps(macs: int, images: int, batch_size: int) -> int:
    """The number of steps of a training of about a minute on two CPU cores.

    It depends only on the cost of the network, so it is equal on every machine. The training
    stops after at most 60 epochs.

    Args:
        macs: Multiply-adds of one forward pass of one input.
        images: The size of the training set.
        batch_size: Inputs per step.
    """
    affordable = _FORWARD_MACS // (max(macs, 1) * batch_size)
    return max(1, min(affordable, _MOST_EPOCHS * steps_per_epoch(images, batch_size)))


def default_config(macs: int, images: int, *, seed: int = 0) -> TrainingConfig:
    """The configuration for training from random weights, used when no weights are given.

    Args:
        macs: Multiply-adds of one forward pass of one input.
        images: The size of the training set.
        seed: The random seed.
    """
    batch_size = 64
    steps = default_steps(macs, images, batch_size)
    epochs = math.ceil(steps / steps_per_epoch(images, batch_size))
    return TrainingConfig(
        epochs, max_steps=steps, batch_size=batch_size, learning_rate=0.02, seed=seed
    )


def affordable_training(config: TrainingConfig, samples: Samples) -> TrainingConfig:
    """The configuration with smaller batches where samples are sequences of many tokens."""
    size = max(2, affordable_samples(config.batch_size, samples, 2 * PASS))
    return replace(config, batch_size=size)


def steps_per_epoch(images: int, batch_size: int, least: int = 2) -> int:
    """The number of batches per epoch; a last batch of fewer images than `least` is dropped."""
    full, rest = divmod(images, batch_size)
    return max(1, full + (rest >= least))
