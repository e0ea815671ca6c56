"""Moments of the inputs of a site in the dense and in the compressed network, and their fit.

The layers of a site have the same inputs: x in the dense network, q in the compressed one. For a
layer of weight W the weight that fits its dense outputs best, with shrinkage s towards W, is

    W T,    T = (E[x q^T] + s I) (E[q q^T] + s I)^-1,

so one map T serves all layers of the site, whatever their outputs are. Its error on held-out
positions is the trace of W^T G W R, with R = E[(x - T q) (x - T q)^T] and G the second moment of
the gradients at the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankNAS.compression.moments import HELD_OUT, MARGIN, SHRINKAGES
from rankNAS.threads import limited_threads

__all__ = ["Pairs", "SiteMoments", "site_moments"]

#: Towards the dense weight, in units of the mean square of an input; the first is the default.
GRID = (SHRINKAGES[3], SHRINKAGES[0], *SHRINKAGES[4:])


@dataclass(frozen=True)
class Pairs:
    """Sums over the positions of dense inputs x and compressed inputs q, in float64.

    Args:
        count: Number of positions.
        x: Sum of x (n,).
        q: Sum of q (n,).
        xq: Sum of x q^T (n, n).
        qq: Sum of q q^T (n, n).
        xx: Sum of x x^T (n, n); None where errors are not measured.
    """

    count: int
    x: Tensor
    q: Tensor
    xq: Tensor
    qq: Tensor
    xx: Tensor | None = None

    def __add__(self, other: Pairs) -> Pairs:
        """The sums over both sets of positions, without xx."""
        names = ("x", "q", "xq", "qq")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Pairs(self.count + other.count, **sums)

    def means(self) -> tuple[Tensor, Tensor]:
        """E[x] and E[q]."""
        return self.x / self.count, self.q / self.count

    def second(self, about: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """E[x q^T], E[q q^T] and E[x x^T], of the deviations from given means, if any."""
        xq, qq = self.xq / self.count, self.qq / self.count
        xx = None if self.xx is None else self.xx / self.count
        if about is None:
            return xq, qq, xx
        (x, q), (a, b) = self.means(), about

        def moved(moment: Tensor, first: Tensor, other: Tensor, c: Tensor, d: Tensor) -> Tensor:
            found: Tensor = moment - first.outer(d) - c.outer(other) + c.outer(d)
            return found

        xx = None if xx is None else moved(xx, x, x, a, a)
        return moved(xq, x, q, a, b), moved(qq, q, q, b, b), xx


@dataclass(frozen=True)
class SiteMoments:
    """The sums to fit to, and those of the positions that are held out.

    Args:
        fit: The former.
        held: The latter.
    """

    fit: Pairs
    held: Pairs

    @cached_property
    def all(self) -> Pairs:
        """The sums over all positions."""
        return self.fit + self.held

    def shrinkage(self, needs: Sequence[Tensor], *, centred: bool) -> float:
        """The shrinkage with the least held-out error of all layers of the site.

        Args:
            needs: W^T G W (n, n) of each layer.
            centred: Whether the mean of the error is removed.
        """
        about = self.fit.means() if centred else None
        xq, qq, xx = (None if m is None else m.float() for m in self.held.second(about))
        assert xq is not None and qq is not None and xx is not None
        need = torch.stack([x.float() for x in needs]).sum(0)

        def error(shrinkage: float) -> float:
            T = transfer(self.fit, shrinkage, centred=centred).float()
            R = xx - xq @ T.mT
            R = R - T @ (xq.mT - qq @ T.mT)
            return float((need * R).sum())

        best, least = GRID[0], error(GRID[0])
        for further in ([GRID[1]], GRID[2:]):
            for value in further:
                if not (found := error(value)) < (1 - MARGIN) * least:
                    break
                best, least = value, found
            if best != GRID[0]:
                break
        return best


def transfer(pairs: Pairs, shrinkage: float, *, centred: bool) -> Tensor:
    """T (n, n), of which W T fits best."""
    xq, qq, _ = pairs.second(pairs.means() if centred else None)
    n = len(qq)
    scale = shrinkage * float(qq.diagonal().mean()) or 1.0
    with limited_threads(n):
        qq.diagonal().add_(scale)
        xq.diagonal().add_(scale)
        L, info = torch.linalg.cholesky_ex(qq)
        if info.any():
            found: Tensor = torch.linalg.solve(qq, xq.mT).mT
        else:
            found = torch.cholesky_solve(xq.mT, L).mT
    return found


def site_moments(batches: Iterable[tuple[Tensor, Tensor]]) -> SiteMoments | None:
    """The moments of a site; every fourth batch is held out. None for fewer than four batches.

    Args:
        batches: The inputs (N, n) in the dense and in the compressed network, at the same
            positions, by batch.
    """
    parts: list[list[Tensor]] = [[], []]
    counts = [0, 0]
    for number, (x, q) in enumerate(batches):
        held = int(number % HELD_OUT == HELD_OUT - 1)
        found = [x.sum(0), q.sum(0), x.mT @ q, q.mT @ q, *([x.mT @ x] if held else [])]
        counts[held] += len(x)
        if not parts[held]:
            parts[held] = [m.double() for m in found]
            continue
        for total, m in zip(parts[held], found, strict=True):
            total += m
    if not all(counts):
        return None
    fit, held_out = (Pairs(count, *sums) for count, sums in zip(counts, parts, strict=True))
    return SiteMoments(fit, held_out)
