"""`Samples`: a re-iterable source of batches with a known number of samples.

Every kind of source becomes one of three: items that are collated into batches, tensors in memory,
or batches in memory. A batch is any container of tensors that have one sample along axis 0.
Whoever takes a batch also checks the time limit (`rankNAS.deadline`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rankNAS.data.items import Batch, Collate, shapes_of
from rankNAS.data.stores import Store, store_of, subset_of
from rankNAS.deadline import check_time
from rankNAS.exceptions import DataError
from rankNAS.trees import count_bytes

__all__ = ["Batch", "BatchSequence", "Samples", "Source", "permutation"]

HELD = 2 << 30  # bytes of batches on a device

#: What `Samples.of` takes.
Source: TypeAlias = "Samples | Dataset[Any] | DataLoader[Any] | Iterable[Any] | Tensor"


@final
class Samples:
    """A re-iterable source of batches; make one with `Samples.of`.

    Args:
        store: Where the samples are.
        order: Their rows in the store, int64 (n,); all by default.

    Example:
        >>> samples = Samples.of([(torch.zeros(3), 0), (torch.ones(3), 1), (torch.ones(3), 0)])
        >>> [batch[0].shape for batch in samples.batches(2)]
        [torch.Size([2, 3]), torch.Size([1, 3])]
    """

    def __init__(self, store: Store, order: Tensor | None = None) -> None:
        self._store = store
        self._order = torch.arange(len(store)) if order is None else order

    @classmethod
    def of(cls, source: Source, collate: Collate | None = None, where: str = "data") -> Samples:
        """The samples of a source.

        Args:
            source: A map-style data set, a list of items, a tensor (one item along axis 0), a
                tuple of tensors (the parts of a batch), a ``DataLoader``, or an iterable of
                batches. The batches of an iterable are kept in memory.
            collate: Makes a batch of a list of items. By default, equal shapes are stacked, and
                items of unequal shapes go into different batches.
            where: The name of the source in messages, such as ``train``.

        Raises:
            DataError: The source is empty, or of another kind.
        """
        if isinstance(source, Samples):
            return source
        part = subset_of(source)
        if part is None:
            found = cls(store_of(source, collate, where))
        else:
            dataset, indices, own = part
            rows = torch.tensor([int(i) for i in indices], dtype=torch.int64)
            found = cls.of(dataset, own if collate is None else collate, where).take(rows)
        if not len(found):
            raise DataError(f"the {where} split has no items; it needs at least one.")
        return found

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        """One item."""
        return self._store.item(int(self._order[index]))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    @property
    def source(self) -> Any:
        """The data set, the tensors or the batches behind the samples; see also `order`."""
        return self._store.source

    @property
    def order(self) -> Tensor:
        """The rows of the source, int64 (n,)."""
        return self._order

    @property
    def in_memory(self) -> bool:
        """Whether reading all samples is cheap."""
        return self._store.in_memory

    @property
    def uniform(self) -> bool:
        """Whether all samples fit into one batch."""
        return len(self._store.groups(self._order)) == 1

    def batches(
        self,
        size: int,
        *,
        device: str | torch.device = "cpu",
        shuffle_seed: int | None = None,
        even: bool = False,
    ) -> Iterator[Batch]:
        """Batches on a device; the last one may be smaller.

        Args:
            size: Samples per batch, at most.
            device: Where batches are moved to; images are normalised there.
            shuffle_seed: Random seed of the order; None keeps the order.
            even: Make batches whose sizes differ by 1 at most, none of a single sample if there
                are more.

        Raises:
            DataError: The batch size is not positive.
        """
        if size < 1:
            raise DataError(f"the batch size is {size}; give a positive integer.")
        order = self._order
        if shuffle_seed is not None:
            order = order[permutation(len(order), shuffle_seed)]
        chunks = [c for group in self._store.groups(order) for c in _chunks(group, size, even)]
        if shuffle_seed is not None and not self.uniform:
            chunks = [chunks[i] for i in permutation(len(chunks), shuffle_seed).tolist()]
        return (self._gathered(chunk, device) for chunk in chunks)

    def _gathered(self, chunk: Tensor, device: str | torch.device) -> Batch:
        check_time()
        return self._store.gather(chunk, device)

    def batched(
        self,
        size: int,
        *,
        device: str | torch.device = "cpu",
        even: bool = False,
        count: int | None = None,
        place: Callable[[Batch], Batch] | None = None,
    ) -> BatchSequence:
        """The batches as a sequence, which can be read again and again.

        Args:
            size: Samples per batch, at most.
            device: Where batches are moved to.
            even: As for `batches`.
            count: Make this many batches of about equal size instead.
            place: Applied to each batch on the device, for example `channels_last`.

        Batches of at most `HELD` bytes in all are kept on the device.
        """
        groups = self._store.groups(self._order)
        if count is None:
            chunks = [c for group in groups for c in _chunks(group, size, even)]
        else:
            shares = [max(1, round(count * len(group) / len(self))) for group in groups]
            pairs = zip(groups, shares, strict=True)
            chunks = [c for group, n in pairs for c in group.tensor_split(min(n, len(group)))]
        return BatchSequence(self._store, chunks, device, place)

    def batch(self, device: str | torch.device = "cpu") -> Batch:
        """All samples as one batch.

        Raises:
            DataError: Their shapes differ, or they are given as several batches.
        """
        if not self.uniform:
            raise DataError(
                "the samples differ in shape or are given as several batches, so that they do not "
                "fit into one batch; give a map-style data set, with a `collate_fn` that pads."
            )
        return self._store.gather(self._order, device)

    def example(self, count: int = 1, device: str | torch.device = "cpu") -> Batch:
        """A batch of the first samples: `count`, or fewer where their shapes differ."""
        first = self._store.groups(self._order)[0]
        return self._store.gather(first[:count], device)

    def kinds(self, most: int) -> list[tuple[int, Batch]]:
        """One sample of each shape with its row in the source; the first `most` shapes."""
        found: dict[Any, tuple[int, Batch]] = {}
        for group in self._store.groups(self._order):
            if len(found) == most:
                break
            batch = self._store.gather(group[:1], "cpu")
            found.setdefault(shapes_of(batch), (int(group[0]), batch))
        return list(found.values())

    def take(self, wanted: Tensor) -> Samples:
        """The samples at some positions (n,), in this order; nothing is copied."""
        return Samples(self._store, self._order[wanted])

    def subsample(self, count: int, seed: int) -> Samples:
        """At most `count` samples, drawn by the seed, in the order of the source."""
        if count >= len(self):
            return self
        return self.take(permutation(len(self), seed)[:count].sort().values)

    def placed(self, function: Callable[[Batch], Batch]) -> Samples:
        """The samples with a function of their tensors applied, if they are tensors in memory."""
        found = self._store.placed(function)
        return self if found is None else Samples(found, self._order)

    def kept(self, most_bytes: int | None = None) -> Samples:
        """The samples in memory; unchanged if they need more than `most_bytes`."""
        if most_bytes is not None:
            few = self.example(1)
            if count_bytes(few) * len(self) > most_bytes:
                return self
        return Samples(self._store.kept(self._order))


class BatchSequence(Sequence[Batch]):
    """Batches of samples, kept on a device if they are small, else made anew at each access.

    Args:
        store: Where the samples are.
        chunks: The rows of each batch.
        device: Where batches are moved to.
        place: Applied to each batch on the device.
    """

    def __init__(
        self,
        store: Store,
        chunks: Sequence[Tensor],
        device: str | torch.device,
        place: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self._store, self._chunks, self._device, self._place = store, chunks, device, place
        self.sizes = [len(chunk) for chunk in chunks]
        self._held: list[Batch] | None = None
        if chunks:
            first = self[0]
            if count_bytes(first) * sum(self.sizes) <= HELD * self.sizes[0]:
                self._held = [first, *(self[i] for i in range(1, len(chunks)))]

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        check_time()
        if self._held is not None:
            return self._held[index]
        batch = self._store.gather(self._chunks[index], self._device)
        return batch if self._place is None else self._place(batch)


def permutation(size: int, seed: int) -> Tensor:
    """A random permutation (size,) of the rows, determined by the seed on every machine."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _chunks(order: Tensor, size: int, even: bool) -> Sequence[Tensor]:
    count = max(1, min(math.ceil(len(order) / size), len(order) // 2))
    found: Sequence[Tensor] = order.tensor_split(count) if even else order.split(size)
    return found
