"""Windows of tokens as a data set; the tokens may be mapped from a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankNAS.data.items import Batched
from rankNAS.data.labels import IGNORED

__all__ = ["Tokens", "Windows", "overlapping", "packed", "padded"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token ids of one part of a source.

    Args:
        ids: Integers (n,), perhaps mapped from a file.
        ends: The end of each document in `ids`, int64 (d,); the last one is n.
    """

    ids: Array
    ends: Array

    def slice(self, start: int, stop: int) -> Tokens:
        """The documents from number `start` to `stop`."""
        first = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop]
        last = int(ends[-1]) if len(ends) else first
        return Tokens(self.ids[first:last], ends - first)


@final
class Windows(Batched, Dataset[dict[str, Tensor]]):
    """Windows of equal length; an item is a dict with ``input_ids``, int64 (T,).

    Args:
        ids: The tokens, integers (n,).
        starts: The first token of each window, int64 (w,).
        length: The length T.
        lengths: The number of tokens of each window (w,), if it may be shorter than T; items then
            have an ``attention_mask`` (T,), and end in padding.
        new: The first position of each window (w,) whose token counts; items then have
            ``labels`` (T,), which are -100 before it.
        padding: The id of padding.
    """

    def __init__(
        self,
        ids: Array,
        starts: Array,
        length: int,
        *,
        lengths: Array | None = None,
        new: Array | None = None,
        padding: int = 0,
    ) -> None:
        self.length = length
        self._ids, self._starts, self._padding = ids, starts, padding
        self._lengths, self._new = lengths, new

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x[0] for name, x in self.batch(torch.tensor([index])).items()}

    def places(self, indices: Tensor) -> Array:
        """The places (N, T) in the text of the tokens of windows; also where they are padded."""
        found: Array = self._starts[indices.numpy()][:, None] + np.arange(self.length)[None]
        return found

    def batch(self, indices: Tensor, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        rows = indices.numpy()
        places = np.arange(self.length)[None]
        wanted = self.places(indices)
        ids = torch.from_numpy(self._ids[np.minimum(wanted, len(self._ids) - 1)].astype(np.int64))
        found = {"input_ids": ids}
        if self._lengths is not None:
            real = torch.from_numpy(places < self._lengths[rows][:, None])
            ids.masked_fill_(~real, self._padding)
            found["attention_mask"] = real.long()
        if self._new is not None:
            seen = torch.from_numpy(places < self._new[rows][:, None])
            found["labels"] = ids.masked_fill(seen, IGNORED)
        return {name: x.to(device) for name, x in found.items()}


def packed(tokens: Tokens, length: int, *, labelled: bool = False) -> Windows:
    """Windows without overlap, across documents; what is left at the end is dropped.

    Args:
        tokens: The tokens.
        length: The length of a window.
        labelled: Whether items have ``labels``; all of them count.
    """
    starts = np.arange(len(tokens.ids) // length) * length
    new = np.zeros(len(starts), dtype=np.int64) if labelled else None
    return Windows(tokens.ids, starts, length, new=new)


def overlapping(tokens: Tokens, length: int, stride: int) -> Windows:
    """Windows that begin `stride` tokens after each other, in which only new tokens count.

    The last window ends with the text, so that every token but the first one counts once.
    """
    last = len(tokens.ids) - length
    starts = np.arange(0, last + 1, stride)
    if starts[-1] < last:
        starts = np.append(starts, last)
    new = np.zeros(len(starts), dtype=np.int64)
    new[1:] = length - np.diff(starts)
    return Windows(tokens.ids, starts, length, new=new)


def padded(tokens: Tokens, length: int, padding: int) -> Windows:
    """One window for each document, padded at its end; longer documents continue in another one.

    Pieces of a single token are left out, as nothing in them can be predicted.
    """
    firsts = np.concatenate([[0], tokens.ends[:-1]]).astype(np.int64)
    pieces = -(-(tokens.ends - firsts) // length)
    owners = np.repeat(np.arange(len(firsts)), pieces)
    number = np.arange(len(owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = firsts[owners] + number * length
    lengths = np.minimum(length, tokens.ends[owners] - starts)
    kept = lengths > 1
    return Windows(tokens.ids, starts[kept], length, lengths=lengths[kept], padding=padding)
