"""Leading rows: the features of the best approximations of a matrix, and what they miss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankNAS.decompositions.norms import factor_root
from rankNAS.threads import limited_threads

__all__ = ["Leading", "leading_rows", "row_map"]

DEAD = 1e-13  # relative squared norm below which a direction is rounding noise


@dataclass(frozen=True)
class Leading:
    """Rows that span the best row spaces of a batch of matrices T in a norm on their columns.

    Args:
        rows: Unit rows (…, R, w), the first r for rank r; zero beyond the numerical rank.
        tails: The squared norm of what the first 0, 1, …, R rows miss, summed over the batch.
    """

    rows: Tensor
    tails: Tensor


def leading_rows(T: Tensor, C: Tensor | None, R: int) -> Leading:  # (…, rows, w), (…, w, w)
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
        return row_map(T, T if C is None else T @ C, R)[1]
    N = T.mT @ T
    root = None if C is None else factor_root(C)  # root root^T = C
    energy = N if root is None else root.mT @ N @ root
    with limited_threads(energy.shape[-1]):
        values, V = torch.linalg.eigh(energy)
    coefficients = V.flip(-1)[..., :R].mT
    rows = (coefficients if root is None else coefficients @ root.mT) @ N
    unit: Tensor = torch.nn.functional.normalize(rows, dim=-1)
    return Leading(unit * _alive(values, R).unsqueeze(-1), _tails(values, R))


def row_map(T: Tensor, TC: Tensor, R: int) -> tuple[Tensor, Leading]:  # (…, rows, w) twice
    """The map (…, R, rows) from the rows of T to its leading rows, and these; TC is T C."""
    energy = TC @ T.mT
    with limited_threads(energy.shape[-1]):
        values, U = torch.linalg.eigh(energy)
    coefficients = U.flip(-1)[..., :R].mT
    rows = coefficients @ T
    scale = _alive(values, R).unsqueeze(-1) / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return coefficients * scale, Leading(rows * scale, _tails(values, R))


def _alive(values: Tensor, R: int) -> Tensor:
    """Mask of the R largest eigenvalues that are above rounding noise."""
    values = values.flip(-1)[..., :R]
    return values > DEAD * values[..., :1]


def _tails(values: Tensor, R: int) -> Tensor:
    """The sum of all but the r largest eigenvalues for r = 0, …, R, over the batch."""
    sums = torch.nn.functional.pad(values.clamp_min(0).cumsum(-1), (1, 0))
    return sums.flip(-1)[..., : R + 1].reshape(-1, R + 1).sum(0)
