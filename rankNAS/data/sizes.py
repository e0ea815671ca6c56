"""Numbers of samples by their size: sequences of tokens are counted by their tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankNAS.data.samples import Samples

__all__ = ["PASS", "affordable_samples", "tokens_of"]

PASS = 2048  # tokens of one forward pass, if nobody says otherwise


def tokens_of(samples: Samples) -> int:
    """The number of tokens of a sample; 1 for samples that are no sequences of tokens.

    A sample is one if it has ``input_ids``, or integers (T,) alone or with a target of that shape.

    >>> tokens_of(Samples.of([{"input_ids": torch.zeros(7, dtype=torch.int64)}]))
    7
    """
    item = samples[0]
    if isinstance(item, Mapping):
        found = item.get("input_ids")
        target = None
    else:
        parts = item if isinstance(item, tuple | list) else (item,)
        found, target = parts[0] if parts else None, parts[1] if len(parts) > 1 else None
    if not isinstance(found, Tensor) or found.dim() != 1 or not _whole(found):
        return 1
    if target is not None and (not isinstance(target, Tensor) or target.shape != found.shape):
        return 1
    return max(1, len(found))


def affordable_samples(most: int, samples: Samples, tokens: int = PASS) -> int:
    """The number of samples with so many tokens together: at least 1, and at most `most`.

    >>> affordable_samples(128, Samples.of(torch.zeros(9, 3)))
    128
    """
    return max(1, min(most, tokens // tokens_of(samples)))


def _whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
