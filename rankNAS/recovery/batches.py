"""The batches of the epochs of a training, and their augmentations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch

from rankNAS.data.images.augment import Augmentation
from rankNAS.data.samples import Samples, permutation
from rankNAS.trees import size_of

__all__ = ["EpochBatches", "Place", "epoch_seed"]

#: The variant of the batches and the number of the batch, if both are of a fixed set.
Place: TypeAlias = tuple[int, int]


def epoch_seed(seed: int, epoch: int) -> int:
    """The random seed of an epoch."""
    return (seed * 1_000_003 + epoch) % 2**31


@final
@dataclass(frozen=True)
class EpochBatches:
    """Functions that give the batches of an epoch; one that is not called is not augmented.

    Args:
        samples: All training samples.
        batch_size: Samples a batch.
        seed: The random seed of the training.
        device: Where the batches are needed.
        augmentation: None for none.
        variants: The batches and their augmentations are the same in every so many epochs, in
            another order; 0 for new ones in each.
        least: Fewest samples of a batch, unless there are fewer in the epoch.
    """

    samples: Samples
    batch_size: int
    seed: int
    device: torch.device
    augmentation: Augmentation | None
    variants: int
    least: int

    def of(
        self, epoch: int, present: Samples, generator: torch.Generator
    ) -> Iterator[tuple[Place | None, Callable[[], Any]]]:
        """The batches of an epoch, with their places.

        Args:
            epoch: Its number.
            present: The samples of the epoch, if batches are new in each.
            generator: Draws their augmentations.
        """
        seed, size = epoch_seed(self.seed, epoch), self.batch_size
        if not self.variants:
            for batch in present.batches(size, device=self.device, shuffle_seed=seed):
                if self._fits(size_of(batch), present):
                    yield None, self._augmented(batch, generator)
            return
        variant = epoch % self.variants
        fixed = epoch_seed(self.seed, -1 - variant)
        order = permutation(len(self.samples), fixed)
        batches = self.samples.take(order).batched(size, device=self.device)
        for number in permutation(len(batches), seed).tolist():
            own = torch.Generator().manual_seed((fixed + 7919 * number) % 2**31)
            if self._fits(batches.sizes[number], present):
                yield (variant, number), self._augmented(batches[number], own)

    def _fits(self, size: int, present: Samples) -> bool:
        return size >= min(self.least, len(present))

    def _augmented(self, batch: Any, generator: torch.Generator) -> Callable[[], Any]:
        kept = self.augmentation
        return lambda: batch if kept is None else kept.of_batch(batch, generator)
