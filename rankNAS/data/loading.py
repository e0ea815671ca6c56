"""Training and test data: where it comes from, how it is split and how it is fed to a network.

>>> data = load_data("digits")
>>> parts = split(data, calibration=256, validation=256, seed=0)
>>> len(parts.calibration[0]), data.input_shape, data.num_classes
(256, (3, 32, 32), 10)
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Subset, TensorDataset

from rankNAS.data.sources import (
    READERS,
    Images,
    digest,
    normalization_from_metadata,
    parse_normalization,
)
from rankNAS.exceptions import DataError, RankNASError, UnknownNameError
from rankNAS.plugins import is_plugin, load_callable

__all__ = [
    "Data",
    "Splits",
    "augment",
    "batches",
    "channels_last",
    "check_labels",
    "subsample",
    "held_out",
    "in_memory",
    "load_data",
    "normalization_from_metadata",
    "len_of",
    "split",
    "subset",
]

#: Inputs (n, ...) and targets (n, ...) in memory.
Pair: TypeAlias = tuple[Tensor, Tensor]

SOURCES = ("digits", "parquet:DIR", "imagefolder:DIR", "cifar10:DIR", "path/to/file.py:factory")

#: The largest parts of the training set that may become validation and calibration data.
VALIDATION_PERCENT, CALIBRATION_PERCENT = 20, 40


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
        >>> from torch.utils.data import TensorDataset
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


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint parts. The search sees only calibration and validation; test is read at the end.

    Attributes:
        training: For training and fine-tuning: all but validation, so with calibration.
        calibration: Inputs (n, *input_shape) and targets (n, ...) in memory.
        validation: The same, of other items.
        test: The test set, whole.
    """

    training: Dataset[Any]
    calibration: Pair
    validation: Pair
    test: Dataset[Any]


# ---------------------------------------------------------------------------- loading


def load_data(
    source: str | Data | tuple[Dataset[Any], Dataset[Any]],
    *,
    normalize: str | None = None,
    image_size: int | None = None,
) -> Data:
    """The data that a user named, or gave.

    Args:
        source: One of ``digits``, ``parquet:DIR``, ``imagefolder:DIR``, ``cifar10:DIR``,
            ``path/to/file.py:factory`` (a function that returns one of the following); or
            a training and a test dataset; or a ``Data``, which is returned as it is.
        normalize: ``imagenet`` (the default), ``cifar10``, ``MEAN,STD`` (each one number or
            three with ``/`` between them) or ``m,m,m,s,s,s``, for pixels in [0, 1].
        image_size: Height and width that images are resized to; by default 32 for digits,
            224 for image folders and that of the images elsewhere.

    Raises:
        DataError: If anything about the data or the options is wrong.
        UnknownNameError: If there is no such source.
        UsageError: If the file of a factory cannot be imported.

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
    """Images from one of the readers."""
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
        num_classes=_num_classes(found.train.targets, found.test.targets),
        fingerprint=key[:16],
        normalize=normalization.spec,
        flip=found.flip,
    )


def _from_factory(source: str) -> Data:
    """What a function of the user returns."""
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
    """A training and a test dataset of the user."""
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
    labels = _labels_of(train, "train"), _labels_of(test, "test")
    key = digest(_sampled_bytes(train, "train") + _sampled_bytes(test, "test"))
    return Data(name, train, test, shapes[0], _num_classes(*labels), key[:16])


def _first_input(dataset: Any, where: str) -> Tensor:
    """Input 0 of a dataset that is map-style and not empty."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"the {where} dataset is a {type(dataset).__name__} without len() or indexing; "
            "give a map-style dataset, such as a torch.utils.data.TensorDataset."
        )
    if not len(dataset):
        raise DataError(f"the {where} split has no items; it needs at least one.")
    return _item(dataset, 0, where)[0]


def _item(dataset: Dataset[Any], row: int, where: str) -> Pair:
    """One item as two tensors."""
    item = dataset[row]
    is_sequence = isinstance(item, tuple | list)
    if not is_sequence or len(item) != 2 or not isinstance(item[0], Tensor):
        parts = ", ".join(type(part).__name__ for part in item) if is_sequence else ""
        raise DataError(
            f"item {row} of the {where} split is a {type(item).__name__} of ({parts}), not (input "
            "tensor, target); return a pair and convert inputs, for example with ToTensor."
        )
    try:
        return item[0], torch.as_tensor(item[1])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"item {row} of the {where} split has the target {item[1]!r}; "
            "it must be a number or a tensor, so number the classes from 0."
        ) from error


def _sampled_bytes(dataset: Dataset[Any], where: str) -> list[bytes]:
    """The length and up to 64 evenly spaced items, among them the first and the last."""
    last = len_of(dataset) - 1
    parts = [str(last).encode()]
    # Random transforms that draw from torch must give the same items each time.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for row in sorted({i * last // 63 for i in range(64)}):
            for value in _item(dataset, row, where):
                parts += [f"{value.dtype}{tuple(value.shape)}".encode(), _raw(value)]
    return parts


def _raw(value: Tensor) -> bytes:
    """The bytes of a tensor of any dtype; numpy has no bfloat16."""
    raw: bytes = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return raw


# ---------------------------------------------------------------------------- labels


def check_labels(data: Data, outputs: int) -> None:
    """Make sure that a network with ``outputs`` outputs can tell all classes apart.

    Raises:
        DataError: If a label is negative or at least ``outputs``.
    """
    for where, dataset in (("train", data.train), ("test", data.test)):
        labels = _labels_of(dataset, where)
        if labels is None:
            continue
        _refuse(
            labels,
            labels >= outputs,
            where,
            f"but the network has {outputs} outputs; give a network with more outputs, "
            "or renumber the classes.",
        )


def _refuse(labels: Tensor, bad: Tensor, where: str, why: str) -> None:
    """Raise for the first label that is bad."""
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(f"item {row} of the {where} split has the label {labels[row]}, {why}")


def _num_classes(train: Tensor | None, test: Tensor | None) -> int | None:
    if train is None or test is None:
        return None
    return int(torch.maximum(train.max(), test.max())) + 1


def _labels_of(dataset: Dataset[Any], where: str) -> Tensor | None:
    """All labels, int64 (n,); None if targets are not integers. Avoids reading inputs."""
    labels = _stored_labels(dataset)
    if labels is None or not _agrees(dataset, labels):
        labels = _scanned_labels(dataset, where)
    if labels is not None:
        why = "but labels must be integers from 0; renumber the classes."
        _refuse(labels, labels < 0, where, why)
    return labels


def _stored_labels(dataset: Dataset[Any]) -> Tensor | None:
    """Labels that a dataset keeps in one place."""
    if isinstance(dataset, Subset):
        labels = _stored_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        return _as_labels(dataset.tensors[-1])
    for name in ("targets", "labels"):
        labels = _as_labels(getattr(dataset, name, None))
        if labels is not None and len(labels) == len_of(dataset):
            return labels
    return None


def _as_labels(values: object) -> Tensor | None:
    """A one-dimensional integer tensor of ``values``, if they are that."""
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    integers = not labels.is_floating_point() and not labels.is_complex()
    return labels.long() if labels.ndim == 1 and integers and labels.dtype != torch.bool else None


def _agrees(dataset: Dataset[Any], labels: Tensor) -> bool:
    """Whether stored labels are what items have: a target transform may renumber them."""
    return isinstance(dataset, Images) or all(
        _integer(dataset[row][1]) == int(labels[row]) for row in {0, len(labels) - 1}
    )


def _scanned_labels(dataset: Dataset[Any], where: str) -> Tensor | None:
    """Labels from reading every item; None if the first is not an integer."""
    if _integer(dataset[0][1]) is None:
        return None
    labels = []
    for row in range(len_of(dataset)):
        target = dataset[row][1]
        label = _integer(target)
        if label is None:
            raise DataError(
                f"item {row} of the {where} split has the label {target!r}, unlike item 0, whose "
                "label is an integer; make all labels integers from 0."
            )
        labels.append(label)
    return torch.tensor(labels)


def _integer(value: object) -> int | None:
    """An integer scalar as int; None for anything else, booleans too."""
    if isinstance(value, Tensor):
        value = value.item() if value.ndim == 0 else None
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if integral else None  # type: ignore[call-overload]


# ---------------------------------------------------------------------------- splitting


def split(data: Data, *, calibration: int = 1024, validation: int = 1024, seed: int = 0) -> Splits:
    """Set calibration and validation items apart, chosen at random.

    Args:
        data: Its test set is left as it is.
        calibration: Items for calibration, at most; never over 40 % of the training set.
        validation: Items for validation, at most; never over 20 % of the training set.
        seed: Equal seeds choose equal items, on every machine.

    Raises:
        DataError: If a count is not positive or the training set has less than 5 items.
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
    order = _permutation(size, seed)
    return Splits(
        training=subset(data.train, order[validated:].sort().values),
        calibration=_gather(data.train, order[validated:end]),
        validation=_gather(data.train, order[:validated]),
        test=data.test,
    )


def held_out(size: int, validation: int) -> int:
    """How many of ``size`` training items `split` sets apart for validation."""
    return min(validation, size * VALIDATION_PERCENT // 100)


def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def len_of(dataset: Dataset[Any]) -> int:
    """The number of items of a map-style dataset; torch does not declare ``len`` for it."""
    return len(dataset)  # type: ignore[arg-type]


def subset(dataset: Dataset[Any], indices: Tensor) -> Dataset[Any]:
    """The dataset of the items ``indices`` (n,) only, in this order."""
    if isinstance(dataset, Images):
        return dataset.subset(indices)
    return Subset(dataset, indices.tolist())


def subsample(dataset: Dataset[Any], count: int, seed: int) -> Dataset[Any]:
    """At most so many items, chosen by the seed, in the order of the dataset."""
    if count >= len_of(dataset):
        return dataset
    return subset(dataset, _permutation(len_of(dataset), seed)[:count].sort().values)


# ---------------------------------------------------------------------------- batches


def batches(
    inputs_targets: Pair | Dataset[Any],
    batch_size: int,
    *,
    device: str | torch.device = "cpu",
    shuffle_seed: int | None = None,
) -> Iterator[Pair]:
    """Batches (b, ...) of inputs and targets on ``device``; the last one may be smaller.

    Args:
        inputs_targets: Tensors of equal length, or a map-style dataset.
        batch_size: Items per batch.
        device: Where batches are moved to; images are normalised there.
        shuffle_seed: Order of the items; as they are if None.

    Raises:
        DataError: If the batch size is not positive or the lengths differ.
    """
    if batch_size < 1:
        raise DataError(f"the batch size is {batch_size}; give a positive integer.")
    if isinstance(inputs_targets, tuple):
        lengths = len(inputs_targets[0]), len(inputs_targets[1])
        if lengths[0] != lengths[1]:
            raise DataError(f"{lengths[0]} inputs have {lengths[1]} targets; give one for each.")
        size = lengths[0]
    else:
        size = len_of(inputs_targets)
    order = torch.arange(size) if shuffle_seed is None else _permutation(size, shuffle_seed)
    starts = range(0, size, batch_size)
    return (_gather(inputs_targets, order[i : i + batch_size], device) for i in starts)


def _gather(source: Pair | Dataset[Any], rows: Tensor, device: str | torch.device = "cpu") -> Pair:
    """Items ``rows`` (n,), stacked; at once where the source can do that."""
    if isinstance(source, Subset):
        indices = torch.as_tensor(source.indices, dtype=torch.int64)
        return _gather(source.dataset, indices[rows], device)
    if isinstance(source, Images):
        return source.batch(rows, device)
    if isinstance(source, TensorDataset) and len(source.tensors) == 2:
        source = (source.tensors[0], source.tensors[1])
    if isinstance(source, tuple):
        inputs, targets = (part[rows.to(part.device)] for part in source)
        return inputs.to(device), targets.to(device)
    items = [source[row] for row in rows.tolist()]
    return (
        torch.stack([item[0] for item in items]).to(device),
        torch.stack([torch.as_tensor(item[1]) for item in items]).to(device),
    )


def in_memory(dataset: Dataset[Any]) -> TensorDataset:
    """All items as tensors."""
    return TensorDataset(*_gather(dataset, torch.arange(len_of(dataset))))


def channels_last(x: Tensor) -> Tensor:
    """Images in the memory format in which CPUs and tensor cores convolve fastest.

    Anything but (N, C, H, W) is returned as it is.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def augment(x: Tensor, generator: torch.Generator, *, flip: bool = True) -> Tensor:
    """Shift every image by up to an eighth of its size, and mirror half of them.

    Pixels from outside an image are 0, the mean of normalised images.

    Args:
        x: Images (N, C, H, W); anything else is returned as it is.
        generator: A generator on the CPU.
        flip: Mirror; ``Data.flip`` says whether that keeps the class.

    Returns:
        New images of the same shape.
    """
    if x.ndim != 4:
        return x
    count, _, height, width = x.shape
    rows = _shifted(count, height, generator)
    columns = _shifted(count, width, generator)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    pad = (width // 8, width // 8, height // 8, height // 8)
    padded = functional.pad(x, pad).permute(0, 2, 3, 1)
    images = torch.arange(count)[:, None, None]
    picked = (part.to(x.device) for part in (images, rows[:, :, None], columns[:, None, :]))
    return padded[tuple(picked)].permute(0, 3, 1, 2).contiguous()


def _shifted(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Positions (count, size) in a padded axis that a window at a random offset covers."""
    offsets = torch.randint(2 * (size // 8) + 1, (count, 1), generator=generator)
    return offsets + torch.arange(size)
