"""A training set and a test set with their metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from rankNAS.data.images.augment import Augmentation

__all__ = ["Data"]


@dataclass(frozen=True, eq=False)
class Data:
    """A training set and a test set; map-style datasets of (input tensor, target tensor).

    Attributes:
        name: The source, as given.
        train: The training set; items are (input, target), already normalised.
        test: The test set, with items of the same form.
        input_shape: The shape of one input.
        num_classes: One more than the largest label; None if the task is not classification.
        fingerprint: A key (hex) of content and preprocessing, identical on all machines.
        normalize: Mean and std in use, in the form that ``load_data`` accepts; None if unknown.
        flip: Whether a mirrored input keeps its class.

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
        """The augmentation that preserves the classes of the training data."""
        return Augmentation(flip=self.flip)
