"""Training and test data from a name, a user's function, or a pair of data sets.

>>> data = load_data("digits")
>>> data.input_shape, data.num_classes
((3, 32, 32), 10)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import Dataset

from rankNAS.data.base import Data
from rankNAS.data.batches import item_of
from rankNAS.data.fingerprint import digest, sampled_bytes
from rankNAS.data.images.normalise import parse_normalization
from rankNAS.data.images.readers import READERS
from rankNAS.data.labels import labels_of, num_classes_of
from rankNAS.exceptions import DataError, RankNASError, UnknownNameError
from rankNAS.plugins import is_plugin, load_callable

__all__ = ["DataSource", "load_data"]

#: A name, a `Data`, or a pair of training and test set; see `load_data`.
DataSource: TypeAlias = "str | Data | tuple[Dataset[Any], Dataset[Any]]"
SOURCES = ("digits", "parquet:DIR", "imagefolder:DIR", "cifar10:DIR", "path/to/file.py:factory")


def load_data(
    source: DataSource,
    *,
    normalize: str | None = None,
    image_size: int | None = None,
) -> Data:
    """The data for a name, or the given data after checks.

    Args:
        source: One of ``digits``, ``parquet:DIR``, ``imagefolder:DIR``, ``cifar10:DIR``,
            ``path/to/file.py:factory`` (a function that returns one of the following); or
            a training and a test dataset; or a ``Data``, which is returned unchanged.
        normalize: ``imagenet`` (the default), ``cifar10``, ``MEAN,STD`` (each one number or
            three separated by ``/``) or ``m,m,m,s,s,s``, for pixels in [0, 1].
        image_size: Height and width of resized images; by default 32 for digits, 224 for image
            folders and the size of the images otherwise.

    Raises:
        DataError: The data or the options are invalid.
        UnknownNameError: There is no such source.
        UsageError: The file of a factory cannot be imported.

    Example:
        >>> data = load_data("digits")
        >>> data.input_shape, data.num_classes
        ((3, 32, 32), 10)
    """
    if isinstance(source, str) and not is_plugin(source):
        return _read(source, normalize, image_size)
    if normalize is not None or image_size is not None:
        raise DataError(
            f"{source if isinstance(source, str) else 'a given dataset'} prepares its inputs "
            "itself, so --normalize and --image-size have no effect; leave them out."
        )
    if isinstance(source, str):
        return _from_factory(source)
    return source if isinstance(source, Data) else _from_pair("datasets", source)


def _read(source: str, normalize: str | None, image_size: int | None) -> Data:
    """Images from a reader."""
    kind, colon, folder = source.partition(":")
    if kind not in READERS or bool(colon) == (kind == "digits"):
        raise UnknownNameError("data source", source, SOURCES)
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise DataError(f"the image size is {image_size!r}; give a positive integer, such as 32.")
    normalization = parse_normalization(normalize)
    found = READERS[kind](folder, normalization, image_size)
    shape = tuple(found.train[0][0].shape)
    key = digest(part.encode() for part in (kind, found.content, normalization.spec, str(shape)))
    return Data(
        name=source,
        train=found.train,
        test=found.test,
        input_shape=shape,
        num_classes=num_classes_of(found.train.targets, found.test.targets),
        fingerprint=key[:16],
        normalize=normalization.spec,
        flip=found.flip,
    )


def _from_factory(source: str) -> Data:
    """The data that a user's function returns."""
    factory = load_callable(source, "data factory")
    try:
        made = factory()
    except RankNASError:
        raise
    except Exception as error:
        raise DataError(
            f"the data factory {source} raised {type(error).__name__}: {error}; "
            "it must work when called without arguments."
        ) from error
    return replace(made, name=source) if isinstance(made, Data) else _from_pair(source, made)


def _from_pair(name: str, pair: object) -> Data:
    """The data of a user's training and test dataset."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise DataError(
            f"{name}: got {type(pair).__name__}; give a Data or a tuple of two map-style "
            "datasets, (train, test)."
        )
    train, test = pair
    shapes = [
        tuple(_first_input(part, where).shape)
        for part, where in ((train, "train"), (test, "test"))
    ]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{name}: inputs have the shape {shapes[0]} in the train split and {shapes[1]} in "
            "the test split; both must be the same."
        )
    labels = labels_of(train, "train"), labels_of(test, "test")
    key = digest(sampled_bytes(train, "train") + sampled_bytes(test, "test"))
    return Data(name, train, test, shapes[0], num_classes_of(*labels), key[:16])


def _first_input(dataset: Any, where: str) -> Tensor:
    """Input 0 of a non-empty map-style dataset."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"the {where} dataset is a {type(dataset).__name__} without len() or indexing; "
            "give a map-style dataset, such as a torch.utils.data.TensorDataset."
        )
    if not len(dataset):
        raise DataError(f"the {where} split has no items; it needs at least one.")
    return item_of(dataset, 0, where)[0]
