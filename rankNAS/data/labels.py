"""Class labels of data sets: found without reading inputs, and checked."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from rankNAS.data.batches import len_of
from rankNAS.data.images.dataset import Images
from rankNAS.exceptions import DataError

if TYPE_CHECKING:
    from rankNAS.data.base import Data

__all__ = ["check_labels", "labels_of", "num_classes_of"]


def check_labels(data: Data, outputs: int) -> None:
    """Raise an error unless the network has an output for every class.

    Args:
        data: The data; sets without class labels pass.
        outputs: The number of outputs of the network.

    Raises:
        DataError: A label is negative or at least ``outputs``.
    """
    for where, dataset in (("train", data.train), ("test", data.test)):
        labels = labels_of(dataset, where)
        if labels is None:
            continue
        _refuse(
            labels,
            labels >= outputs,
            where,
            f"but the network has {outputs} outputs; give a network with more outputs, "
            "or renumber the classes.",
        )


def num_classes_of(train: Tensor | None, test: Tensor | None) -> int | None:
    """One more than the largest label of both sets; None unless both have class labels."""
    if train is None or test is None:
        return None
    return int(torch.maximum(train.max(), test.max())) + 1


def labels_of(dataset: Dataset[Any], where: str) -> Tensor | None:
    """All labels, int64 (n,), without reading inputs if possible; None for non-integer targets."""
    labels = _stored_labels(dataset)
    if labels is None or not _agrees(dataset, labels):
        labels = _scanned_labels(dataset, where)
    if labels is not None:
        why = "but labels must be integers from 0; renumber the classes."
        _refuse(labels, labels < 0, where, why)
    return labels


def _stored_labels(dataset: Dataset[Any]) -> Tensor | None:
    """Labels that a dataset stores in one attribute."""
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
    """``values`` as a one-dimensional integer tensor; None if they are no such labels."""
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    integers = not labels.is_floating_point() and not labels.is_complex()
    return labels.long() if labels.ndim == 1 and integers and labels.dtype != torch.bool else None


def _agrees(dataset: Dataset[Any], labels: Tensor) -> bool:
    """Whether the stored labels match those of the first and the last item.

    A target transform may change the labels of items.
    """
    return isinstance(dataset, Images) or all(
        _integer(dataset[row][1]) == int(labels[row]) for row in {0, len(labels) - 1}
    )


def _scanned_labels(dataset: Dataset[Any], where: str) -> Tensor | None:
    """Labels from reading every item; None if the first is no integer."""
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
    """An integer scalar as int; None for other values, including booleans."""
    if isinstance(value, Tensor):
        value = value.item() if value.ndim == 0 else None
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if integral else None  # type: ignore[call-overload]


def _refuse(labels: Tensor, bad: Tensor, where: str, why: str) -> None:
    """Raise an error for the first invalid label."""
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(f"item {row} of the {where} split has the label {labels[row]}, {why}")
