"""Quality objectives: accuracy, loss, divergence from the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.nn import functional

from rankNAS.objectives.base import Direction, EvaluationResult, ObjectiveBase

__all__ = [
    "Accuracy",
    "KLDivergence",
    "Loss",
    "ReverseKL",
    "accuracy",
    "kl_divergence",
    "loss",
    "reverse_kl",
]


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Top-1 accuracy; logits (*targets.shape, classes)."""
    return float((logits.argmax(-1) == targets).double().mean())


def loss(logits: Tensor, targets: Tensor) -> float:
    """Mean cross entropy in nats, or mean squared error for real-valued targets."""
    if targets.is_floating_point():
        return float(functional.mse_loss(logits.double(), targets.double().reshape(logits.shape)))
    flat = logits.reshape(-1, logits.shape[-1]).double()
    return float(functional.cross_entropy(flat, targets.reshape(-1)))


def kl_divergence(logits: Tensor, dense_logits: Tensor) -> float:
    """Mean KL(dense || compressed) in nats; 0 for equal distributions."""
    log_p = functional.log_softmax(dense_logits.double(), -1)
    log_q = functional.log_softmax(logits.double(), -1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def reverse_kl(logits: Tensor, dense_logits: Tensor) -> float:
    """Mean KL(compressed || dense) in nats: penalises mass on classes that dense rules out."""
    return kl_divergence(dense_logits, logits)


@final
@dataclass(frozen=True)
class Accuracy(ObjectiveBase):
    """Classification accuracy on the validation data, in [0, 1]."""

    name: str = "accuracy"
    direction: Direction = "maximize"

    def measure(self, candidate: EvaluationResult) -> float:
        return accuracy(candidate.logits, candidate.targets)


@final
@dataclass(frozen=True)
class Loss(ObjectiveBase):
    """Loss on the validation data: cross entropy in nats, or mean squared error."""

    name: str = "loss"
    direction: Direction = "minimize"

    def measure(self, candidate: EvaluationResult) -> float:
        return loss(candidate.logits, candidate.targets)


@final
@dataclass(frozen=True)
class KLDivergence(ObjectiveBase):
    """Divergence from the dense model's outputs, KL(dense || compressed) in nats."""

    name: str = "kl_divergence"
    direction: Direction = "minimize"

    def measure(self, candidate: EvaluationResult) -> float:
        return kl_divergence(candidate.logits, candidate.dense_logits)


@final
@dataclass(frozen=True)
class ReverseKL(ObjectiveBase):
    """Divergence from the dense model's outputs, KL(compressed || dense) in nats."""

    name: str = "reverse_kl"
    direction: Direction = "minimize"

    def measure(self, candidate: EvaluationResult) -> float:
        return reverse_kl(candidate.logits, candidate.dense_logits)
