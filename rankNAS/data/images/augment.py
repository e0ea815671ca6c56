"""Random shifts and mirrors of images, for training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["augment"]


def augment(x: Tensor, generator: torch.Generator, *, flip: bool = True) -> Tensor:
    """Shift every image by up to an eighth of its size, and mirror half of them.

    Pixels from outside an image are 0, the mean of normalised images.

    Args:
        x: Images (N, C, H, W); anything else is returned as it is.
        generator: A generator on the CPU.
        flip: Mirror; ``Data.flip`` says whether that keeps the class.

    Returns:
        New images of the same shape.
    """
    if x.ndim != 4:
        return x
    count, _, height, width = x.shape
    rows = _shifted(count, height, generator)
    columns = _shifted(count, width, generator)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    pad = (width // 8, width // 8, height // 8, height // 8)
    padded = functional.pad(x, pad).permute(0, 2, 3, 1)
    images = torch.arange(count)[:, None, None]
    picked = (part.to(x.device) for part in (images, rows[:, :, None], columns[:, None, :]))
    return padded[tuple(picked)].permute(0, 3, 1, 2).contiguous()


def _shifted(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Positions (count, size) in a padded axis that a window at a random offset covers."""
    offsets = torch.randint(2 * (size // 8) + 1, (count, 1), generator=generator)
    return offsets + torch.arange(size)
