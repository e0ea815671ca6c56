"""Moments of a layer's compressed inputs and dense outputs, and the weight that they fit best.

Let q be the input patches of a layer in the compressed network and y = W p the outputs of the
same layer in the dense network, at the same positions. The least-squares weight is
E[y q^T] E[q q^T]^-1. It needs the cross moment with the outputs (o, n), not with the dense
inputs (n, n).

A part of the patches is held out. The error on it is a quadratic form in its moments, so the
shrinkage towards the dense weight is chosen without a further pass over the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankNAS.compression.patches import folded
from rankNAS.decompositions.norms import ErrorNorm
from rankNAS.decompositions.shapes import LayerShape

__all__ = ["SHRINKAGES", "Moments", "choose_shrinkage", "split_moments"]

#: Towards the dense weight, in units of the mean square of an input; the first is the default.
SHRINKAGES = (1e-2, 1e-3, 3e-3, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
MARGIN = 0.01  # by which the held-out error falls at another shrinkage
HELD_OUT = 4  # one patch of so many is held out: the last ones of each batch


@dataclass(frozen=True)
class Moments:
    """Sums over patches q of the compressed network and outputs y of the dense one, in float64.

    Args:
        count: Number of patches.
        y: Sum of y, (g, o), without the layer's bias.
        q: Sum of q, (g, n).
        yq: Sum of y q^T, (g, o, n).
        qq: Sum of q q^T, (g, n, n).
        yy: Sum of y y^T, (g, o, o).
    """

    count: int
    y: Tensor
    q: Tensor
    yq: Tensor
    qq: Tensor
    yy: Tensor

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of patches."""
        return Moments(
            self.count + other.count,
            self.y + other.y,
            self.q + other.q,
            self.yq + other.yq,
            self.qq + other.qq,
            self.yy + other.yy,
        )

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """E[y] and E[q]."""
        return self.y / self.count, self.q / self.count

    def second(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """E[y q^T] and E[q q^T], of the deviations from the means if centred."""
        cross, moment = self.yq / self.count, self.qq / self.count
        if centred:
            y, q = self.means
            cross = cross - y.unsqueeze(-1) * q.unsqueeze(-2)
            moment = moment - q.unsqueeze(-1) * q.unsqueeze(-2)
        return cross, moment

    def fitted(
        self, W: Tensor, shrinkage: float, *, centred: bool
    ) -> Tensor:  # (g, o, n) -> (g, o, n)
        """The least-squares weight, with shrinkage towards a weight W."""
        cross, moment = self.second(centred=centred)
        scale = shrinkage * moment.diagonal(dim1=-2, dim2=-1).mean(-1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))[:, None, None]
        eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
        best: Tensor = torch.linalg.solve(moment + scale * eye, (cross + scale * W).mT).mT
        return best

    def shift(self, A: Tensor) -> Tensor:  # (g, o, n) -> (g, o)
        """The mean error E[y] - A E[q], which a bias removes."""
        y, q = self.means
        return y - (A @ q.unsqueeze(-1)).squeeze(-1)

    def error(self, A: Tensor, shift: Tensor, norm: ErrorNorm) -> float:
        """E ||H (y - A q - shift)||^2, summed over the groups.

        Args:
            A: A weight (g, o, n).
            shift: A vector (g, o) that is added to the outputs.
            norm: The error norm, of which H counts.
        """
        y, q = (x.unsqueeze(-1) for x in self.means)
        cross, moment = self.second(centred=False)
        HA, Hs = norm.left(A), norm.left(shift.unsqueeze(-1))
        total = (HA * (HA @ moment - 2 * norm.left(cross))).sum()
        total = total + norm.left(norm.left(self.yy / self.count).mT).diagonal(0, 1, 2).sum()
        total = total + (Hs * (Hs + 2 * (HA @ q) - 2 * norm.left(y))).sum()
        return max(0.0, float(total))


def split_moments(
    shape: LayerShape, batches: Iterable[tuple[Tensor, Sequence[Tensor]]]
) -> list[tuple[Moments, Moments]]:
    """The moments of one or more layers with the same inputs: those to fit, and those held out.

    Args:
        shape: The shape of the layers; their outputs may differ in number.
        batches: For each batch the patches (g, N, n) from `patches`, and for each layer the dense
            outputs (g, N, o) without the bias.

    Returns:
        Two sets of moments for each layer; empty if there are no batches.
    """
    own: list[list[Tensor]] = [[], []]  # of all layers: sums of q and q q^T; by part
    each: list[list[list[Tensor]]] = [[], []]  # sums of y, y q^T and y y^T by layer
    counts = [0, 0]
    for Q, outputs in batches:
        fit = Q.shape[1] - Q.shape[1] // HELD_OUT
        for i, part in enumerate((slice(0, fit), slice(fit, None))):
            P = Q[:, part]
            counts[i] += P.shape[1]
            own[i] = _added(own[i], [P.sum(1), P.mT @ P])
            found = [
                [Y[:, part].sum(1), Y[:, part].mT @ P, Y[:, part].mT @ Y[:, part]] for Y in outputs
            ]
            before = each[i] or [[] for _ in found]
            each[i] = [_added(a, b) for a, b in zip(before, found, strict=True)]
    order = folded(shape)
    return [
        tuple(  # type: ignore[misc]
            Moments(
                count,
                layers[number][0],
                shared[0][:, order],
                layers[number][1][:, :, order],
                shared[1][:, order][:, :, order],
                layers[number][2],
            )
            for count, shared, layers in zip(counts, own, each, strict=True)
        )
        for number in range(len(each[0]))
    ]


def choose_shrinkage(
    W: Tensor,  # (g, o, n)
    fit: Moments,
    held: Moments,
    norm: ErrorNorm,
) -> float:
    """The shrinkage with the least error on held-out patches.

    The search starts at the default and goes on in each direction while the error falls by a
    margin: smaller differences are chance.
    """
    if not held.count:
        return SHRINKAGES[0]
    centred = norm.mean is not None

    def error(shrinkage: float) -> float:
        A = fit.fitted(W, shrinkage, centred=centred)
        shift = fit.shift(A) if centred else torch.zeros_like(fit.y)
        return held.error(A, shift, norm)

    grid = sorted(SHRINKAGES)
    start = grid.index(SHRINKAGES[0])
    best, least = SHRINKAGES[0], error(SHRINKAGES[0])
    for further in (grid[start + 1 :], grid[:start][::-1]):
        for shrinkage in further:
            found = error(shrinkage)
            if not found < (1 - MARGIN) * least:
                break
            best, least = shrinkage, found
        if best != SHRINKAGES[0]:
            break
    return best


def _added(sums: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    parts = [part.double() for part in parts]
    return [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
