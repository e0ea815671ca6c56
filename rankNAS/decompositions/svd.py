"""Two-layer decompositions: plain, spatially separable and channel-grouped SVD.

References:
    Denton et al., NeurIPS 2014, and Zhang et al., TPAMI 2016: k x k then 1 x 1 (`Svd`).
    Jaderberg et al., BMVC 2014: k x 1 then 1 x k (`SpatialSvd`).
    Liebenwein et al., NeurIPS 2021, section 2.1: k channel groups (`GroupSvd`).
    Chen et al., NeurIPS 2021 (DRONE): the data-aware optimum of `Svd` in closed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from rankNAS.decompositions.base import ALLOWANCE, Factors, Operator, Rank, Wanted
from rankNAS.decompositions.leading import leading_rows, row_map
from rankNAS.decompositions.nested import NestedBasis, diagonal_blocks, nested_basis
from rankNAS.decompositions.norms import Target
from rankNAS.decompositions.shapes import LayerShape, chain, pointwise

__all__ = ["GroupSvd", "PairFactors", "SpatialSvd", "Svd", "TwoStageFactors"]

WIDE = 128  # channels beyond which every second number of groups is offered: each costs a Cholesky


@final
@dataclass(frozen=True)
class TwoStageFactors(Factors):
    """Nested bases by number of channel groups (1 for operators that have no groups)."""

    operator: Operator
    shape: LayerShape
    bases: dict[int, NestedBasis]
    errors: dict[int, list[float]]

    def _at(self, rank: Rank) -> tuple[int, int]:
        return (rank[0], rank[1]) if len(rank) == 2 else (1, rank[0])

    def error(self, rank: Rank) -> float:
        groups, r = self._at(rank)
        return self.errors[groups][r]

    def weight(self, rank: Rank) -> Tensor:
        groups, r = self._at(rank)
        nested = self.bases[groups]
        return nested.multiply(nested.output_map(r))

    def restrict(self, ranks: Iterable[Rank]) -> Factors:
        largest = _largest(self._at(rank) for rank in ranks)
        return replace(self, bases={k: self.bases[k].head(r) for k, r in largest.items()})

    def slim(self, dtype: torch.dtype) -> Factors:
        if isinstance(self.operator, Svd):
            (nested,), (errors,) = self.bases.values(), self.errors.values()
            left, right = (x.to(dtype) for x in nested.pair())
            return PairFactors(self.operator, self.shape, left, right, errors)
        return replace(self, bases={k: nested.slim(dtype) for k, nested in self.bases.items()})

    def stage_weights(self, rank: Rank) -> Sequence[Tensor]:
        groups, r = self._at(rank)
        nested = self.bases[groups]
        A = nested.output_map(r)  # (g, o, r b), rank first
        g, b = nested.basis.shape[:2]
        if isinstance(self.operator, SpatialSvd):  # all blocks share one basis
            return [nested.basis[:, 0, :r], A]
        by_group = A.unflatten(2, (r, b)).transpose(2, 3).flatten(2)  # group first
        return [nested.basis[:, :, :r].reshape(g * b, r, -1), by_group]


@final
@dataclass(frozen=True)
class PairFactors(Factors):
    """Two matrices; the first columns of one and the first rows of the other are a rank.

    Args:
        operator: `Svd`.
        shape: The shape of the layer.
        left: (g, o, R).
        right: (g, R, n).
        errors: Relative error at rank 0, 1, …, R, and perhaps beyond.
    """

    operator: Operator
    shape: LayerShape
    left: Tensor
    right: Tensor
    errors: list[float]

    def error(self, rank: Rank) -> float:
        return self.errors[rank[0]]

    def weight(self, rank: Rank) -> Tensor:
        left, right = self._at(rank)
        return left @ right

    def stage_weights(self, rank: Rank) -> Sequence[Tensor]:
        left, right = self._at(rank)
        return [right, left]

    def restrict(self, ranks: Iterable[Rank]) -> Factors:
        """The factors of a subset of the ranks, as views: the matrices may be mapped files."""
        left, right = self._at((max(r for (r,) in ranks),))
        return replace(self, left=left, right=right)

    def slim(self, dtype: torch.dtype) -> Factors:
        return replace(self, left=self.left.to(dtype), right=self.right.to(dtype))

    def _at(self, rank: Rank) -> tuple[Tensor, Tensor]:
        return self.left[:, :, : rank[0]], self.right[:, : rank[0]]


def _largest(ranks: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The largest rank per number of groups."""
    largest: dict[int, int] = {}
    for groups, r in ranks:
        largest[groups] = max(r, largest.get(groups, 0))
    return largest


def _two_stage(
    operator: Operator, shape: LayerShape, bases: dict[int, NestedBasis]
) -> TwoStageFactors:
    errors = {groups: nested.errors().tolist() for groups, nested in bases.items()}
    return TwoStageFactors(operator, shape, bases, errors)


@final
@dataclass(frozen=True)
class Svd(Operator):
    """Truncated SVD, rank (r,): the layer with r outputs, then a 1 x 1 layer."""

    name = "svd"

    def refuses(self, shape: LayerShape) -> str | None:
        return None

    def families(self, shape: LayerShape, multiple_of: int = 1) -> list[list[Rank]]:
        full = min(shape.outputs // shape.groups, shape.width)
        return [[(r,) for r in range(multiple_of, full + 1, multiple_of)]]

    def stages(self, shape: LayerShape, rank: Rank) -> tuple[LayerShape, ...]:
        inner = rank[0] * shape.groups
        first = replace(shape, outputs=inner, bias=False)
        return chain(first, pointwise(shape, inner, shape.outputs, shape.groups))

    def factorise(
        self,
        shape: LayerShape,
        target: Target,
        ranks: Iterable[Rank],
        wanted: Wanted | None = None,
    ) -> Factors:
        columns = torch.arange(shape.width, device=target.W.device).unsqueeze(0)
        R, image = max(r for (r,) in ranks), None
        if target.W.shape[1] <= shape.width:
            rows, leading = row_map(target.HW, target.HWC, R)
            image = rows @ target.HWC
        else:
            leading = leading_rows(target.HW, target.norm.C, R)
        nested = nested_basis(target, leading.rows.unsqueeze(1), columns, image)
        return _two_stage(self, shape, {1: nested})


@final
@dataclass(frozen=True)
class SpatialSvd(Operator):
    """Spatially separable SVD, rank (r,): a (kh, 1) layer with r outputs, then a (1, kw) layer."""

    name = "spatial_svd"

    def refuses(self, shape: LayerShape) -> str | None:
        if len(shape.kernel) != 2 or min(shape.kernel) == 1:
            return "needs a two-dimensional kernel larger than one in both directions"
        return None

    def families(self, shape: LayerShape, multiple_of: int = 1) -> list[list[Rank]]:
        rows = shape.outputs // shape.groups * shape.kernel[1]
        full = min(rows, shape.inputs // shape.groups * shape.kernel[0])
        return [[(r,) for r in range(multiple_of, full + 1, multiple_of)]]

    def stages(self, shape: LayerShape, rank: Rank) -> tuple[LayerShape, ...]:
        def side(x: tuple[int, ...], axis: int, other: int) -> tuple[int, int]:
            return (x[0], other) if axis == 0 else (other, x[1])

        def stage(axis: int, inputs: int, outputs: int, bias: bool) -> LayerShape:
            return replace(
                shape,
                inputs=inputs,
                outputs=outputs,
                bias=bias,
                kernel=side(shape.kernel, axis, 1),
                stride=side(shape.stride, axis, 1),
                dilation=side(shape.dilation, axis, 1),
                padding=shape.padding
                if isinstance(shape.padding, str)
                else side(shape.padding, axis, 0),
            )

        inner = rank[0] * shape.groups
        return chain(
            stage(0, shape.inputs, inner, False), stage(1, inner, shape.outputs, shape.bias)
        )

    def factorise(
        self,
        shape: LayerShape,
        target: Target,
        ranks: Iterable[Rank],
        wanted: Wanted | None = None,
    ) -> Factors:
        g, o, c, kh, kw = target.weight.shape
        index = torch.arange(shape.width, device=target.W.device).reshape(c * kh, kw)
        columns = index.T.contiguous()  # (kw, c kh)
        stacked = target.HW.unflatten(2, (c * kh, kw)).transpose(2, 3)
        stacked = stacked.reshape(g, o * kw, c * kh)
        ranks = list(ranks)
        leading = leading_rows(stacked, target.column_moment, max(r for (r,) in ranks))
        if wanted is not None:
            tails = target.relative(leading.tails)
            ranks = list(wanted({(r,): ALLOWANCE * tails[r] for (r,) in ranks}))
        if not ranks:
            return _two_stage(self, shape, {})
        basis = leading.rows[:, : max(r for (r,) in ranks)].unsqueeze(1).expand(-1, kw, -1, -1)
        return _two_stage(self, shape, {1: nested_basis(target, basis, columns)})


@final
@dataclass(frozen=True)
class GroupSvd(Operator):
    """Grouped SVD, rank (k, r): k channel groups with r outputs each, then a 1 x 1 layer.

    Args:
        max_groups: The largest k offered; k divides the number of channels.
    """

    max_groups: int = 64
    name = "group_svd"

    def refuses(self, shape: LayerShape) -> str | None:
        return None if self._group_counts(shape) else "has one channel a group"

    def families(self, shape: LayerShape, multiple_of: int = 1) -> list[list[Rank]]:
        outputs = shape.outputs // shape.groups
        return [
            [(k, r) for r in range(multiple_of, min(outputs, shape.width // k) + 1, multiple_of)]
            for k in self._group_counts(shape)
        ]

    def _group_counts(self, shape: LayerShape) -> list[int]:
        channels = shape.inputs // shape.groups
        counts = [k for k in range(2, min(channels, self.max_groups) + 1) if channels % k == 0]
        return counts if channels <= WIDE else counts[::-2][::-1]

    def stages(self, shape: LayerShape, rank: Rank) -> tuple[LayerShape, ...]:
        groups = shape.groups * rank[0]
        inner = groups * rank[1]
        first = replace(shape, outputs=inner, groups=groups, bias=False)
        return chain(first, pointwise(shape, inner, shape.outputs, shape.groups))

    def factorise(
        self,
        shape: LayerShape,
        target: Target,
        ranks: Iterable[Rank],
        wanted: Wanted | None = None,
    ) -> Factors:
        bases, ranks = {}, list(ranks)
        for k, R in _largest((k, r) for k, r in ranks).items():
            columns = torch.arange(shape.width, device=target.W.device).reshape(k, -1)
            blocks = diagonal_blocks(target.norm.C, columns)
            leading = leading_rows(target.HW[:, :, columns].transpose(1, 2), blocks, R)
            if wanted is not None:
                tails = target.relative(leading.tails)
                kept = wanted({(j, r): ALLOWANCE * tails[r] for j, r in ranks if j == k})
                R = max((r for _, r in kept), default=0)
            if R:
                bases[k] = nested_basis(target, leading.rows[:, :, :R], columns)
        return _two_stage(self, shape, bases)
