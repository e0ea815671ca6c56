"""A training set and a test set with their metadata."""

from __future__ import annotations

from dataclasses import dataclass

from rankNAS.data.images.augment import Augmentation
from rankNAS.data.samples import Samples

__all__ = ["Data", "TextForm"]


@dataclass(frozen=True)
class TextForm:
    """The form of language data.

    Attributes:
        context: The tokens of a window.
        largest: The largest token id in the data.
        vocabulary: The number of token ids of the tokenizer; None without one.
        tokenizer: The name of the tokenizer; None without one.
    """

    context: int
    largest: int
    vocabulary: int | None = None
    tokenizer: str | None = None


@dataclass(frozen=True, eq=False)
class Data:
    """A training set and a test set.

    Attributes:
        name: The source, as given.
        train: The training samples; images are already normalised.
        test: The test samples, of the same form; None if there are none.
        input_shape: The shape of one input; None if a sample has several inputs, or none of a
            fixed shape.
        num_classes: One more than the largest class label; None if labels are no classes, or are
            only known from reading every item.
        fingerprint: A key (hex) of content and preprocessing, identical on all machines.
        normalize: Mean and std in use, in the form that ``load_data`` accepts; None if unknown.
        flip: Whether a mirrored input keeps its target.
        valid: Samples for validation, of the same form; None takes them from the training set.
        text: The form of language data from a source by name; None for other data.

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
    train: Samples
    test: Samples | None
    input_shape: tuple[int, ...] | None
    num_classes: int | None
    fingerprint: str
    normalize: str | None = None
    flip: bool = False
    valid: Samples | None = None
    text: TextForm | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", Samples.of(self.train, where="train"))
        for name in ("test", "valid"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, Samples.of(given, where=name))

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation that preserves the targets of the training data."""
        return Augmentation(flip=self.flip)
