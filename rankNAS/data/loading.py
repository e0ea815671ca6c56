"""Training and test data from a name, a user's function, or data sets.

>>> data = load_data("digits")
>>> data.input_shape, data.num_classes
((3, 32, 32), 10)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rankNAS.data.base import Data
from rankNAS.data.fingerprint import digest, sampled_bytes
from rankNAS.data.images.normalise import parse_normalization
from rankNAS.data.images.readers import READERS
from rankNAS.data.labels import stored_labels
from rankNAS.data.samples import Samples, Source
from rankNAS.data.text.loading import FORMS, is_text, load_text
from rankNAS.data.text.tokenizers import Tokenizer
from rankNAS.exceptions import DataError, RankNASError, UnknownNameError
from rankNAS.plugins import is_plugin, load_callable, neighbours_of
from rankNAS.trees import named_tensors

__all__ = ["DataSource", "load_data"]

#: A name, a `Data`, a pair of training and test data, or training data alone; see `load_data`.
DataSource: TypeAlias = "str | Data | tuple[Source, Source] | Source"
SOURCES = ("digits", "parquet:DIR", "imagefolder:DIR", "cifar10:DIR", "path/to/file.py:factory")


def load_data(
    source: DataSource,
    *,
    normalize: str | None = None,
    image_size: int | None = None,
    tokenizer: str | Tokenizer | None = None,
    context: int | None = None,
    stride: int | None = None,
    mask: float | None = None,
) -> Data:
    """The data for a name, or the given data after checks.

    Args:
        source: One of ``digits``, ``parquet:DIR``, ``imagefolder:DIR``, ``cifar10:DIR``,
            ``text:PATH``, ``jsonl:PATH``, ``tokens:DIR``, ``datasets:DIR`` (language data, see
            `rankNAS.data.text.loading.load_text`),
            ``path/to/file.py:factory`` (a function that returns one of the following); or
            a tuple of training and test data; or training data alone, labelled or not; or a
            ``Data``, which is returned unchanged. For the forms of data see `Samples.of`.
        normalize: ``imagenet`` (the default), ``cifar10``, ``MEAN,STD`` (each one number or
            three separated by ``/``) or ``m,m,m,s,s,s``, for pixels in [0, 1].
        image_size: Height and width of resized images; by default 32 for digits, 224 for image
            folders and the size of the images otherwise.
        tokenizer: For language data whose source names none: a Hugging Face folder, ``bytes``, or
            an object like `rankNAS.data.text.tokenizers.Tokenizer`.
        context: For language data: the tokens of a window; 1,024 by default.
        stride: For language data: validation and test windows begin so many tokens after each
            other, and only what is new in each counts; by default windows do not overlap.
        mask: For language data: the share of the tokens that are hidden and predicted, as masked
            language models need; by default none.

    Raises:
        DataError: The data or the options are invalid.
        UnknownNameError: There is no such source.
        UsageError: The file of a factory cannot be imported.

    Example:
        >>> data = load_data("digits")
        >>> data.input_shape, data.num_classes
        ((3, 32, 32), 10)
    """
    text = {"tokenizer": tokenizer, "context": context, "stride": stride, "mask": mask}
    if isinstance(source, str) and is_text(source):
        _refuse(
            source, {"--normalize": normalize, "--image-size": image_size}, "text has no images"
        )
        return load_text(source, tokenizer=tokenizer, context=context, stride=stride, mask=mask)
    _refuse(source, text, "only language data such as text:DIR has windows of tokens")
    if isinstance(source, str) and not is_plugin(source):
        return _read(source, normalize, image_size)
    if normalize is not None or image_size is not None:
        raise DataError(
            f"{source if isinstance(source, str) else 'a given dataset'} prepares its inputs "
            "itself, so --normalize and --image-size have no effect; leave them out."
        )
    if isinstance(source, str):
        return _from_factory(source)
    return source if isinstance(source, Data) else _from_source("datasets", source)


def _refuse(source: object, given: Mapping[str, object], why: str) -> None:
    """Raise a DataError for options that a source does not take."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        named = source if isinstance(source, str) else "a given dataset"
        raise DataError(f"{named} takes no {' and no '.join(names)}: {why}; leave it out.")


def _read(source: str, normalize: str | None, image_size: int | None) -> Data:
    """Images from a reader."""
    kind, colon, folder = source.partition(":")
    if kind not in READERS or bool(colon) == (kind == "digits"):
        raise UnknownNameError("data source", source, SOURCES, f"Of text: {', '.join(FORMS)}.")
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise DataError(f"the image size is {image_size!r}; give a positive integer, such as 32.")
    normalization = parse_normalization(normalize)
    found = READERS[kind](folder, normalization, image_size)
    shape = tuple(found.train[0][0].shape)
    classes = int(torch.maximum(found.train.targets.max(), found.test.targets.max())) + 1
    key = digest(part.encode() for part in (kind, found.content, normalization.spec, str(shape)))
    return Data(
        name=source,
        train=Samples.of(found.train),
        test=Samples.of(found.test),
        input_shape=shape,
        num_classes=classes,
        fingerprint=key[:16],
        normalize=normalization.spec,
        flip=found.flip,
    )


def _from_factory(source: str) -> Data:
    """The data that a user's function returns."""
    factory = load_callable(source, "data factory")
    try:
        with neighbours_of(factory):
            made = factory()
    except RankNASError:
        raise
    except Exception as error:
        raise DataError(
            f"the data factory {source} raised {type(error).__name__}: {error}; "
            "it must work when called without arguments."
        ) from error
    return replace(made, name=source) if isinstance(made, Data) else _from_source(source, made)


def _from_source(name: str, source: object) -> Data:
    """The data of a user's training and test data, or of training data alone."""
    pair = isinstance(source, tuple) and len(source) == 2
    if source is None or (isinstance(source, tuple) and not pair):
        raise DataError(
            f"{name}: got {type(source).__name__}; give a Data, a tuple of two data sets "
            "(train, test), or one data set."
        )
    if pair and _are_labelled_tensors(source):
        raise DataError(
            f"{name}: got two tensors of one length, which may be inputs and targets; give "
            "TensorDataset(inputs, targets), or two data sets (train, test)."
        )
    parts: Any = source if pair else (source, None)
    train = Samples.of(parts[0], where="train")
    test = None if parts[1] is None else Samples.of(parts[1], where="test")
    _check_alike(name, train, test)
    labels = [stored_labels(part) for part in (train, test) if part is not None]
    classes = None
    if all(found is not None for found in labels):
        classes = max(int(found.max()) + 1 for found in labels if found is not None)
    key = digest(sampled_bytes(train) + ([] if test is None else sampled_bytes(test)))
    return Data(name, train, test, _input_shape(train), classes, key[:16])


def _are_labelled_tensors(pair: Any) -> bool:
    """Whether a pair of tensors may be inputs and targets rather than two sets of inputs."""
    alike = all(isinstance(part, Tensor) and part.dim() for part in pair)
    return alike and len(pair[0]) == len(pair[1]) and pair[0].shape != pair[1].shape


def _check_alike(name: str, train: Samples, test: Samples | None) -> None:
    """Raise a DataError unless items of both sets have the same tensors with as many axes."""
    if test is None:
        return
    forms = [
        {place or "the tensor": x.dim() for place, x in named_tensors(part[0])}
        for part in (train, test)
    ]
    if forms[0] != forms[1]:
        listed = [
            ", ".join(f"{place} with {n} axes" for place, n in form.items()) for form in forms
        ]
        raise DataError(
            f"{name}: items have {listed[0]} in the train split, but {listed[1]} in the test "
            "split; both must have the same form."
        )


def _input_shape(samples: Samples) -> tuple[int, ...] | None:
    """The shape of the only input of a sample; None if there are several."""
    item = samples[0]
    if isinstance(item, tuple | list) and len(item) <= 2:
        item = item[0]
    return tuple(item.shape) if isinstance(item, Tensor) else None
