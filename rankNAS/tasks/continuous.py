"""Predictions of real numbers: regression targets, or the outputs of the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from rankNAS.exceptions import DataError
from rankNAS.tasks.base import Prediction, Sums, at_least_float32, held, number

__all__ = ["ROUNDING", "Gaussian", "Outputs", "normalised_distance"]

ROUNDING = 1e-13  # of a variance from float64 sums, relative to the sum of squares


@final
@dataclass(frozen=True, eq=False)
class Gaussian(Prediction):
    """Means of N independent normal distributions over D outputs of equal relative precision.

    Args:
        mean: (N, D).
        targets: (N, D), floating point.
    """

    mean: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error."""
        mean = at_least_float32(self.mean)
        return torch.nn.functional.mse_loss(mean, self.targets.to(mean.dtype))

    def sampled_loss(self, generator: torch.Generator) -> Tensor:
        """Half the squared distance, in units of each output's standard deviation in the batch."""
        mean = at_least_float32(self.mean)
        return _sampled(mean, _deviation(mean.detach()), generator)

    def distillation(self, reference: Prediction, temperature: float = 1.0) -> Tensor:
        """Mean squared distance from the teacher's outputs."""
        assert isinstance(reference, Gaussian)
        return torch.nn.functional.mse_loss(
            at_least_float32(self.mean), at_least_float32(reference.mean)
        )

    @torch.no_grad()
    def sums(self, reference: Prediction | None) -> Sums:
        x, y = self.mean.double(), self.targets.double()
        found = {
            "count": number(len(x), x.device),
            "squared": (x - y).square().sum(0),
            "absolute": (x - y).abs().sum(0),
            "target": y.sum(0),
            "target_squares": y.square().sum(0),
        }
        if reference is not None:
            assert isinstance(reference, Gaussian)
            r = reference.mean.double()
            found["distance"] = (x - r).square().sum(0)
            found["reference"] = r.sum(0)
            found["reference_squares"] = r.square().sum(0)
        return found

    def kept(self, most_bytes: int) -> Prediction | None:
        if self.nbytes > most_bytes:
            return None
        mean = held(self.mean)
        return Gaussian(mean, mean[:0])  # a reference needs no targets

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes


@final
@dataclass(frozen=True, eq=False)
class Outputs(Prediction):
    """All floating-point tensors of an output, compared with those of the dense model.

    Args:
        tensors: One or more, each with a sample along axis 0.
        counts: Positions (N, T) that count; None if all do.
    """

    tensors: Sequence[Tensor]
    counts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tensors[0]) if self.tensors[0].dim() else 1

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        raise DataError("the task has no labels; train with a teacher alone (distill=1).")

    def sampled_loss(self, generator: torch.Generator) -> Tensor:
        """Half the squared distance, in units of each tensor's standard deviation."""
        parts = [self._part(x) for x in self.tensors if x.requires_grad]
        if not parts:
            raise DataError(
                "no floating-point tensor of the model's output depends on its weights; give "
                "norm='input', which needs no gradients."
            )
        losses = [
            _sampled(x, x.detach().double().std(correction=0).to(x), generator) for x in parts
        ]
        return torch.stack([loss.float() for loss in losses]).sum()

    def distillation(self, reference: Prediction, temperature: float = 1.0) -> Tensor:
        """Squared distance from the teacher's outputs relative to their variance."""
        assert isinstance(reference, Outputs)
        losses = []
        for x, r in zip(self.tensors, reference.tensors, strict=True):
            x, r = self._part(x), self._part(r)
            variance = r.var(correction=0).clamp_min(torch.finfo(r.dtype).tiny)
            losses.append((x - r).square().mean() / variance)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def sums(self, reference: Prediction | None) -> Sums:
        device = self.tensors[0].device
        found = {"count": number(len(self), device)}
        if reference is None:
            return found
        assert isinstance(reference, Outputs)
        rows = []
        for x, r in zip(self.tensors, reference.tensors, strict=True):
            if x.shape != r.shape:
                raise DataError(
                    f"an output has the shape {tuple(x.shape)}, but that of the dense model has "
                    f"{tuple(r.shape)}; give Custom(loss, metrics, divergence)."
                )
            x, r = self._part(x).double(), self._part(r).double()
            size = number(r.numel(), r.device)
            rows.append(torch.stack([(x - r).square().sum(), r.sum(), r.square().sum(), size]))
        distance, total, squares, sizes = torch.stack(rows).to(device).T
        found |= {"distance": distance, "reference": total, "reference_squares": squares}
        return found | {"sizes": sizes}

    def kept(self, most_bytes: int) -> Prediction | None:
        if self.nbytes > most_bytes:
            return None
        return Outputs([held(x) for x in self.tensors])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def _part(self, x: Tensor) -> Tensor:
        """The positions that count, if the tensor has them."""
        mask, x = self.counts, at_least_float32(x)
        return x[mask] if mask is not None and x.shape[: mask.dim()] == mask.shape else x


def normalised_distance(distance: Tensor, total: Tensor, squares: Tensor, count: Tensor) -> float:
    """The mean over outputs of the squared distance relative to the reference's variance.

    Outputs that are constant in the reference count by their squares, or, if they are 0, not at
    all.

    Args:
        distance: Sums of squared distances (D,).
        total: Sums of the reference (D,).
        squares: Sums of its squares (D,).
        count: The number of terms of each sum.
    """
    variance = squares - total.square() / count
    constant = variance <= ROUNDING * squares
    scale = torch.where(constant, squares, variance)
    kept = scale > 0
    if not bool(kept.any()):
        return float(distance.sum())
    return float((distance[kept] / scale[kept]).mean())


def _sampled(mean: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    """The loss whose gradient at a mean is standard normal noise over the deviation."""
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    return (mean * (noise / scale)).sum()


def _deviation(mean: Tensor) -> Tensor:
    """The standard deviation of each output over the batch; that of all where it is 0."""
    if len(mean) < 2:
        return torch.ones_like(mean[0])
    found = mean.std(0, correction=0)
    overall = mean.std(correction=0)
    return torch.where(found > 1e-6 * overall, found, overall)
