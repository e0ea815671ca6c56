"""Short supervised training, with or without the original network as a teacher.

It makes the dense networks of the examples and fine-tunes compressed ones. Everything random is
derived from the seed and the number of the epoch, so that a training resumed at the end of an
epoch gives the same weights as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from rankNAS.data.batches import batches, len_of
from rankNAS.data.images.augment import augment
from rankNAS.exceptions import RankNASError, UsageError
from rankNAS.io.checkpoints import read_checkpoint, write_checkpoint

__all__ = [
    "RECIPE_VERSION",
    "Recovery",
    "TrainingConfig",
    "default_config",
    "default_steps",
    "train",
]

RECIPE_VERSION = 1  # part of the key of cached results: raise it when `train` changes

# PyTorch on two CPU cores trains at 6 to 12 thousand million multiply-adds of the forward pass a
# second (ResNet-18 and ResNet-20 at 32 x 32), so that this many take 40 to 85 s. ResNet-18 on the
# digits gets 12 epochs out of it; with 9, one of two seeds stayed below 97 % in validation.
_FORWARD_MACS = 500_000_000_000
_MOST_EPOCHS = 60
_WARM_UP = 0.1  # of all steps


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        epochs: Passes over the data.
        max_steps: Stops earlier, possibly within an epoch; the schedule ends there too.
        batch_size: Inputs per step.
        learning_rate: The peak, reached after a linear warm-up and followed by a cosine to 0
            (Loshchilov & Hutter 2017).
        weight_decay: For matrices and kernels; biases and norms are exempt.
        optimizer: ``"sgd"`` with Nesterov momentum 0.9, or ``"adamw"``.
        distill: Weight in [0, 1] of the teacher's soft targets (Hinton et al. 2015).
        temperature: Softens teacher and student in that term.
        label_smoothing: Share of the label spread over all classes (Szegedy et al. 2016).
        augment: Whether to shift the images randomly.
        flip: Whether ``augment`` also mirrors them; wrong for digits and letters.
        clip: The largest norm of a step's gradient; None for no limit. Factors of a few ranks may
            have gradients that no learning rate for the rest can bear.
        seed: Of the order, the augmentation and dropout.
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
    flip: bool = False
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


def default_steps(macs: int, images: int, batch_size: int) -> int:
    """The number of steps for a training of about a minute on two CPU cores.

    It follows from the cost of the network alone, so that it is the same on every machine. A
    network so small that the minute would hold more than 60 epochs stops after those.

    Args:
        macs: Multiply-adds of one forward pass of one input.
        images: The size of the training set.
        batch_size: Inputs per step.
    """
    affordable = _FORWARD_MACS // (max(macs, 1) * batch_size)
    return max(1, min(affordable, _MOST_EPOCHS * _steps_per_epoch(images, batch_size)))


def default_config(macs: int, images: int, *, flip: bool, seed: int = 0) -> TrainingConfig:
    """The training from random weights that is used when the user gives no weights.

    Args:
        macs: Multiply-adds of one forward pass of one input.
        images: The size of the training set.
        flip: Whether mirrored images keep their class.
        seed: Of everything random.
    """
    batch_size = 64
    steps = default_steps(macs, images, batch_size)
    epochs = math.ceil(steps / _steps_per_epoch(images, batch_size))
    return TrainingConfig(
        epochs, max_steps=steps, batch_size=batch_size, learning_rate=0.02, flip=flip, seed=seed
    )


def train(
    network: nn.Module,
    dataset: Dataset[Any],
    config: TrainingConfig,
    *,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[int], object] | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Train ``network`` in place.

    Args:
        network: Gives logits (N, classes), or (N, T, classes) for targets (N, T). It stays on
            ``device``, in evaluation mode.
        dataset: Inputs and targets.
        config: How to train.
        teacher: The network to imitate when ``config.distill`` is above 0; it is moved to
            ``device`` and put in evaluation mode.
        device: Where to train.
        on_step: Called after each step with its number from 1, the number of steps and the loss.
        on_epoch: Called after each epoch with its number from 1; it may evaluate the network.
        checkpoint: Written at the end of each epoch, and continued from if it exists.

    Returns:
        The same ``network``.

    Raises:
        RankNASError: The loss is not finite.
        UsageError: ``config.distill`` is above 0 and there is no teacher.
        WeightsError: ``checkpoint`` is damaged or of another training; nothing has changed yet.
        WriteError: ``checkpoint`` cannot be written; the one of the last epoch is intact.
    """
    device = torch.device(device)
    loss_function = _loss_function(config, teacher, device)
    per_epoch = _steps_per_epoch(len_of(dataset), config.batch_size)
    total = min(config.epochs * per_epoch, config.max_steps or math.inf)
    run = _Run(network, dataset, config, device, loss_function, int(total), on_step)
    with _training_mode(network, device):
        if checkpoint is not None and checkpoint.is_file():
            run.load(checkpoint)
        while run.step < run.total:
            run.epoch(run.step // per_epoch)
            if checkpoint is not None:
                run.save(checkpoint)
            if on_epoch is not None:
                on_epoch(math.ceil(run.step / per_epoch))
                network.train()
    return network


@dataclass(frozen=True)
class Recovery:
    """A short training that every network gets alike, with the dense network as its teacher.

    Args:
        data: Inputs and targets.
        config: How to train.
    """

    data: Dataset[Any]
    config: TrainingConfig

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
            network, self.data, self.config, teacher=dense, device=device, on_epoch=on_epoch
        )


class _Run:
    """A training in progress: what changes from step to step."""

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset[Any],
        config: TrainingConfig,
        device: torch.device,
        loss_function: Callable[[Tensor, Tensor, Tensor], Tensor],
        total: int,
        on_step: Callable[[int, int, float], None] | None,
    ) -> None:
        self.network, self.dataset, self.config = network, dataset, config
        self.device, self.loss_function, self.total = device, loss_function, total
        self.on_step = on_step
        self.step = 0
        network.to(device)
        self.optimizer = _optimizer(network, config)

    def epoch(self, number: int) -> None:
        """Train for one pass over the data, or until the last step."""
        seed = _epoch_seed(self.config.seed, number)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of dropout
        for inputs, targets in self._batches(seed):
            if self.step == self.total:
                return
            if self.config.augment and inputs.dim() == 4:
                inputs = augment(inputs, generator, flip=self.config.flip)
            if self.device.type == "cpu" and inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            self._update(inputs, targets)

    def _batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.config.batch_size
        for inputs, targets in batches(self.dataset, size, device=self.device, shuffle_seed=seed):
            # A batch norm over 1 x 1 pixels can not be trained on a last batch of one image.
            if len(inputs) > 1 or len_of(self.dataset) == 1:
                yield inputs, targets

    def _update(self, inputs: Tensor, targets: Tensor) -> None:
        rate = _learning_rate(self.step, self.total, self.config.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss_function(inputs, self.network(inputs), targets)
        value = loss.item()
        if not math.isfinite(value):
            raise RankNASError(
                f"the loss is {value} at step {self.step + 1} of {self.total} with learning rate "
                f"{rate:.3g}; lower the learning rate."
            )
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.step += 1
        if self.on_step is not None:
            self.on_step(self.step, self.total, value)

    def save(self, path: Path) -> None:
        """Write all that ``load`` needs, as tensors and plain values."""
        content = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "identity": self._identity(),
        }
        write_checkpoint(path, content)

    def load(self, path: Path) -> None:
        """Continue where ``save`` was called."""
        content = read_checkpoint(path, self._identity())
        self.network.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]

    def _identity(self) -> dict[str, Any]:
        shapes = {name: list(tensor.shape) for name, tensor in self.network.state_dict().items()}
        config = asdict(self.config)
        if self.config.clip is None:  # as before there was a limit
            del config["clip"]
        return config | {
            "images": len_of(self.dataset),
            "recipe": RECIPE_VERSION,
            "shapes": shapes,
        }


def _check(field: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise UsageError(f"{field} is {value!r}, but it must be {expected}.")


def _steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of one epoch, without a last one of a single image."""
    full, rest = divmod(images, batch_size)
    return max(1, full + (rest > 1))


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**31


def _learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up to ``peak``, then a cosine that would be 0 at ``step == total``."""
    warm_up = max(1, round(_WARM_UP * total))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up + 1) / (total - warm_up + 1))) / 2


def _optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() > 1],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.dim() <= 1],
            "weight_decay": 0.0,
        },
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)


def _loss_function(
    config: TrainingConfig, teacher: nn.Module | None, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of (inputs, logits, targets)."""
    if config.distill == 0:
        return lambda inputs, logits, targets: _hard_loss(logits, targets, config)
    if teacher is None:
        raise UsageError(
            f"distill is {config.distill}, but there is no teacher; give the dense network as "
            "teacher or set distill to 0."
        )
    guide = teacher.to(device).eval()

    def loss(inputs: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            guide_logits = guide(inputs)
        soft = _soft_loss(logits, guide_logits, config.temperature)
        return (1 - config.distill) * _hard_loss(logits, targets, config) + config.distill * soft

    return loss


def _hard_loss(logits: Tensor, targets: Tensor, config: TrainingConfig) -> Tensor:
    return functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), label_smoothing=config.label_smoothing
    )


def _soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² KL(teacher ‖ student)``, whose gradients do not shrink with T (Hinton et al. 2015)."""
    divergence = functional.kl_div(
        functional.log_softmax(student.flatten(0, -2) / temperature, dim=-1),
        functional.log_softmax(teacher.flatten(0, -2) / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


@contextmanager
def _training_mode(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Train mode, torch's own random state set aside, and the faster memory format of the CPU.

    Channels-last convolutions were measured 2.6 times as fast. The weights are put back into the
    usual order, which safetensors and matrix decompositions expect.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        network.train()
        if device.type == "cpu":
            _reorder(network, torch.channels_last)
        try:
            yield
        finally:
            _reorder(network, torch.contiguous_format)
            network.eval()


def _reorder(network: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
