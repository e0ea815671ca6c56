"""Recipe ``distil``: labels and the dense network's predictions, for a small budget of epochs.

The loss is the task's loss and the divergence from the dense network, whose outputs for a fixed
set of augmentations are kept. Decay acts on the product of factors, the weights are averaged, and
batch norms are re-estimated at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rankNAS.compression.batch_norm import has_batch_norm, reestimate_batch_norm, tracking_layers
from rankNAS.recovery.features import Features
from rankNAS.recovery.loop import Place
from rankNAS.recovery.parts import Average, Part
from rankNAS.recovery.products import ProductDecay, chains
from rankNAS.recovery.recipe import Job, Recipe, Setup
from rankNAS.recovery.teacher import Teacher
from rankNAS.tasks.base import Prediction
from rankNAS.tasks.feeding import input_batches
from rankNAS.trees import has_images

__all__ = ["Distil"]

#: Of SGD for networks with batch norms, which bear more; 0.01 to 0.1 were compared on ResNet-20.
NORMALISED_RATE = 0.1
NORMALISED = 2048  # samples from which batch norms are re-estimated


@dataclass(frozen=True, kw_only=True)
class Distil(Recipe):
    """Distillation from the dense network.

    Args:
        distill: Weight in [0, 1] of the divergence from the dense network; the rest is that of the
            labels. Without labels it is 1.
        temperature: Softmax temperature of the divergence; None is 4, for language models 1.
        features: Weight of the distance between feature maps of decomposed layers; above 0, the
            dense network runs in every step.
        decay: Weight decay: of the products of factors, and of other matrices and kernels.
        ema: Limit of the decay of the average of the weights; 0 averages nothing.
        augmentations: Augmentations of each sample, which come again in turns; the dense network
            runs once for each. Other samples than images come in the same batches in every epoch.
            0 draws new augmentations and batches in every epoch.
        cache: Gigabytes of the dense network's outputs, at most; what exceeds them is computed
            again.
        top: Of a larger vocabulary, so many of the most likely tokens are kept.
    """

    name: ClassVar[str] = "distil"
    distill: float = 0.9
    temperature: float | None = None
    features: float = 0.0
    decay: float = 5e-4
    ema: float = 0.998
    augmentations: int = 4
    cache: float = 1.0
    top: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("distill", 0 <= self.distill <= 1, "in [0, 1]")
        self._require("temperature", (self.temperature or 1) > 0, "above 0")
        self._require("ema", 0 <= self.ema < 1, "in [0, 1)")
        self._require("top", self.top >= 1, "at least 1")
        for name in ("features", "decay", "augmentations", "cache"):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "0 or more")

    @property
    def needs_dense(self) -> bool:
        return self.distill > 0 or self.features > 0

    def default_rate(self, optimizer: str, job: Job) -> float:
        if optimizer == "sgd" and has_batch_norm(job.network):
            return NORMALISED_RATE
        return super().default_rate(optimizer, job)

    @property
    def other_decay(self) -> float:
        return self.decay

    def smoothing(self, job: Job) -> float:
        """Share of a label that is spread over all classes."""
        return 0.0

    @contextmanager
    def prepared(self, job: Job) -> Iterator[Setup]:
        with ExitStack() as stack:
            loss, variants = self.loss(job, stack)
            yield Setup(loss, self.parts(job), variants)

    def parts(self, job: Job) -> list[Part]:
        """What happens beside the loss."""
        found: list[Part] = []
        if self.decay:
            found.append(ProductDecay(job.network, self.decay, self.config(job).optimizer))
        if self.ema:
            found.append(Average(job.network, self.ema))
        if has_batch_norm(job.network):
            found.append(BatchNorms(job))
        return found

    def loss(self, job: Job, stack: ExitStack) -> tuple[Any, int]:
        """The loss, and the number of variants of the batches."""
        share = self.distill if job.task.labelled else 1.0
        smoothing = self.smoothing(job)
        if not share and not self.features:
            return (lambda batch, prediction, place: prediction.loss(smoothing)), 0
        assert job.dense is not None
        temperature = self.temperature or (1.0 if job.language else 4.0)
        keeps = self.cache > 0 and not self.features
        bytes_kept = int(self.cache * 1e9) if keeps else 0
        teacher = Teacher(job.dense, job.task, job.device, temperature, bytes_kept, self.top)
        stack.callback(teacher.close)
        layers = None
        if self.features:
            paths = [chain.path for chain in chains(job.network)]
            layers = Features(job.network, job.dense, paths)
            stack.enter_context(layers.recorded())

        def loss(batch: Any, prediction: Prediction, place: Place | None) -> Tensor:
            reference = teacher.prediction(batch, place)
            found = share * prediction.distillation(reference, temperature)
            if share < 1:
                found = found + (1 - share) * prediction.loss(smoothing)
            if layers is not None and layers.paths:
                found = found + self.features * layers.distance()
            return found

        augmented = self.augment and job.task.invariant
        augmented = augmented and has_images(job.task.inputs_of(job.data.example()))
        variants = self.augmentations if augmented else min(1, self.augmentations)
        return loss, variants if keeps else 0


class BatchNorms(Part):
    """Batch-norm statistics, re-estimated for the final weights.

    Args:
        job: The network and the data.
    """

    def __init__(self, job: Job) -> None:
        self.network = job.network
        samples = job.data.subsample(NORMALISED, job.seed)
        self.inputs = None
        if len(samples) > 1:
            self.inputs = input_batches(samples, 256, task=job.task, device=job.device, even=True)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        layers = tracking_layers(self.network)
        kept = [{name: b.clone() for name, b in layer.named_buffers()} for layer in layers]
        self.average()
        try:
            yield
        finally:
            for layer, buffers in zip(layers, kept, strict=True):
                for name, buffer in layer.named_buffers():
                    buffer.copy_(buffers[name])

    def average(self) -> None:
        if self.inputs is not None:
            reestimate_batch_norm(self.network, self.inputs)
