"""Stable ranks: smooth surrogates of the rank of a matrix.

Notation: s_1 >= s_2 >= … are the singular values of W (m, n). The first two functions take
batches of matrices and are differentiable.

References:
    Rudelson and Vershynin, Journal of the ACM 2007: the stable rank.
    Eo, Kang and Rhee, Neural Networks 2023 (BSR): the modified stable rank.
    Wang et al., MLSys 2023 (Cuttlefish): the scaled stable rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankNAS.exceptions import UsageError

__all__ = ["modified_stable_rank", "scaled_stable_rank", "stable_rank"]


def stable_rank(W: Tensor) -> Tensor:  # (*batch, m, n) -> (*batch)
    """||W||_F^2 / ||W||_2^2, at least 1 and at most the rank; W is not zero.

    >>> float(stable_rank(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))))
    1.875
    """
    energy = torch.linalg.svdvals(W).square()
    ratio: Tensor = energy.sum(-1) / energy[..., 0]
    return ratio


def modified_stable_rank(
    W: Tensor,  # (*batch, m, n)
    rank: int,
    exponent: int = 1,
) -> Tensor:  # (*batch)
    """Sum of the singular values beyond a target rank, relative to the sum of those up to it.

    It is zero if and only if the rank of W is at most the target, and invariant to the scale of W.
    As a penalty, it therefore reduces the tail and not the head. The published formula was not
    available; this is a reconstruction from its properties. Exponent 2 is the analogue of the
    stable rank.

    Args:
        W: Not zero.
        rank: The target, at least 1.
        exponent: 1 sums the singular values, 2 their squares.

    Raises:
        UsageError: The target is below 1, or the exponent is not 1 or 2.

    >>> round(float(modified_stable_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)), 6)
    0.2
    """
    if rank < 1 or exponent not in (1, 2):
        raise UsageError(
            f"`rank` must be at least 1 and `exponent` 1 or 2, got {rank} and {exponent}."
        )
    s = torch.linalg.svdvals(W) ** exponent
    ratio: Tensor = s[..., rank:].sum(-1) / s[..., :rank].sum(-1)
    return ratio


def scaled_stable_rank(W: Tensor, initial: float) -> int:  # (m, n) -> ()
    """The rank that Cuttlefish assigns to a layer: its stable rank relative to initialisation.

    It is ceil(stable rank x full rank / initial stable rank), at most the full rank. The stable
    rank is first truncated to an integer, as in the released code.

    Args:
        W: The trained weight, not zero.
        initial: Its stable rank at initialisation.
    """
    full = min(W.shape)
    scaled = int(stable_rank(W)) * full / initial
    return min(full, math.ceil(scaled))
