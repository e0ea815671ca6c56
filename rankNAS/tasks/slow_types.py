"""A warning about weights of a type that this CPU multiplies slowly."""

from __future__ import annotations

import logging
import time

import torch
from torch import nn

from rankNAS.tasks.base import HALF

__all__ = ["warn_of_slow_weights"]

logger = logging.getLogger(__name__)
SLOWER = 3.0  # times, from which it is worth a word
SIDE = 256  # of the matrices that are multiplied
TIMES = 3


def warn_of_slow_weights(model: nn.Module) -> None:
    """Warn if most weights lie on the CPU, in 16 bits that it multiplies slowly.

    A short measurement decides: many CPUs have no instructions for products in float16.
    """
    counts: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.device.type == "cpu" and p.is_floating_point() and p.dim() > 1:
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    dtype = max(counts, key=counts.__getitem__, default=torch.float32)
    if dtype not in HALF:
        return
    seconds = {t: _seconds(t) for t in (dtype, torch.float32, torch.bfloat16)}
    best = min(seconds, key=seconds.__getitem__)
    ratio = seconds[dtype] / seconds[best]
    if ratio > SLOWER:
        names = [str(t).removeprefix("torch.") for t in (dtype, best)]
        logger.warning(
            "the weights are in %s, which this CPU multiplies %.0f times more slowly than %s; on "
            "the CPU, convert them before the search: hf:FOLDER?dtype=%s, or model.to(torch.%s).",
            names[0],
            ratio,
            *[names[1]] * 3,
        )


def _seconds(dtype: torch.dtype) -> float:
    """The least seconds of a product of small matrices of a type."""
    x = torch.ones(SIDE, SIDE).to(dtype)
    taken = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        nn.functional.linear(x, x)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
