"""Access to a map-style data set: one item, several items, or batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from rankNAS.data.images.dataset import Images
from rankNAS.exceptions import DataError

__all__ = [
    "Pair",
    "batches",
    "channels_last",
    "gather",
    "in_memory",
    "item_of",
    "len_of",
    "permutation",
    "subset",
]

#: Inputs (n, ...) and targets (n, ...) in memory.
Pair: TypeAlias = tuple[Tensor, Tensor]


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
        shuffle_seed: Random seed of the order; None keeps the order.

    Raises:
        DataError: The batch size is not positive, or the lengths differ.
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
    order = torch.arange(size) if shuffle_seed is None else permutation(size, shuffle_seed)
    starts = range(0, size, batch_size)
    return (gather(inputs_targets, order[i : i + batch_size], device) for i in starts)


def gather(source: Pair | Dataset[Any], rows: Tensor, device: str | torch.device = "cpu") -> Pair:
    """Items ``rows`` (n,), stacked; fetched in one call if the source supports it."""
    if isinstance(source, Subset):
        indices = torch.as_tensor(source.indices, dtype=torch.int64)
        return gather(source.dataset, indices[rows], device)
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
    """All items as tensors in memory."""
    return TensorDataset(*gather(dataset, torch.arange(len_of(dataset))))


def len_of(dataset: Dataset[Any]) -> int:
    """The number of items of a map-style dataset (torch declares no ``len`` for it)."""
    return len(dataset)  # type: ignore[arg-type]


def subset(dataset: Dataset[Any], indices: Tensor) -> Dataset[Any]:
    """The dataset of the items ``indices`` (n,), in this order."""
    if isinstance(dataset, Images):
        return dataset.subset(indices)
    return Subset(dataset, indices.tolist())


def item_of(dataset: Dataset[Any], row: int, where: str) -> Pair:
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


def permutation(size: int, seed: int) -> Tensor:
    """A random permutation (size,) of the rows, determined by the seed on every machine."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def channels_last(x: Tensor) -> Tensor:
    """Images in channels-last memory format, the fastest for CPUs and tensor cores.

    Tensors other than (N, C, H, W) are returned unchanged.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
