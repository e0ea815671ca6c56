"""Random translations and horizontal flips of images, for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rankNAS.trees import tree_map

__all__ = ["NO_FLIP", "Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Translates images by up to an eighth of their size, and flips half of them.

    Pixels outside an image are 0, the mean of normalised images.

    Args:
        flip: Whether to flip; valid if a mirrored image keeps its class.
    """

    flip: bool = False

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The augmented batch.

        Args:
            x: Images (N, C, H, W); any other shape is returned unchanged.
            generator: A generator on the CPU.

        Returns:
            New images of the same shape.
        """
        if x.ndim != 4:
            return x
        count, _, height, width = x.shape
        rows = _shifted(count, height, generator)
        columns = _shifted(count, width, generator)
        if self.flip:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        pad = (width // 8, width // 8, height // 8, height // 8)
        padded = functional.pad(x, pad).permute(0, 2, 3, 1)
        images = torch.arange(count)[:, None, None]
        picked = (part.to(x.device) for part in (images, rows[:, :, None], columns[:, None, :]))
        return padded[tuple(picked)].permute(0, 3, 1, 2).contiguous()

    def of_batch(self, batch: Any, generator: torch.Generator) -> Any:
        """The batch with its image inputs augmented: all floating-point (N, C, H, W) tensors."""
        return tree_map(lambda x: self(x, generator) if x.is_floating_point() else x, batch)


NO_FLIP = Augmentation()


def _shifted(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Positions (count, size) of randomly shifted windows in a padded axis."""
    offsets = torch.randint(2 * (size // 8) + 1, (count, 1), generator=generator)
    return offsets + torch.arange(size)
