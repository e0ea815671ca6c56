"""Disjoint parts of a data set: training, calibration, validation and test.

>>> from rankNAS.data.loading import load_data
>>> parts = split(load_data("digits"), calibration=256, validation=256, seed=0)
>>> len(parts.calibration), len(parts.validation)
(256, 256)
"""

from __future__ import annotations

from dataclasses import dataclass

from rankNAS.data.base import Data
from rankNAS.data.images.augment import NO_FLIP, Augmentation
from rankNAS.data.samples import Samples, permutation
from rankNAS.exceptions import DataError

__all__ = ["Splits", "held_out", "split"]

#: Largest percentages of the training set for validation and calibration data.
VALIDATION_PERCENT, CALIBRATION_PERCENT = 20, 40
KEPT = 4 << 30  # bytes of a part that is kept in memory; a larger one is read at each pass


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint parts. A search uses only calibration and validation; test is read at the end.

    Attributes:
        training: Data for training and fine-tuning: all but validation, including calibration.
        calibration: Samples for statistics and batch norms, in memory.
        validation: Other samples, for metrics, in memory.
        test: The whole test set; None if there is none.
        augmentation: The augmentation that the training data allows.
    """

    training: Samples
    calibration: Samples
    validation: Samples
    test: Samples | None
    augmentation: Augmentation = NO_FLIP


def split(data: Data, *, calibration: int = 1024, validation: int = 1024, seed: int = 0) -> Splits:
    """The disjoint parts of a data set, with random calibration and validation items.

    Args:
        data: The data; its test set is unchanged.
        calibration: Largest number of calibration items; never over 40 % of the training set,
            unless there is a validation set.
        validation: Largest number of validation items; never over 20 % of the training set, or
            all of the validation set.
        seed: Equal seeds select equal items on every machine.

    Raises:
        DataError: A count is not positive, or the training set has less than 5 items.
    """
    size = len(data.train)
    if calibration < 1 or validation < 1:
        raise DataError(
            f"{calibration} calibration and {validation} validation items were asked for; "
            "both must be at least 1."
        )
    order = permutation(size, seed)
    if data.valid is not None:
        return Splits(
            training=data.train,
            calibration=data.train.take(order[: min(calibration, size)]).kept(KEPT),
            validation=data.valid.subsample(validation, seed).kept(KEPT),
            test=data.test,
            augmentation=data.augmentation,
        )
    if size < 5:
        raise DataError(f"{data.name} has {size} training items; at least 5 are needed to split.")
    validated = held_out(data, validation)
    end = validated + min(calibration, size * CALIBRATION_PERCENT // 100)
    return Splits(
        training=data.train.take(order[validated:].sort().values),
        calibration=data.train.take(order[validated:end]).kept(KEPT),
        validation=data.train.take(order[:validated]).kept(KEPT),
        test=data.test,
        augmentation=data.augmentation,
    )


def held_out(data: Data, validation: int) -> int:
    """The number of validation items that `split` takes from the training set."""
    if data.valid is not None:
        return 0
    return min(validation, len(data.train) * VALIDATION_PERCENT // 100)
