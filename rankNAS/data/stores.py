"""Stores of samples: items that are collated, tensors in memory, or batches in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from rankNAS.data.items import Batch, Batched, Collate, as_tensors, shapes_of, stacked
from rankNAS.exceptions import DataError, RankNASError, shortened
from rankNAS.trees import count_bytes, map_children, named_tensors, rows, size_of, to_device

__all__ = ["Store", "store_of"]

MOST_BYTES = 4 << 30  # of batches that an iterable may put into memory


class Store(ABC):
    """Where samples are."""

    source: Any
    in_memory = True

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def item(self, row: int) -> Any:
        """One sample, with tensors for numbers and arrays."""

    @abstractmethod
    def groups(self, order: Tensor) -> list[Tensor]:
        """The rows, divided into those that fit into one batch."""

    @abstractmethod
    def gather(self, wanted: Tensor, device: str | torch.device) -> Batch:
        """The batch of some rows of one group."""

    @abstractmethod
    def kept(self, order: Tensor) -> Store:
        """A store in memory of some rows."""

    def placed(self, function: Callable[[Batch], Batch]) -> Store | None:
        """The store with a function of its tensors applied; None if they are not in memory."""
        return None


@final
class _Items(Store):
    """A map-style data set or a list of items."""

    def __init__(self, dataset: Any, collate: Collate | None, where: str) -> None:
        self.source, self._collate, self._where = dataset, collate, where
        self.in_memory = isinstance(dataset, list)
        self._shapes: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.source)

    def item(self, row: int) -> Any:
        return as_tensors(self._read(row), self._name(row))

    def groups(self, order: Tensor) -> list[Tensor]:
        if self._collate is not None or self._alike(order):
            return [order]
        return _grouped(order, self._shape)

    def gather(self, wanted: Tensor, device: str | torch.device) -> Batch:
        if isinstance(self.source, Batched):
            return self.source.batch(wanted, device)
        if self._collate is None:
            return to_device(self._stacked(wanted.tolist()), device)
        return to_device(self._collated(wanted.tolist(), self._collate), device)

    def kept(self, order: Tensor) -> Store:
        if self._collate is None and len(self.groups(order)) == 1:
            return _Stacked(self.gather(order, "cpu"))
        items = [self._read(row) for row in order.tolist()]
        return _Items(items, self._collate, self._where)

    def _name(self, row: int) -> str:
        return f"item {row} of the {self._where} split"

    def _read(self, row: int) -> Any:
        """One item as the data set gives it."""
        try:
            return self.source[row]
        except RankNASError:
            raise
        except Exception as error:  # a user's data set can raise any error
            raise DataError(
                f"{self._name(row)} cannot be read ({_cause(error)}); mend or remove it."
            ) from error

    def _alike(self, order: Tensor) -> bool:
        """Whether the items have equal shapes: all in memory, or else 8 evenly spaced ones."""
        if isinstance(self.source, Batched):
            return True
        chosen = order
        if not isinstance(self.source, list) and len(order) > 8:
            chosen = order[torch.arange(8) * (len(order) - 1) // 7]
        return len({self._shape(row) for row in chosen.tolist()}) == 1

    def _stacked(self, wanted: Sequence[int]) -> Batch:
        items = [self.item(row) for row in wanted]
        try:
            return stacked(items)
        except (RuntimeError, DataError) as error:
            own = [shapes_of(item) for item in items]
            other = next((i for i, shapes in enumerate(own) if shapes != own[0]), None)
            if other is None:
                raise
            raise DataError(
                f"items of the {self._where} split differ in shape: item {wanted[other]} has "
                f"{_shown(items[other])}, but item {wanted[0]} has {_shown(items[0])}; make them "
                "equal (resize and crop images, pad text), or give a `collate_fn` that does."
            ) from error

    def _collated(self, wanted: Sequence[int], collate: Collate) -> Batch:
        items = [self._read(row) for row in wanted]
        try:
            batch = collate(items)
        except RankNASError:
            raise
        except Exception as error:  # a user's function can raise any error
            named = ", ".join(map(str, wanted[:8])) + ", …" * (len(wanted) > 8)
            raise DataError(
                f"the collate function raised {_cause(error)} for the items {named} of the "
                f"{self._where} split; it must take any list of items."
            ) from error
        return as_tensors(batch, "a batch of the collate function")

    def _shape(self, row: int) -> Any:
        if row not in self._shapes:
            self._shapes[row] = shapes_of(self.item(row))
        return self._shapes[row]


@final
class _Stacked(Store):
    """Tensors in memory: all samples as one batch."""

    def __init__(self, tree: Batch) -> None:
        self.source, self._size = tree, size_of(tree)

    def __len__(self) -> int:
        return self._size

    def item(self, row: int) -> Any:
        return rows(self.source, torch.tensor(row), self._size)

    def groups(self, order: Tensor) -> list[Tensor]:
        return [order]

    def gather(self, wanted: Tensor, device: str | torch.device) -> Batch:
        first, last = int(wanted[0]), int(wanted[-1])
        # Consecutive rows are a view.
        run = last - first == len(wanted) - 1 and bool((wanted.diff() == 1).all())
        found = rows(self.source, slice(first, last + 1) if run else wanted, self._size)
        return to_device(found, device)

    def kept(self, order: Tensor) -> Store:
        if len(order) == self._size and bool((order == torch.arange(self._size)).all()):
            return self
        return _Stacked(self.gather(order, "cpu"))

    def placed(self, function: Callable[[Batch], Batch]) -> Store | None:
        return _Stacked(function(self.source))


@final
class _Batches(Store):
    """Batches in memory. Samples of different batches are never merged."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.source = batches
        self._sizes = [size_of(batch) for batch in batches]
        self._starts = [0, *torch.tensor(self._sizes).cumsum(0).tolist()]
        self._owner = torch.repeat_interleave(
            torch.arange(len(batches)), torch.tensor(self._sizes)
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def item(self, row: int) -> Any:
        i = int(self._owner[row])
        return rows(self.source[i], torch.tensor(row - self._starts[i]), self._sizes[i])

    def groups(self, order: Tensor) -> list[Tensor]:
        return _grouped(order, lambda row: int(self._owner[row]))

    def gather(self, wanted: Tensor, device: str | torch.device) -> Batch:
        i = int(self._owner[wanted[0]])
        found = rows(self.source[i], wanted - self._starts[i], self._sizes[i])
        return to_device(found, device)

    def kept(self, order: Tensor) -> Store:
        return _Batches([self.gather(group, "cpu") for group in self.groups(order)])


def subset_of(source: Any) -> tuple[Any, Sequence[int], Collate | None] | None:
    """A data set, the chosen rows and the collate function of a subset; None for other sources."""
    if type(source) is Subset:  # subclasses may change the items
        return source.dataset, source.indices, None
    if isinstance(source, DataLoader) and source.batch_size is not None:
        sampler = source.sampler
        if type(sampler) is SubsetRandomSampler:
            return source.dataset, sampler.indices, _collate(source)
    return None


def store_of(source: Any, collate: Collate | None, where: str) -> Store:
    """The store of a source; see `Samples.of`.

    Raises:
        DataError: The source is of another kind, or too large for the memory.
    """
    if isinstance(source, DataLoader):
        return _loaded(source, collate, where)
    # Subclasses may change the items.
    if type(source) is TensorDataset and collate is None:
        return _Stacked(tuple(source.tensors))
    if isinstance(source, Tensor) or _are_parts(source):
        return _Stacked(source)
    if isinstance(source, IterableDataset):
        return _Items(list(_bounded(source, where)), collate, where)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        if not isinstance(source, Mapping | str | bytes | tuple):
            return _Items(source, collate, where)
    elif isinstance(source, Iterable):
        return _read(source, where)
    raise DataError(
        f"the {where} data is a {type(source).__name__}; give a map-style data set such as a "
        "torch.utils.data.TensorDataset, a list of items, a DataLoader, or an iterable of batches."
    )


def _are_parts(source: Any) -> bool:
    """Whether a source is a tuple or a mapping of tensors: the parts of one batch."""
    parts = list(source.values()) if isinstance(source, Mapping) else source
    return (
        isinstance(source, tuple | Mapping)
        and bool(parts)
        and all(isinstance(x, Tensor) for x in parts)
    )


def _collate(loader: DataLoader[Any]) -> Collate | None:
    """A loader's collate function; None for the default one."""
    return None if loader.collate_fn is default_collate else loader.collate_fn


def _loaded(loader: DataLoader[Any], collate: Collate | None, where: str) -> Store:
    """A data loader's data set with its collate function; its batches if it chooses samples."""
    collate = _collate(loader) if collate is None else collate
    plain = isinstance(loader.sampler, SequentialSampler | RandomSampler)
    if loader.batch_size is not None and plain and not isinstance(loader.dataset, IterableDataset):
        return store_of(loader.dataset, collate, where)
    if loader.collate_fn is default_collate:
        return _read(map(_with_tuples, loader), where)
    return _read(loader, where)


def _with_tuples(batch: Any) -> Any:
    """The batch with tuples for the lists that the default collate function makes of them."""
    if isinstance(batch, list) and any(not isinstance(part, str) for part in batch):
        return tuple(map(_with_tuples, batch))
    return map_children(_with_tuples, batch)


def _read(source: Iterable[Any], where: str) -> Store:
    """The batches of an iterable, in memory."""
    name = f"a batch of the {where} split"
    batches = [as_tensors(batch, name) for batch in _bounded(source, where)]
    if not batches:
        raise DataError(f"the {where} split has no items; it needs at least one.")
    return _Batches(batches)


def _bounded(source: Iterable[Any], where: str) -> Iterator[Any]:
    """What an iterable yields; raises an error instead of filling the memory."""
    total = 0
    for part in _parts(source, where):
        total += count_bytes(as_tensors(part, f"a part of the {where} split"))
        if total > MOST_BYTES:
            raise DataError(
                f"the {where} data is an iterable of more than {MOST_BYTES >> 30} GiB, which "
                "would have to stay in memory; give a map-style data set, or fewer batches."
            )
        yield part


def _parts(source: Iterable[Any], where: str) -> Iterator[Any]:
    """What an iterable yields; an error in it names the place."""
    iterator, number = iter(source), 0
    while True:
        try:
            part = next(iterator)
        except StopIteration:
            return
        except RankNASError:
            raise
        except Exception as error:  # a user's data set can raise any error
            raise DataError(
                f"part {number} of the {where} split cannot be read ({_cause(error)}); mend the "
                "data, or leave it out."
            ) from error
        yield part
        number += 1


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {shortened(str(error), 300)}"


def _shown(item: Any) -> str:
    """The shapes of the tensors of an item, in words."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in named_tensors(item)]
    return ", ".join(f"{name} {shape}" if name else f"{shape}" for name, shape in shapes)


def _grouped(order: Tensor, key: Callable[[int], Any]) -> list[Tensor]:
    """Rows with equal keys together, in the order of their first rows."""
    groups: dict[Any, list[int]] = {}
    for row in order.tolist():
        groups.setdefault(key(row), []).append(row)
    return [torch.tensor(found) for found in groups.values()]
