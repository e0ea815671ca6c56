"""Nested bases: one factorisation that is optimal, at every rank, for its own input features.

All operators map the input patch x (n,) to features Phi x, and features to outputs. They differ
only in the structure of Phi: its columns form b blocks of width w = n / b, and each rank adds one
feature to every block. Given Phi, the best output map in the norm
||H (W - A Phi) C^1/2||_F is a least-squares solution that does not depend on H. With the Cholesky
factor L of Phi C Phi^T, features ordered by rank first and block second,

    M = W C Phi^T L^-T,    What_r = M[:, :m] L[:m, :m]^-1 Phi[:m],    m = r b,

so every rank is a slice, and its error is exactly

    ||H W C^1/2||_F^2 - sum of the squares of the first m columns of H M.

This refits the second layer of a grouped decomposition jointly over its groups; the group-wise
singular value decomposition of ALDS does not.

Notation: g groups of the layer, b blocks, w block width, R largest rank, K = R b.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankNAS.decompositions.norms import Target, matrix_root
from rankNAS.threads import limited_threads

__all__ = ["NestedBasis", "diagonal_blocks", "leading_rows", "nested_basis"]

JITTER = (1e-8, 1e-6, 1e-4, 1e-2)  # relative to a feature's squared norm
DEAD = 1e-13  # relative squared norm below which a direction is rounding noise


@dataclass(frozen=True)
class NestedBasis:
    """Features of every rank and their optimal output map.

    Args:
        basis: Phi by block, (g, b, R, w).
        columns: Columns of W in each block, (b, w).
        scale: Reciprocal norms of the features, (g, K); zero for dead ones.
        L: Cholesky factor of Phi C Phi^T for features of unit norm, (g, K, K).
        M: W C Phi^T L^-T, (g, o, K).
        HM: H M, (g, o, K).
        energy: ||H W C^1/2||_F^2.
    """

    basis: Tensor
    columns: Tensor
    scale: Tensor
    L: Tensor
    M: Tensor
    HM: Tensor
    energy: float

    @property
    def blocks(self) -> int:
        """b, the number of features per unit of rank."""
        return self.basis.shape[1]

    def head(self, rank: int) -> NestedBasis:
        """The first ranks alone, as a copy."""
        m = rank * self.blocks
        return replace(
            self,
            basis=self.basis[:, :, :rank].clone(),
            scale=self.scale[:, :m].clone(),
            L=self.L[:, :m, :m].clone(),
            M=self.M[:, :, :m].clone(),
            HM=self.HM[:, :, :m].clone(),
        )

    def errors(self) -> Tensor:  # (R + 1,)
        """Relative error at rank 0, 1, …, R."""
        scores = self.HM.square().sum((0, 1)).reshape(-1, self.blocks).sum(1)
        kept = torch.cat([scores.new_zeros(1), scores.cumsum(0)])
        return (1 - kept / self.energy).clamp(0, 1) if self.energy > 0 else kept * 0

    def output_map(self, rank: int) -> Tensor:  # (g, o, rank b)
        """The map from the first features, ordered by rank first, to the outputs."""
        m = rank * self.blocks
        return self.solve(self.M[:, :, :m])

    def solve(self, M: Tensor) -> Tensor:  # (g, *, m) -> (g, *, m)
        """M L^-1: coefficients on the orthonormal features converted to the features Phi."""
        m = M.shape[-1]
        with limited_threads(m):
            A = torch.linalg.solve_triangular(self.L[:, :m, :m], M, upper=False, left=False)
        scaled: Tensor = A * self.scale[:, None, :m]
        return scaled

    def multiply(self, output_map: Tensor) -> Tensor:  # (g, o, rank b) -> (g, o, n)
        """output_map Phi, with columns in the order of W."""
        g, o, m = output_map.shape
        A = output_map.reshape(g, o, m // self.blocks, self.blocks)
        by_block = torch.einsum("gorb,gbrw->gobw", A, self.basis[:, :, : A.shape[2]])
        W = by_block.new_empty(g, o, self.columns.numel())
        W[:, :, self.columns.flatten()] = by_block.flatten(2)
        return W


def nested_basis(target: Target, basis: Tensor, columns: Tensor) -> NestedBasis:
    """The nested least-squares solution for given features.

    Args:
        target: The weight and the norm.
        basis: Phi by block, (g, b, R, w); the scale of a row is arbitrary, dead rows are zero.
        columns: Columns of W in each block, (b, w).
    """
    g, b, R, w = basis.shape
    cross = torch.einsum("gobw,gbrw->gorb", target.WC[:, :, columns], basis).flatten(2)
    gram = _gram(target.norm.C, basis, columns)
    norms = gram.diagonal(dim1=-2, dim2=-1)
    alive = norms > 0
    scale = torch.where(alive, norms.clamp_min(1e-300).rsqrt(), torch.zeros_like(norms))
    gram = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    gram.diagonal(dim1=-2, dim2=-1).copy_(torch.ones_like(norms))
    with limited_threads(R * b):
        L = _cholesky(gram)
        M = torch.linalg.solve_triangular(
            L.mT, cross * scale.unsqueeze(-2), upper=True, left=False
        )  # (g, o, K)
    return NestedBasis(basis, columns, scale, L, M, target.norm.left(M), target.energy)


def _gram(C: Tensor | None, basis: Tensor, columns: Tensor) -> Tensor:  # (g, K, K)
    """Phi C Phi^T, features ordered by rank first."""
    g, b, R, w = basis.shape
    if C is None:
        gram = basis.new_zeros(g, R, b, R, b)
        for i in range(b):
            gram[:, :, i, :, i] = basis[:, i] @ basis[:, i].mT
        return gram.reshape(g, R * b, R * b)
    half = (basis @ C[:, columns])[..., columns]  # (g, b, R, b, w)
    return torch.einsum("gbrcw,gcsw->grbsc", half, basis).reshape(g, R * b, R * b)


def _cholesky(gram: Tensor) -> Tensor:  # (g, K, K), unit diagonal -> (g, K, K)
    """Cholesky factor, with jitter for nearly dependent features.

    Without jitter their coefficients would be large and cancel, which float32 and training do not
    tolerate. The relative error grows by at most the jitter.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    L: Tensor
    L, info = torch.linalg.cholesky_ex(gram)
    if not info.any() and L.diagonal(dim1=-2, dim2=-1).amin() >= JITTER[0] ** 0.5:
        return L
    for jitter in JITTER:  # the first suffices unless C is numerically singular
        L, info = torch.linalg.cholesky_ex(gram + jitter * eye)
        if not info.any():
            break
    return L


def leading_rows(
    T: Tensor, C: Tensor | None, R: int
) -> Tensor:  # (…, rows, w), (…, w, w) -> (…, R, w)
    """Unit rows whose first r span the best rank-r row space of T, for every r <= R.

    With T C^1/2 = U S V^T, these are the rows of U^T T. They are computed on the smaller side of T
    without an inverse, so a singular C is allowed (the output-side form of DRONE). Rows beyond
    the numerical rank are zero.

    Args:
        T: The matrix, already multiplied by H from the left.
        C: The norm on its columns, or None for the identity.
        R: Number of rows, at most ``min(rows, w)``.
    """
    if T.shape[-2] <= T.shape[-1]:
        energy = (T if C is None else T @ C) @ T.mT
        with limited_threads(energy.shape[-1]):
            values, U = torch.linalg.eigh(energy)
        rows = U.flip(-1)[..., :R].mT @ T
    else:
        N = T.mT @ T
        root = torch.eye(N.shape[-1], dtype=N.dtype, device=N.device)
        root = root if C is None else matrix_root(C)
        energy = root.mT @ N @ root
        with limited_threads(energy.shape[-1]):
            values, V = torch.linalg.eigh(energy)
        rows = V.flip(-1)[..., :R].mT @ root.mT @ N
    values = values.flip(-1)[..., :R]
    alive = values > DEAD * values[..., :1]
    unit: Tensor = torch.nn.functional.normalize(rows, dim=-1)
    kept: Tensor = unit * alive.unsqueeze(-1)
    return kept


def diagonal_blocks(C: Tensor | None, columns: Tensor) -> Tensor | None:
    """The diagonal blocks (g, b, w, w) of C for columns (b, w)."""
    return None if C is None else C[:, columns.unsqueeze(2), columns.unsqueeze(1)]
