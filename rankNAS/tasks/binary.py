"""Predictions of independent yes-or-no labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from rankNAS.tasks.base import Prediction, Sums, at_least_float32, held, number

__all__ = ["Bernoulli"]


@final
@dataclass(frozen=True, eq=False)
class Bernoulli(Prediction):
    """Logits of N predictions of L independent labels; above 0 is yes.

    Predictions of which no label counts do not count themselves.

    Args:
        logits: (N, L).
        targets: Probabilities in [0, 1], (N, L).
        counts: Which labels count, bool (N, L); None for all.
        weights: Weights of the positive labels in the loss (L,).
    """

    logits: Tensor
    targets: Tensor
    counts: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.logits) if self.counts is None else int(self.counts.any(1).sum())

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        """Mean logistic loss of a label in nats."""
        logits = at_least_float32(self.logits)
        y = self.targets.to(logits.dtype)
        y = y * (1 - label_smoothing) + 0.5 * label_smoothing
        losses = self._losses(logits, y)
        if self.counts is None:
            return losses.mean()
        return losses[self.counts].sum() / self.counts.sum().clamp_min(1)

    def sampled_loss(self, generator: torch.Generator) -> Tensor:
        logits = at_least_float32(self.logits)
        probabilities = logits.detach().sigmoid()
        uniform = torch.rand(probabilities.shape, generator=generator).to(probabilities)
        sampled = (uniform < probabilities).to(logits.dtype)
        losses = functional.binary_cross_entropy_with_logits(logits, sampled, reduction="none")
        return self._counted(losses).sum()

    def distillation(self, reference: Prediction, temperature: float = 1.0) -> Tensor:
        """``T²`` times the mean over samples of the summed divergence of the labels."""
        assert isinstance(reference, Bernoulli)
        student, teacher = (at_least_float32(x.logits) / temperature for x in (self, reference))
        divergence = self._counted(_kl(teacher, student)).sum()
        return temperature**2 * divergence / max(1, len(self))

    @torch.no_grad()
    def sums(self, reference: Prediction | None) -> Sums:
        z, y = self._counted(self.logits).double(), self._counted(self.targets).double()
        yes, said = y > 0.5, z > 0
        found = {
            "count": number(len(self), z.device),
            "labels": number(z.numel(), z.device),
            "loss": self._counted(self._losses(self.logits.double(), self.targets.double())).sum(),
            "correct": (yes == said).double().sum(),
            "true_positives": (yes & said).double().sum(),
            "positives": yes.double().sum() + said.double().sum(),
        }
        if reference is not None:
            assert isinstance(reference, Bernoulli)
            dense, own = reference.logits.double(), self.logits.double()
            found["kl"] = self._counted(_kl(dense, own)).sum()
            found["reverse_kl"] = self._counted(_kl(own, dense)).sum()
        return found

    def kept(self, most_bytes: int) -> Prediction | None:
        if self.nbytes > most_bytes:
            return None
        logits = held(self.logits)
        return Bernoulli(logits, logits[:0])  # a reference needs no targets

    @property
    def nbytes(self) -> int:
        return self.logits.nbytes

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(logits)
        return functional.binary_cross_entropy_with_logits(
            logits, targets, reduction="none", pos_weight=weights
        )

    def _counted(self, values: Tensor) -> Tensor:
        return values if self.counts is None else values[self.counts]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL between Bernoulli distributions with logits p and q, elementwise."""
    yes, no = functional.logsigmoid(p), functional.logsigmoid(-p)
    return yes.exp() * (yes - functional.logsigmoid(q)) + no.exp() * (
        no - functional.logsigmoid(-q)
    )
