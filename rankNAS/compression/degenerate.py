"""Warnings about layers whose weight or inputs carry less than their shape says."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from rankNAS.decompositions.norms import Statistics
from rankNAS.search_spaces.base import Layer

__all__ = ["DegenerateLayers", "dead_inputs", "listed", "redundant_rows"]

logger = logging.getLogger(__name__)
CHUNK = 1 << 22  # elements that are hashed at once
NAMED = 3  # layers that a warning names
MIX = 0x2545F4914F6CDD1D  # an odd number with irregular bits
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class DegenerateLayers:
    """Collects the layers, so that one warning names them together.

    Example:
        >>> found = DegenerateLayers()
        >>> found.warn()  # nothing to say
    """

    def __init__(self) -> None:
        self._dead: list[str] = []
        self._redundant: list[str] = []

    def add(self, layer: Layer, weight: Tensor, statistics: Statistics | None) -> None:
        """Look at one layer.

        Args:
            layer: The layer.
            weight: Its folded weight (g, o, c, kh, kw).
            statistics: Moments of its inputs, if they are known.
        """
        rows = weight.shape[0] * weight.shape[1]
        if weight.any() and (redundant := redundant_rows(weight.flatten(2))):
            self._redundant.append(f"{layer.name!r} ({redundant} of {rows})")
        if statistics is None:
            return
        moment = statistics.input_second_moment
        channels = moment.shape[0] * weight.shape[2]
        dead = dead_inputs(moment, weight.shape[2])
        if dead == channels:
            logger.warning("the inputs of layer %r are zero for all calibration data.", layer.name)
        elif dead:
            self._dead.append(f"{layer.name!r} ({dead} of {channels})")

    def warn(self) -> None:
        """Log what was found."""
        if self._dead:
            logger.warning(
                "some inputs are zero for all calibration data: %s; check that the calibration "
                "data are typical, or give more of them.",
                listed(self._dead),
            )
        if self._redundant:
            logger.warning(
                "some rows of weights are zero or repeat another row: %s; the ranks above the "
                "number of the other rows add nothing.",
                listed(self._redundant),
            )


def dead_inputs(moment: Tensor, channels: int) -> int:
    """Number of input channels that are always zero.

    Args:
        moment: The second moment of the input patches (g, n, n), n = channels * kernel.
        channels: Channels of a group.
    """
    squares = moment.diagonal(dim1=-2, dim2=-1).unflatten(-1, (channels, -1))
    return int((squares == 0).all(-1).sum())


def redundant_rows(weight: Tensor) -> int:
    """Number of rows (g, o, n) that are zero or equal to an earlier row of their group.

    Equal rows have equal hashes: sums of their mixed bits times odd numbers, modulo 2^64.
    """
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(1 << 62), 1 << 62, (weight.shape[2],), generator=generator) * 2 + 1
    odd = odd.to(weight.device)
    step = max(1, CHUNK // weight.shape[2])
    found = 0
    for group in weight.detach():
        hashes = [((_bits(rows) * odd).sum(-1)) for rows in group.split(step)]
        distinct = torch.cat(hashes).unique()
        found += len(group) - int((distinct != 0).sum())  # zero rows have the hash zero
    return found


def _bits(rows: Tensor) -> Tensor:
    """The bits of numbers, mixed; those of zero are zero, whatever its sign."""
    rows = (rows + 0.0).contiguous()
    bits = rows.view(BITS[rows.element_size()]).long()
    bits = (bits ^ (bits >> 32)) * MIX  # the low bits of round numbers are zero
    return bits ^ (bits >> 29)


def listed(names: list[str]) -> str:
    """The first names, and the number of the others."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more layers" if more > 0 else "")
