"""Greedy low-rank compression of one gradient, without any communication.

The gradients of N workers are matrices ``G_i`` (n, m) with n <= m; taller ones are transposed, and
kernels are flattened to (outputs, rest). All workers share an orthonormal basis ``U`` (n, n), and
each keeps an error ``E_i`` (n, m). In a compressed step, with ``H_i = G_i + E_i``:

1. ``s_i = diag(U^T H_i V)`` for a shared Gaussian ``V`` (m, n). The square of the mean of the
   ``s_i`` is an unbiased estimate of the energy of the mean of the ``H_i`` along each direction.
2. ``P`` has the r directions of ``U`` with the largest squares, and ``R_i = P^T H_i`` is sent.
3. The gradient is ``P mean(R_i)``, and ``E_i = H_i - P R_i``.

References:
    Chen, He, Li, Jia and Yuan, 2025, arXiv 2507.08784: GreedyLore.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from rankNAS.tasks.base import at_least_float32

__all__ = ["Projection", "basis_of", "estimates", "is_worth_while", "selected"]


def basis_of(gradient: Tensor) -> Tensor:
    """All left singular vectors (n, n) of a gradient (n, m); unit vectors if it is not finite."""
    if bool(gradient.isfinite().all()):
        found: Tensor = torch.linalg.svd(gradient, full_matrices=False).U
        return found
    return torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)


def estimates(coordinates: Tensor, probe: Tensor) -> Tensor:
    """One number (n,) for each direction, linear in the gradient.

    Args:
        coordinates: The gradient in the basis, ``U^T H``, (n, m).
        probe: Standard normal numbers (n, m), equal for all workers.
    """
    return (coordinates * probe).sum(1)


def selected(means: Tensor, rank: int) -> Tensor:
    """The numbers (r,) of the directions with the largest squared means (n,), in order."""
    return means.square().topk(rank).indices.sort().values


def is_worth_while(shape: torch.Size, rank: int, rate: float) -> bool:
    """Whether a gradient is at least so many times as large as its compressed form."""
    if len(shape) < 2:
        return False
    size = shape.numel()
    return rank * max(shape[0], size // max(1, shape[0])) * rate < size


@final
class Projection:
    """What a worker keeps of a parameter between steps, and its part in a compressed step.

    Args:
        shape: The shape of the parameter, with 2 axes or more.
        rank: The number of directions that are sent, at most.

    Attributes:
        basis: ``U``, (n, n); None before the first refresh.
        error: ``E``, (n, m).
    """

    def __init__(self, shape: torch.Size, rank: int) -> None:
        self.shape = shape
        rows, columns = shape[0], math.prod(shape[1:])
        self.tall = rows > columns
        self.size = (min(rows, columns), max(rows, columns))  # n, m
        self.rank = min(rank, self.size[0])
        self.basis: Tensor | None = None
        self.error = torch.zeros(self.size)
        self._pending: tuple[Tensor, Tensor] | None = None  # H, and U^T H
        self._directions: Tensor | None = None

    def with_error(self, gradient: Tensor) -> Tensor:
        """``H = G + E`` in the shape of the gradient; the error is 0 afterwards."""
        found = self._restored(self._matrix(gradient) + self.error.to(gradient.device))
        self.error = torch.zeros_like(self.error)
        return found.to(gradient.dtype)

    def refresh(self, mean: Tensor) -> None:
        """Take the basis of the mean gradient of all workers; the error is 0 afterwards."""
        self.basis = basis_of(self._matrix(mean))
        self.error = torch.zeros_like(self.error)

    def begin(self, gradient: Tensor, generator: torch.Generator) -> Tensor:
        """The estimates (n,) of this worker.

        Args:
            gradient: ``G_i``, in the shape of the parameter.
            generator: A generator on the CPU, in an equal state for all workers.
        """
        assert self.basis is not None
        H = self._matrix(gradient) + self.error.to(gradient.device)
        self.basis = self.basis.to(H)  # that of a checkpoint is on the CPU
        coordinates = self.basis.T @ H
        self._pending = H, coordinates
        return estimates(coordinates, torch.randn(self.size, generator=generator).to(H))

    def part(self, means: Tensor) -> Tensor:
        """``R_i`` (r, m), which is sent; what is not becomes the error.

        Args:
            means: The mean estimates (n,) of all workers.
        """
        assert self._pending is not None and self.basis is not None
        H, coordinates = self._pending
        self._pending, self._directions = None, selected(means, self.rank)
        sent = coordinates[self._directions]
        self.error = H - self.basis[:, self._directions] @ sent
        return sent

    def end(self, mean: Tensor) -> Tensor:
        """The gradient in the shape of the parameter, from the mean (r, m) of all parts."""
        assert self.basis is not None and self._directions is not None
        return self._restored(self.basis[:, self._directions] @ mean)

    def _matrix(self, gradient: Tensor) -> Tensor:
        matrix = at_least_float32(gradient.detach()).reshape(self.shape[0], -1)
        return matrix.T if self.tall else matrix

    def _restored(self, matrix: Tensor) -> Tensor:
        return (matrix.T if self.tall else matrix).reshape(self.shape)
