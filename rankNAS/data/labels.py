"""Class labels of samples: found without reading inputs where a data set stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankNAS.data.images.dataset import Images
from rankNAS.data.samples import Samples
from rankNAS.exceptions import DataError
from rankNAS.trees import tensors

__all__ = ["IGNORED", "TARGETS", "check_labels", "count_classes", "stored_labels"]

IGNORED = -100  # the label of what does not count, as in `torch.nn.functional.cross_entropy`
TARGETS = ("labels", "label", "targets", "target", "y", "label_ids")  # keys of targets


def check_labels(samples: Samples, where: str, outputs: int, ignored: int = IGNORED) -> None:
    """Raise an error unless the network has an output for every class label in memory.

    Args:
        samples: The samples; those whose class labels are neither stored nor in memory pass.
        where: Their name in messages, such as ``train``.
        outputs: The number of outputs of the network.
        ignored: The label of samples that do not count.

    Raises:
        DataError: A label is negative or at least ``outputs``.
    """
    labels = stored_labels(samples)
    if labels is None and samples.in_memory:
        labels = _read_labels(samples)
    if labels is None:
        return
    counts = labels != ignored
    _refuse(
        labels,
        counts & (labels >= outputs),
        where,
        f"but the network has {outputs} outputs; give a network with more outputs, "
        "or renumber the classes.",
    )
    why = f"but labels must be integers from 0, or {ignored} for samples that do not count."
    _refuse(labels, counts & (labels < 0), where, why)


def count_classes(samples: Samples) -> int | None:
    """One more than the largest class label; reads every item whose label is not stored.

    Returns:
        None if labels are no whole numbers.
    """
    labels = stored_labels(samples)
    if labels is None:
        labels = _read_labels(samples)
    return None if labels is None or not len(labels) else max(int(labels.max()) + 1, 1)


def stored_labels(samples: Samples) -> Tensor | None:
    """All labels, int64 (n,), from memory; None for other targets, or if they are not stored."""
    source, order = samples.source, samples.order
    if isinstance(source, Images):
        return source.targets[order]
    stored = _target(source) if isinstance(source, tuple | Mapping) else None
    if stored is None and not isinstance(source, Tensor | tuple | Mapping):
        stored = _attribute(source)
        if stored is not None and not _agrees(samples, stored[order]):
            return None
    if stored is None or len(stored) <= int(order.max()):
        return None
    return _whole(stored[order])


def _read_labels(samples: Samples) -> Tensor | None:
    """All labels, int64 (n,), from every item; None for other targets."""
    found = [_target(samples[row]) for row in range(len(samples))]
    if any(label is None or label.numel() != 1 for label in found):
        return None
    return _whole(torch.stack([x.flatten()[0] for x in found if x is not None]))


def _attribute(source: Any) -> Tensor | None:
    """Labels that a data set stores in one attribute."""
    for name in ("targets", "labels"):
        try:
            labels = torch.as_tensor(getattr(source, name, None))
        except (TypeError, ValueError, RuntimeError):
            continue
        if labels.ndim == 1 and len(labels) == len(source):
            return labels
    return None


def _target(batch: Any) -> Tensor | None:
    """The target of a batch or an item: the last part, or the part with a name of targets."""
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in TARGETS if name in batch), None)
    else:
        found = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None


def _whole(labels: Tensor) -> Tensor | None:
    """``labels`` as int64 (n,); None if they are no whole numbers, one for each sample."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        return None
    return labels.long() if labels.dtype != torch.bool else None


def _agrees(samples: Samples, labels: Tensor) -> bool:
    """Whether the stored labels match those of the first and the last item.

    A target transform may change the labels of items.
    """
    for row in {0, len(samples) - 1}:
        own = _target(samples[row])
        if own is None or own.numel() != 1 or float(own) != float(labels[row]):
            return False
    return bool(tensors(samples[0]))


def _refuse(labels: Tensor, bad: Tensor, where: str, why: str) -> None:
    """Raise an error for the first invalid label."""
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(f"item {row} of the {where} split has the label {labels[row]}, {why}")
