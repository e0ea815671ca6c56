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

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankNAS.decompositions.norms import Target
from rankNAS.exceptions import RankNASError
from rankNAS.threads import limited_threads

__all__ = ["NestedBasis", "diagonal_blocks", "nested_basis"]

#: By type, relative to a feature's squared norm.
JITTER = {torch.float64: (1e-8, 1e-6, 1e-4, 1e-2), torch.float32: (1e-6, 1e-5, 1e-4)}
TOLERANCE = 1e-4  # of errors in single precision, relative to the energy
SAMPLED, SIGNS = (0.1, 0.4, 0.7, 1.0), 8  # parts of the ranks, and sums of rows, in the check
BLOCK = 384  # columns of a block of the Cholesky factorisation


@dataclass(frozen=True)
class NestedBasis:
    """Features of every rank and their optimal output map.

    Args:
        basis: Phi by block, (g, b, R, w).
        columns: Columns of W in each block, (b, w).
        scale: Reciprocal norms of the features, (g, K); zero for dead ones.
        L: Cholesky factor of Phi C Phi^T for features of unit norm, (g, K, K), in single or double
            precision.
        M: W C Phi^T L^-T, (g, o, K).
        HM: H M, (g, o, K), of which errors are computed; M itself once they are known.
        energy: ||H W C^1/2||_F^2.
        jitter: Added to the diagonal of Phi C Phi^T, relative to a feature's squared norm.
    """

    basis: Tensor
    columns: Tensor
    scale: Tensor
    L: Tensor
    M: Tensor
    HM: Tensor
    energy: float
    jitter: float = 0.0

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

    def slim(self, dtype: torch.dtype) -> NestedBasis:
        """The basis in a type, without what errors are computed from."""
        tensors = {n: getattr(self, n).to(dtype) for n in ("basis", "scale", "L", "M")}
        return replace(self, HM=tensors["M"], **tensors)

    def pair(self) -> tuple[Tensor, Tensor]:  # (g, o, R), (g, R, n)
        """For one block: matrices A and B with What_r = A[:, :r] B[:r], M and L^-1 Phi."""
        features = self.basis[:, 0].double() * self.scale.unsqueeze(-1)
        order = torch.empty_like(self.columns[0])
        order[self.columns[0]] = torch.arange(len(order), device=order.device)
        with limited_threads(self.L.shape[-1]):
            B = torch.linalg.solve_triangular(self.L.double(), features, upper=False)
        return self.M, B[:, :, order]

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
            L = self.L[:, :m, :m]
            A = torch.linalg.solve_triangular(L, M.to(L.dtype), upper=False, left=False)
        scaled: Tensor = A.to(self.scale) * self.scale[:, None, :m]
        return scaled

    def multiply(self, output_map: Tensor) -> Tensor:  # (g, o, rank b) -> (g, o, n)
        """output_map Phi, with columns in the order of W."""
        g, o, m = output_map.shape
        A = output_map.reshape(g, o, m // self.blocks, self.blocks)
        by_block = torch.einsum("gorb,gbrw->gobw", A, self.basis[:, :, : A.shape[2]])
        W = by_block.new_empty(g, o, self.columns.numel())
        W[:, :, self.columns.flatten()] = by_block.flatten(2)
        return W


def nested_basis(
    target: Target, basis: Tensor, columns: Tensor, image: Tensor | None = None
) -> NestedBasis:
    """The nested least-squares solution for given features.

    Wide layers are solved in single precision, see `Target.precision`. A sample of the errors is
    compared with its definition; if they differ, the layer is solved again in double precision.

    Args:
        target: The weight and the norm.
        basis: Phi by block, (g, b, R, w); the scale of a row is arbitrary, dead rows are zero.
            Blocks that share one basis should share its memory (`torch.Tensor.expand`).
        columns: Columns of W in each block, (b, w).
        image: Phi C (g, K, n), columns in the order of W, if it is known.
    """
    if target.precision == torch.float32 and not target.ill_conditioned:
        found = _solved(target, basis, columns, image, torch.float32)
        if found is not None and _difference(found, target) <= TOLERANCE:
            return found
        target.ill_conditioned.add(True)
    found = _solved(target, basis, columns, image, torch.float64)
    found = found or _solved(target.repaired, basis, columns, None, torch.float64)
    if found is None:
        raise RankNASError("the second moment of a layer's inputs has negative eigenvalues.")
    return found


def _solved(
    target: Target, basis: Tensor, columns: Tensor, image: Tensor | None, dtype: torch.dtype
) -> NestedBasis | None:
    """The nested basis, with the Gram matrix and its Cholesky factor of a type.

    None if the matrix is too ill-conditioned for the type.
    """
    gram, norms = _gram(target, basis, columns, image, dtype)
    alive = norms > 0
    scale = torch.where(alive, norms.clamp_min(1e-300).rsqrt(), torch.zeros_like(norms))
    cross = apply(basis, columns, target.WC.mT) * scale.unsqueeze(-1)  # (g, K, o)
    with limited_threads(gram.shape[-1]):
        found = _cholesky(gram)
        if found is None:
            return None
        L, jitter = found
        # The cross moments of unit features are at most the root of the energy.
        unit = max(target.energy, 0.0) ** 0.5 or 1.0
        M = torch.linalg.solve_triangular(L, (cross / unit).to(dtype), upper=False)
    M = (M.double() * unit).mT.contiguous()
    return NestedBasis(basis, columns, scale, L, M, target.norm.left(M), target.energy, jitter)


def apply(basis: Tensor, columns: Tensor, X: Tensor) -> Tensor:  # (g, n, m) -> (g, K, m)
    """Phi X, features ordered by rank first, rows of X in the order of W's columns.

    A basis that all blocks share is applied in one product if block is the last index of W's
    columns. Otherwise the blocks' rows must lie together; X is copied if they do not.
    """
    g, b, R, w = basis.shape
    order = torch.arange(b * w, device=X.device)
    if b > 1 and basis.stride(1) == 0 and torch.equal(columns, order.reshape(w, b).T):
        shared: Tensor = basis[:, 0] @ X.reshape(g, w, -1)
        return shared.reshape(g, R * b, -1)
    if not torch.equal(columns, order.reshape(b, w)):
        X = X[:, columns.flatten()]
    by_block: Tensor = basis @ X.unflatten(1, (b, w))  # (g, b, R, m)
    return by_block.transpose(1, 2).reshape(g, R * b, -1)


def _gram(
    target: Target, basis: Tensor, columns: Tensor, image: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Phi C Phi^T for features of unit norm (g, K, K), and the squared norms (g, K) in float64.

    Features are ordered by rank first. The matrix is complete only on and above its diagonal.
    """
    g, b, R, _ = basis.shape
    C, unit = target.scaled_C(dtype)
    small = basis.to(dtype) if basis.stride(1) else basis[:, :1].to(dtype).expand_as(basis)
    if C is None:
        gram = small.new_zeros(g, R, b, R, b)
        for i in range(b):
            gram[:, :, i, :, i] = small[:, i] @ small[:, i].mT
        gram = gram.reshape(g, R * b, R * b)
    else:
        found = apply(small, columns, C) if image is None else (image / unit).to(dtype)
        gram = _upper(small, columns, found)
    norms = gram.diagonal(dim1=-2, dim2=-1).to(torch.float64, copy=True)
    alive = norms > 0
    scale = torch.where(alive, norms.clamp_min(1e-300).rsqrt(), torch.zeros_like(norms)).to(dtype)
    gram.mul_(scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))
    gram.diagonal(dim1=-2, dim2=-1).fill_(1)
    return gram, norms * unit


def _upper(basis: Tensor, columns: Tensor, image: Tensor) -> Tensor:  # (g, K, n) -> (g, K, K)
    """Phi image^T on and above the diagonal, by blocks; zero below them."""
    g, b, R, _ = basis.shape
    gram = image.new_zeros(g, R * b, R * b)
    step = max(1, BLOCK // b, -(-R // 8))  # ranks of a block
    for start in range(0, R, step):
        stop = min(start + step, R)
        rows = image[:, start * b : stop * b]
        part = apply(basis[:, :, :stop], columns, rows.mT)
        gram[:, : stop * b, start * b : stop * b] = part
    return gram


def _cholesky(gram: Tensor) -> tuple[Tensor, float] | None:  # (g, K, K), unit diagonal
    """Cholesky factor, with jitter for nearly dependent features; the matrix is overwritten.

    Without jitter their coefficients would be large and cancel, which float32 and training do not
    tolerate. The relative error grows by at most the jitter.
    """
    ladder = JITTER[gram.dtype]
    # Without jitter, pivots must be large; with it, the first suffices unless C is singular.
    for jitter, least in ((0.0, ladder[0] ** 0.5), *((jitter, 0.0) for jitter in ladder)):
        if _factor(gram, jitter, least):
            return gram.tril_(), jitter
    return None


def _factor(gram: Tensor, jitter: float, least: float) -> bool:
    """Write the Cholesky factor of gram + jitter, by blocks; false at the first pivot <= `least`.

    Only what lies above the unit diagonal is read, and only the rest is written, so that a
    failure, which is found early, leaves the matrix for another attempt. Blocks use the speed of
    matrix products, which LAPACK's factorisation does not reach.
    """
    K = gram.shape[-1]
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        left, below = gram[:, start:stop, :start], gram[:, stop:, :start]  # of the factor
        above = gram[:, start:stop, start:stop].triu(1)
        corner = torch.baddbmm(above + above.mT, left, left.mT, alpha=-1)
        corner.diagonal(dim1=-2, dim2=-1).add_(1 + jitter)
        corner, info = torch.linalg.cholesky_ex(corner)
        if info.any() or not corner.diagonal(dim1=-2, dim2=-1).amin() > least:
            return False
        gram[:, start:stop, start:stop] = corner + above
        rest = torch.baddbmm(gram[:, start:stop, stop:], left, below.mT, alpha=-1)
        rest = torch.linalg.solve_triangular(corner, rest, upper=False)
        gram[:, stop:, start:stop] = rest.mT
    return True


def _difference(nested: NestedBasis, target: Target) -> float:
    """The rounding error of the errors, or what jitter adds to them, relative to the energy.

    At some ranks the error is measured on random signed sums of the rows of H (W - What), whose
    mean square is the squared norm. The sums are the same on both sides.
    """
    g, o, K = nested.HM.shape
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(SAMPLED), SIGNS, o), generator=generator)
    Z = (2.0 * signs - 1).to(nested.HM)
    kept = torch.arange(K, device=Z.device) < torch.tensor(
        [[math.ceil(part * K / nested.blocks) * nested.blocks] for part in SAMPLED],
        device=Z.device,
    )  # (ranks, K)
    rows = (Z @ nested.HM.unsqueeze(1)) * kept.unsqueeze(1)  # (g, ranks, signs, K)
    A = nested.solve(rows.flatten(1, 2))
    D = (Z @ target.HW.unsqueeze(1)).flatten(1, 2) - nested.multiply(A)
    C, unit = target.scaled_C(target.precision)
    right = D if C is None else (D.to(C.dtype) @ C).double() * unit
    measured = (right * D).sum(-1)  # (g, ranks signs)
    whole = (Z @ target.HWC.unsqueeze(1) * (Z @ target.HW.unsqueeze(1))).sum(-1).flatten(1)
    units = torch.where(nested.scale > 0, 1 / nested.scale, 0.0).unsqueeze(1)
    jitter = nested.jitter * (A * units).square().sum(-1)
    difference = measured - whole + rows.flatten(1, 2).square().sum(-1) - jitter
    by_rank = torch.stack([difference, jitter]).unflatten(2, (len(SAMPLED), SIGNS))
    return float(by_rank.mean(3).sum(1).abs().max()) / (target.energy or 1.0)


def diagonal_blocks(C: Tensor | None, columns: Tensor) -> Tensor | None:
    """The diagonal blocks (g, b, w, w) of C for columns (b, w)."""
    return None if C is None else C[:, columns.unsqueeze(2), columns.unsqueeze(1)]
