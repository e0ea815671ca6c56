"""Short supervised training, with optional distillation from the dense network.

It trains the dense example networks and fine-tunes compressed ones, in the loop that all recipes
share (`rankNAS.recovery.loop`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rankNAS.data.images.augment import NO_FLIP, Augmentation
from rankNAS.data.samples import Samples, Source
from rankNAS.data.splits import Splits
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.loop import Loop
from rankNAS.recovery.losses import loss_function
from rankNAS.recovery.precision import in_float32
from rankNAS.tasks.base import Task
from rankNAS.tasks.infer import examples, infer_task

__all__ = ["RECIPE_VERSION", "Recovery", "train"]

RECIPE_VERSION = 1  # part of the key of cached results; increment it when `train` changes


def train(
    network: nn.Module,
    data: Source,
    config: TrainingConfig,
    *,
    task: Task | None = None,
    augmentation: Augmentation = NO_FLIP,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[int], object] | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Train ``network`` in place.

    Args:
        network: The network. It stays on ``device``, in evaluation mode. Weights of 16 bits are
            trained in float32 and rounded at the end.
        data: The samples.
        config: The training configuration.
        task: Reads batches and outputs; found from a first batch if None.
        augmentation: The augmentation that the data allows, for tasks whose targets it keeps.
        teacher: The teacher network, used if ``config.distill`` is above 0; it is moved to
            ``device`` and put in evaluation mode.
        device: The device to train on.
        on_step: Called after each step with its number from 1, the number of steps and the loss.
        on_epoch: Called after each epoch with its number from 1; it may evaluate the network.
        checkpoint: Written at the end of each epoch and every minute; training resumes from it if
            it exists.

    Returns:
        The same ``network``.

    Raises:
        UsageError: The loss is not finite, or there is no teacher although one is needed.
        WeightsError: ``checkpoint`` is damaged or of another training; nothing has changed.
        WriteError: ``checkpoint`` cannot be written; that of the last epoch is intact.
    """
    device = torch.device(device)
    samples = Samples.of(data)
    if task is None:
        task = infer_task(network.to(device), examples(network, samples))
    with in_float32(network):
        Loop(
            network,
            samples,
            task,
            config,
            loss_function(config, task, teacher, device),
            augmentation=augmentation,
            device=device,
            checkpoint=checkpoint,
            identity={"recipe": RECIPE_VERSION},
            on_step=on_step,
            on_epoch=on_epoch,
        ).run()
    return network


@dataclass(frozen=True)
class Recovery:
    """A training that is identical for every network, with the dense network as the teacher.

    Args:
        data: The training samples.
        task: Reads batches and outputs.
        config: The training configuration.
        augmentation: The augmentation that the data allows.
    """

    data: Samples
    task: Task
    config: TrainingConfig
    augmentation: Augmentation = NO_FLIP

    @classmethod
    def of(
        cls,
        splits: Splits,
        task: Task,
        config: TrainingConfig,
        seed: int,
        samples: int | None = None,
    ) -> Recovery:
        """The training of a study.

        Args:
            splits: The training data and its augmentation.
            task: Reads batches and outputs.
            config: The training configuration; its seed is replaced.
            seed: The seed of the study.
            samples: Largest number of training samples, drawn by the seed; None for all.
        """
        count = len(splits.training) if samples is None else samples
        data = splits.training.subsample(count, seed)
        return cls(data, task, replace(config, seed=seed), splits.augmentation)

    def train(
        self,
        network: nn.Module,
        dense: nn.Module,
        *,
        device: torch.device | str = "cpu",
        on_epoch: Callable[[int], object] | None = None,
    ) -> nn.Module:
        """Train a network in place; see `train`.

        Raises:
            RankNASError: The loss is not finite.
        """
        return train(
            network,
            self.data,
            self.config,
            task=self.task,
            augmentation=self.augmentation,
            teacher=dense,
            device=device,
            on_epoch=on_epoch,
        )
