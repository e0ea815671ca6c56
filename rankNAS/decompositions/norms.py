"""The norm in which a truncation is optimal.

Notation, per group of a layer folded to W (o, n):

    C (n, n)   second moment of the input patches
    G (o, o)   second moment of the loss gradient at the output
    H (o, o)   any matrix with H^T H = G

The error of an approximation What is ||H (W - What) C^1/2||_F^2. ``weight`` takes C = G = 1,
``input`` takes C from data (DRONE, Chen et al., NeurIPS 2021), ``fisher`` takes both, which is the
Kronecker-factored curvature of Martens and Grosse (2015) used as a norm. ``pooled`` is ``input``
with the pooled covariance of Bolaco (Ji et al., EMNLP Findings 2024), less swayed by outliers: the
average of the covariances inside groups of samples. Centred and with the mean of the error
corrected in the bias, it is their atomic feature mimicking: a PCA of the layer's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from rankNAS.exceptions import UsageError
from rankNAS.renamed import renamed
from rankNAS.threads import limited_threads

__all__ = ["NORMS", "ErrorNorm", "NormName", "Statistics", "Target", "make_norm", "matrix_root"]

NormName = Literal["weight", "input", "fisher", "pooled"]
NORMS: tuple[NormName, ...] = get_args(NormName)
RIDGE = 1e-6  # of the mean diagonal: statistics of few samples are rank-deficient


@renamed(moment="input_second_moment", gradient="output_gradient_second_moment")
@dataclass(frozen=True)
class Statistics:
    """What calibration records of one layer, all in float64.

    Args:
        input_second_moment: Mean outer product of the input patches, (g, n, n); for ``pooled``
            the pooled covariance plus the outer product of the mean.
        mean: Mean input patch, (g, n); for ``pooled`` the average of the groups' means.
        output_gradient_second_moment: Mean outer product of the loss gradient at the output,
            (g, o, o), or None.
    """

    input_second_moment: Tensor
    mean: Tensor
    output_gradient_second_moment: Tensor | None = None


@dataclass(frozen=True)
class ErrorNorm:
    """A norm for the error of one layer.

    Args:
        C: (g, n, n), or None for the identity.
        H: (g, o, o) with H^T H = G, or None for the identity.
        mean: Mean input patch (g, n) when the mean of the error is corrected elsewhere (by the
            bias or by a following batch norm) and C is therefore a covariance; None otherwise.
    """

    C: Tensor | None = None
    H: Tensor | None = None
    mean: Tensor | None = None

    def left(self, x: Tensor) -> Tensor:  # (g, o, m) -> (g, o, m)
        """H x."""
        return x if self.H is None else self.H @ x

    def right(self, x: Tensor) -> Tensor:  # (g, o, n) -> (g, o, n)
        """X C."""
        return x if self.C is None else x @ self.C

    def energy(self, W: Tensor) -> Tensor:  # (g, o, n) -> ()
        """||H W C^1/2||_F^2, summed over the groups."""
        HW = self.left(W)
        return (self.right(HW) * HW).sum()


@dataclass(frozen=True, eq=False)
class Target:
    """What is approximated: one layer's weight in one metric. Its products are formed once.

    Args:
        weight: (g, o, c, kh, kw), of any real type.
        norm: The norm.
    """

    weight: Tensor
    norm: ErrorNorm

    @cached_property
    def W(self) -> Tensor:
        """The folded weight (g, o, n) in float64."""
        return self.weight.detach().double().flatten(2)

    @cached_property
    def HW(self) -> Tensor:
        """H W, (g, o, n)."""
        return self.norm.left(self.W)

    @cached_property
    def WC(self) -> Tensor:
        """W C, (g, o, n)."""
        return self.norm.right(self.W)

    @cached_property
    def HWC(self) -> Tensor:
        """H W C, (g, o, n)."""
        return self.norm.left(self.WC)

    @cached_property
    def energy(self) -> float:
        """||H W C^1/2||_F^2, summed over the groups."""
        return float((self.HWC * self.HW).sum())


def make_norm(
    name: NormName, statistics: Statistics | None = None, *, centred: bool = False
) -> ErrorNorm:
    """The metric of a layer from its statistics.

    Args:
        name: ``weight``, ``input``, ``fisher`` or ``pooled``.
        statistics: What calibration recorded; not needed for ``weight``.
        centred: Measure the variance of the error alone. Right where its mean is removed, by a
            bias or by a following batch norm whose statistics are re-estimated.

    Raises:
        UsageError: Unknown name, or the statistics it needs are missing.
    """
    if name not in NORMS:
        raise UsageError(f"`norm` must be one of {', '.join(NORMS)}, got {name!r}.")
    if name == "weight":
        return ErrorNorm()
    if statistics is None or (
        name == "fisher" and statistics.output_gradient_second_moment is None
    ):
        raise UsageError(f"the metric {name!r} needs calibration statistics of the layer.")
    C, mean = statistics.input_second_moment.double(), None
    if centred:
        mean = statistics.mean.double()
        C = C - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    C = ridged(C)
    if name != "fisher":
        return ErrorNorm(C, None, mean)
    assert statistics.output_gradient_second_moment is not None
    return ErrorNorm(
        C, matrix_root(ridged(statistics.output_gradient_second_moment.double())), mean
    )


def ridged(A: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
    """A second moment with a small multiple of its mean diagonal added to the diagonal."""
    scale = A.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(scale > 0, scale * RIDGE, torch.ones_like(scale))
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return A + scale[..., None, None] * eye


def matrix_root(A: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
    """The symmetric square root of a positive semi-definite matrix."""
    with limited_threads(A.shape[-1]):
        values, vectors = torch.linalg.eigh(A)
    root: Tensor = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
    return root
