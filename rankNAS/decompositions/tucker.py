"""Tucker-2 decomposition: 1 x 1, then k x k, then 1 x 1.

In the norm ``weight`` the factors are those of the higher-order SVD (De Lathauwer et al., SIAM J.
Matrix Anal. Appl. 2000; Kim et al., ICLR 2016, for convolutions). In the data-aware norms the
input factor comes from the channel blocks of C, the output factor from H W C W^T H^T, and the core
is the exact least-squares solution for these factors. The table of errors over both ranks is a
two-dimensional cumulative sum, so one factorisation serves all pairs.

Notation: (g, o, c, kh, kw) the weight, s = kh kw, rank (rank_out, rank_in).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from rankNAS.decompositions.base import ALLOWANCE, Factors, Operator, Rank, Wanted
from rankNAS.decompositions.leading import Leading, leading_rows
from rankNAS.decompositions.nested import NestedBasis, nested_basis
from rankNAS.decompositions.norms import Target
from rankNAS.decompositions.shapes import LayerShape, chain, pointwise
from rankNAS.threads import limited_threads

__all__ = ["Tucker2", "TuckerFactors"]

TIE = 1e-9  # relative weight of a tie-breaking criterion


@final
@dataclass(frozen=True)
class TuckerFactors(Factors):
    """Input basis, output basis U (g, o, o) and error table; refined bases take precedence."""

    operator: Operator
    shape: LayerShape
    nested: NestedBasis
    H: Tensor | None
    U: Tensor
    refined: dict[Rank, tuple[NestedBasis, Tensor]] = field(default_factory=dict)
    table: list[list[float]] = field(default_factory=list)

    def error(self, rank: Rank) -> float:
        if rank in self.refined:
            nested, U = self.refined[rank]
            return _errors(nested, U)[rank[0]][rank[1]]
        return self.table[rank[0]][rank[1]]

    def weight(self, rank: Rank) -> Tensor:
        _, core, P = self.stage_weights(rank)
        nested, _ = self.refined.get(rank, (self.nested, self.U))
        return nested.multiply(P @ core)

    def restrict(self, ranks: Iterable[Rank]) -> Factors:
        ranks = set(ranks)
        refined = {rank: found for rank, found in self.refined.items() if rank in ranks}
        largest = max((r_in for _, r_in in ranks), default=0)
        return replace(self, nested=self.nested.head(largest), refined=refined)

    def stage_weights(self, rank: Rank) -> Sequence[Tensor]:
        r_out, r_in = rank
        nested, U = self.refined.get(rank, (self.nested, self.U))
        U = U[:, :, :r_out]
        core = nested.solve(U.mT @ nested.HM[:, :, : r_in * nested.blocks])
        with limited_threads(U.shape[-2]):
            P = U if self.H is None else torch.linalg.solve(self.H, U)
        return [nested.basis[:, 0, :r_in], core, P]


@final
@dataclass(frozen=True)
class Tucker2(Operator):
    """Tucker-2, rank (rank_out, rank_in): 1 x 1 to rank_in, kernel to rank_out, 1 x 1 to outputs.

    Args:
        sweeps: Sweeps of higher-order orthogonal iteration (HOOI) per requested pair; 0 keeps the
            HOSVD.
        steps: Number of values offered for each of the two ranks.
    """

    sweeps: int = 0
    steps: int = 12
    name = "tucker2"

    def refuses(self, shape: LayerShape) -> str | None:
        if not shape.kernel or max(shape.kernel) == 1:
            return "a Tucker-2 of a 1 x 1 kernel is an SVD"
        return None

    def families(self, shape: LayerShape, multiple_of: int = 1) -> list[list[Rank]]:
        def values(full: int) -> list[int]:
            steps = {
                max(1, round(full * i / self.steps) // multiple_of)
                for i in range(1, self.steps + 1)
            }
            return [multiple_of * step for step in sorted(steps) if multiple_of * step <= full]

        outputs, inputs = shape.outputs // shape.groups, shape.inputs // shape.groups
        return [[(r_out, r_in) for r_out in values(outputs)] for r_in in values(inputs)]

    def stages(self, shape: LayerShape, rank: Rank) -> tuple[LayerShape, ...]:
        outer, inner = rank[0] * shape.groups, rank[1] * shape.groups
        first = replace(pointwise(shape, shape.inputs, inner, shape.groups), bias=False)
        return chain(
            replace(first, calls=shape.calls),
            replace(shape, inputs=inner, outputs=outer, bias=False),
            pointwise(shape, outer, shape.outputs, shape.groups),
        )

    def factorise(
        self,
        shape: LayerShape,
        target: Target,
        ranks: Iterable[Rank],
        wanted: Wanted | None = None,
    ) -> Factors:
        ranks = list(ranks)
        index = torch.arange(shape.width, device=target.W.device)
        columns = index.reshape(target.weight.shape[2], -1).T.contiguous()  # (s, c)
        leading = _inputs(target, target.HW, columns, max(r_in for _, r_in in ranks))
        energies, U = _leading(target.HWC @ target.HW.mT)
        if wanted is not None:
            ranks = list(wanted(_estimates(target, leading, energies, ranks)))
        nested = _input_basis(
            target, leading, columns, max((r_in for _, r_in in ranks), default=1)
        )
        refined = {
            rank: _refine(target, columns, nested, U, rank, self.sweeps)
            for rank in (ranks if self.sweeps else [])
        }
        return TuckerFactors(self, shape, nested, target.norm.H, U, refined, _errors(nested, U))


def _estimates(
    target: Target, leading: Leading, energies: Tensor, ranks: Iterable[Rank]
) -> dict[Rank, float]:
    """Estimates below the errors: the tail of one unfolding, and for outputs a true bound."""
    inputs = target.relative(leading.tails)
    left = torch.nn.functional.pad(energies.clamp_min(0).sum(0).flip(0).cumsum(0), (1, 0))
    outputs = target.relative(left.flip(0))
    return {(o, i): max(outputs[o], ALLOWANCE * inputs[i]) for o, i in ranks}


def _leading(energy: Tensor) -> tuple[Tensor, Tensor]:  # (g, o, o) -> (g, o), (g, o, o)
    """Eigenvalues and eigenvectors by decreasing eigenvalue."""
    with limited_threads(energy.shape[-1]):
        values, vectors = torch.linalg.eigh(energy)
    return values.flip(-1), vectors.flip(-1)


def _inputs(target: Target, T: Tensor, columns: Tensor, R: int) -> Leading:
    """Channel factor of rank R from the rows of T (g, rows, n)."""
    c = columns.shape[1]
    stacked = T[:, :, columns].transpose(1, 2).reshape(T.shape[0], -1, c)  # (g, s rows, c)
    rank = min(R, *stacked.shape[-2:])
    found = leading_rows(stacked, target.channel_moment, rank)
    padded = torch.nn.functional.pad(found.rows, (0, 0, 0, R - rank))
    return Leading(padded, torch.nn.functional.pad(found.tails, (0, R - rank)))


def _input_basis(target: Target, leading: Leading, columns: Tensor, R: int) -> NestedBasis:
    """The first R rows of a channel factor with their least-squares map."""
    basis = leading.rows[:, :R].unsqueeze(1).expand(-1, len(columns), -1, -1)
    return nested_basis(target, basis, columns)


def _errors(nested: NestedBasis, U: Tensor) -> list[list[float]]:
    """Relative error for every (rank_out, rank_in), including zero ranks."""
    squares = (U.mT @ nested.HM).square().sum(0)  # (o, K)
    squares = squares.unflatten(1, (-1, nested.blocks)).sum(2)
    kept = torch.nn.functional.pad(squares.cumsum(0).cumsum(1), (1, 0, 1, 0))
    if nested.energy == 0:
        return (kept * 0).tolist()
    return (1 - kept / nested.energy).clamp(0, 1).tolist()


def _refine(
    target: Target,
    columns: Tensor,
    nested: NestedBasis,
    U: Tensor,
    rank: Rank,
    sweeps: int,
) -> tuple[NestedBasis, Tensor]:
    """Higher-order orthogonal iteration (HOOI) at one rank; a sweep without gain is discarded."""
    r_out, r_in = rank
    best = (_errors(nested, U)[r_out][r_in], nested, U)
    for _ in range(sweeps):
        HM = best[1].HM[:, :, : r_in * nested.blocks]
        # If HM has fewer columns than r_out, H W determines the remaining directions.
        energy = HM @ HM.mT + TIE * target.HWC @ target.HW.mT
        _, U = _leading(energy)
        projected = U[:, :, :r_out].mT @ target.HW
        candidate = _input_basis(target, _inputs(target, projected, columns, r_in), columns, r_in)
        error = _errors(candidate, U)[r_out][r_in]
        if error >= best[0]:
            error_u = _errors(best[1], U)[r_out][r_in]
            return (best[1], U) if error_u < best[0] else best[1:]
        best = (error, candidate, U)
    return best[1:]
