"""Disjoint parts of a data set: training, calibration, validation and test.

>>> from rankNAS.data.loading import load_data
>>> parts = split(load_data("digits"), calibration=256, validation=256, seed=0)
>>> len(parts.calibration[0]), len(parts.validation[0])
(256, 256)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from rankNAS.data.base import Data
from rankNAS.data.batches import Pair, gather, len_of, permutation, subset
from rankNAS.data.images.augment import NO_FLIP, Augmentation
from rankNAS.exceptions import DataError

__all__ = ["Splits", "held_out", "split", "subsample"]

#: Largest percentages of the training set for validation and calibration data.
VALIDATION_PERCENT, CALIBRATION_PERCENT = 20, 40


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint parts. A search uses only calibration and validation; test is read at the end.

    Attributes:
        training: Data for training and fine-tuning: all but validation, including calibration.
        calibration: Inputs (n, *input_shape) and targets (n, ...) in memory.
        validation: The same for other items.
        test: The whole test set.
        augmentation: The augmentation that the training data allows.
    """

    training: Dataset[Any]
    calibration: Pair
    validation: Pair
    test: Dataset[Any]
    augmentation: Augmentation = NO_FLIP


def split(data: Data, *, calibration: int = 1024, validation: int = 1024, seed: int = 0) -> Splits:
    """The disjoint parts of a data set, with random calibration and validation items.

    Args:
        data: The data; its test set is unchanged.
        calibration: Largest number of calibration items; never over 40 % of the training set.
        validation: Largest number of validation items; never over 20 % of the training set.
        seed: Equal seeds select equal items on every machine.

    Raises:
        DataError: A count is not positive, or the training set has less than 5 items.
    """
    size = len_of(data.train)
    if calibration < 1 or validation < 1:
        raise DataError(
            f"{calibration} calibration and {validation} validation items were asked for; "
            "both must be at least 1."
        )
    if size < 5:
        raise DataError(f"{data.name} has {size} training items; at least 5 are needed to split.")
    validated = held_out(size, validation)
    end = validated + min(calibration, size * CALIBRATION_PERCENT // 100)
    order = permutation(size, seed)
    return Splits(
        training=subset(data.train, order[validated:].sort().values),
        calibration=gather(data.train, order[validated:end]),
        validation=gather(data.train, order[:validated]),
        test=data.test,
        augmentation=data.augmentation,
    )


def held_out(size: int, validation: int) -> int:
    """The number of validation items that `split` takes from ``size`` training items."""
    return min(validation, size * VALIDATION_PERCENT // 100)


def subsample(dataset: Dataset[Any], count: int, seed: int) -> Dataset[Any]:
    """At most `count` items, sampled by the seed, in the order of the dataset."""
    if count >= len_of(dataset):
        return dataset
    return subset(dataset, permutation(len_of(dataset), seed)[:count].sort().values)
