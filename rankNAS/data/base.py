"""A training and a test set with what is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from rankNAS.data.images.augment import Augmentation

__all__ = ["Data"]


@dataclass(frozen=True, eq=False)
class Data:
    """A training and a test set; map-style datasets of (input tensor, target tensor).

    Attributes:
        name: The source as it was given.
        train: Items are (input, target), normalised already.
        test: The same for the test set.
        input_shape: The shape of one input.
        num_classes: One more than the largest label; None if this is no classification.
        fingerprint: A key (hex) of content and preprocessing, equal on all machines.
        normalize: The mean and std in use, as ``load_data`` takes it; None if unknown.
        flip: Whether a mirrored input still belongs to the same class.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from rankNAS import load_data
        >>> items = TensorDataset(torch.zeros(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> data = load_data((items, items))
        >>> data.input_shape, data.num_classes
        ((3,), 3)
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    input_shape: tuple[int, ...]
    num_classes: int | None
    fingerprint: str
    normalize: str | None = None
    flip: bool = False

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation that keeps the classes of the training data."""
        return Augmentation(flip=self.flip)
