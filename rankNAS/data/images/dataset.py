"""A map-style data set of labelled images, normalised in batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankNAS.data.images.normalise import Normalization
from rankNAS.data.items import Batched

__all__ = ["Images"]


class Images(Batched, Dataset[tuple[Tensor, Tensor]]):
    """Labelled images; items are (float32 (3, H, W), int64 scalar), normalised.

    Args:
        fetch: From row numbers (n,) to pixels (n, 3, H, W), uint8 or float in [0, 1].
        labels: int64, one per row that ``fetch`` knows.
        normalization: Applied to whole batches.
        rows: The rows of this set, in order; all by default.
    """

    def __init__(
        self,
        fetch: Callable[[Tensor], Tensor],
        labels: Tensor,
        normalization: Normalization,
        rows: Tensor | None = None,
    ) -> None:
        self.normalization = normalization
        self._fetch = fetch
        self._labels = labels
        self._rows = torch.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batch(torch.tensor([index]))
        return inputs[0], targets[0]

    @property
    def fetch(self) -> Callable[[Tensor], Tensor]:
        """From row numbers (n,) to pixels (n, 3, H, W)."""
        return self._fetch

    @property
    def targets(self) -> Tensor:
        """All labels, int64 (len,); computed without decoding images."""
        return self._labels[self._rows]

    def subset(self, indices: Tensor) -> Images:
        """The set of these items, in this order; pixels are shared, not copied."""
        return Images(self._fetch, self._labels, self.normalization, self._rows[indices])

    def batch(self, indices: Tensor, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Items ``indices`` (n,) as a batch: (n, 3, H, W) and (n,), normalised on ``device``."""
        rows = self._rows[indices]
        pixels = self._fetch(rows).to(device)
        return self.normalization(pixels), self._labels[rows].to(device)
