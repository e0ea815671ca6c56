"""Error norms in which truncations are optimal.

Notation, per group of a layer folded to W (o, n):

    C (n, n)   second moment of the input patches
    G (o, o)   second moment of the loss gradient at the output
    H (o, o)   any matrix with H^T H = G

The error of an approximation What is ||H (W - What) C^1/2||_F^2. ``weight`` sets C = G = 1.
``input`` takes C from data (DRONE, Chen et al., NeurIPS 2021). ``fisher`` takes both from data:
the Kronecker-factored curvature (K-FAC) of Martens and Grosse (2015) as a norm. ``pooled`` is
``input`` with the pooled covariance of Bolaco (Ji et al., EMNLP Findings 2024), the average of the
covariances within groups of samples, which is more robust to outliers. With centring and a bias
correction of the mean error, it is their atomic feature mimicking: a PCA of the layer's outputs.
``asvd`` scales each column of W by the square root of the mean absolute value of its input (ASVD,
Yuan et al., 2023, arXiv 2312.05821, with their exponent of 0.5), so C is the diagonal matrix of
these values.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from rankNAS.exceptions import UsageError
from rankNAS.renamed import renamed
from rankNAS.threads import limited_threads

__all__ = [
    "NORMS",
    "ErrorNorm",
    "NormName",
    "Statistics",
    "Target",
    "factor_root",
    "make_norm",
    "matrix_root",
]

NormName = Literal["weight", "input", "fisher", "pooled", "asvd"]
NORMS: tuple[NormName, ...] = get_args(NormName)
WIDE = 1024  # columns from which single precision saves more than its check takes
RIDGE = 1e-6  # relative to the mean diagonal; statistics of few samples are rank-deficient


@renamed(moment="input_second_moment", gradient="output_gradient_second_moment")
@dataclass(frozen=True)
class Statistics:
    """Calibration statistics of one layer, all in float64.

    Args:
        input_second_moment: Mean outer product of the input patches, (g, n, n); for ``pooled``
            the pooled covariance plus the outer product of the mean; for ``asvd`` the diagonal
            matrix of the mean absolute inputs.
        mean: Mean input patch, (g, n); for ``pooled`` the average of the groups' means.
        output_gradient_second_moment: Mean outer product of the loss gradient at the output,
            (g, o, o), or None.
    """

    input_second_moment: Tensor
    mean: Tensor
    output_gradient_second_moment: Tensor | None = None


@dataclass(frozen=True)
class ErrorNorm:
    """The error norm of one layer.

    Args:
        C: (g, n, n), or None for the identity.
        H: (g, o, o) with H^T H = G, or None for the identity.
        mean: Mean input patch (g, n) if the mean of the error is corrected elsewhere (by the
            bias or by a following batch norm), so that C is a covariance; None otherwise.
    """

    C: Tensor | None = None
    H: Tensor | None = None
    mean: Tensor | None = None

    def left(self, x: Tensor) -> Tensor:  # (g, o, m) -> (g, o, m)
        """H x."""
        return x if self.H is None else self.H.to(x) @ x

    def right(self, x: Tensor) -> Tensor:  # (g, o, n) -> (g, o, n)
        """X C."""
        return x if self.C is None else x @ self.C

    def energy(self, W: Tensor) -> Tensor:  # (g, o, n) -> ()
        """||H W C^1/2||_F^2, summed over the groups."""
        HW = self.left(W)
        return (self.right(HW) * HW).sum()


@dataclass(frozen=True, eq=False)
class Target:
    """The approximation target: one layer's weight and its error norm, with cached products.

    Args:
        weight: (g, o, c, kh, kw), of any real type.
        norm: The error norm.
    """

    weight: Tensor
    norm: ErrorNorm
    #: Not empty once a Gram matrix of the layer was too ill-conditioned for single precision.
    ill_conditioned: set[bool] = field(default_factory=set, init=False, repr=False)

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

    def relative(self, squares: Tensor) -> list[float]:
        """Squared norms relative to the energy; zero if that is zero."""
        found: list[float] = (squares / self.energy if self.energy else squares * 0).tolist()
        return found

    @cached_property
    def column_moment(self) -> Tensor | None:
        """Mean over kw of the blocks of C for equal positions in kw, (g, c kh, c kh)."""
        return _block_mean(self.norm.C, self.weight.shape[4])

    @cached_property
    def channel_moment(self) -> Tensor | None:
        """Mean over kh and kw of the blocks of C for equal positions, (g, c, c)."""
        return _block_mean(self.column_moment, self.weight.shape[3])

    @cached_property
    def precision(self) -> torch.dtype:
        """The type for Gram matrices: single for wide layers, unless the weight is double."""
        wide = self.W.shape[2] >= WIDE and self.weight.dtype != torch.float64
        return torch.float32 if wide else torch.float64

    @cached_property
    def repaired(self) -> Target:
        """The target in a norm whose C is positive definite.

        Rounding of a covariance that is small against the mean leaves negative eigenvalues.
        """
        C = self.norm.C
        assert C is not None
        with limited_threads(C.shape[-1]):
            values, vectors = torch.linalg.eigh(C)
        least = RIDGE * values.clamp_min(0).mean(-1, keepdim=True)
        C = (vectors * torch.maximum(values, least).unsqueeze(-2)) @ vectors.mT
        return Target(self.weight, replace(self.norm, C=C))

    def scaled_C(self, dtype: torch.dtype) -> tuple[Tensor | None, float]:
        """C divided by a number, in a type, and the number, which avoids under- and overflow."""
        C = self.norm.C
        if C is None or dtype == C.dtype:
            return C, 1.0
        return self._single

    @cached_property
    def _single(self) -> tuple[Tensor, float]:
        C = self.norm.C
        assert C is not None
        unit = float(C.diagonal(dim1=-2, dim2=-1).abs().max()) or 1.0
        return torch.div(C, unit, out=torch.empty_like(C, dtype=torch.float32)), unit


def _block_mean(C: Tensor | None, positions: int) -> Tensor | None:
    """Mean over the last index of rows and columns, where it is the same for both."""
    if C is None or positions == 1:
        return C
    width = C.shape[-1] // positions
    by_position = C.unflatten(2, (width, positions)).unflatten(1, (width, positions))
    mean: Tensor = by_position.diagonal(dim1=2, dim2=4).mean(-1)
    return mean


def make_norm(
    name: NormName, statistics: Statistics | None = None, *, centred: bool = False
) -> ErrorNorm:
    """The error norm of a layer from its statistics.

    Args:
        name: ``weight``, ``input``, ``fisher``, ``pooled`` or ``asvd``.
        statistics: The calibration statistics; not needed for ``weight``.
        centred: Measure only the variance of the error. This is right if its mean is removed by a
            bias or by a following batch norm whose statistics are re-estimated.

    Raises:
        UsageError: The name is unknown, or its statistics are missing.
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
    if centred and name != "asvd":  # which has no second moment to centre
        mean = statistics.mean.double()
        C = C - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    C = ridged(C)
    if name != "fisher":
        return ErrorNorm(C, None, mean)
    assert statistics.output_gradient_second_moment is not None
    G = ridged(statistics.output_gradient_second_moment.double())
    return ErrorNorm(C, factor_root(G).mT, mean)


def ridged(A: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
    """A second moment with a ridge: a small multiple of its mean diagonal."""
    scale = A.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(scale > 0, scale * RIDGE, torch.ones_like(scale))
    A = A.clone()
    A.diagonal(dim1=-2, dim2=-1).add_(scale.unsqueeze(-1))
    return A


def factor_root(A: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
    """A matrix B with B B^T = A, for a positive semi-definite A; its Cholesky factor if possible.

    It takes a fraction of the time of the symmetric root.
    """
    with limited_threads(A.shape[-1]):
        L, info = torch.linalg.cholesky_ex(A)
    return matrix_root(A) if info.any() or not L.isfinite().all() else L


def matrix_root(A: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
    """The symmetric square root of a positive semi-definite matrix."""
    with limited_threads(A.shape[-1]):
        values, vectors = torch.linalg.eigh(A)
    root: Tensor = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
    return root
