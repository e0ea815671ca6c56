"""What lies between two blocks, for all batches: in memory, then in files that are mapped."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankNAS.exceptions import WriteError
from rankNAS.trees import count_bytes, tree_map

__all__ = ["ActivationCache"]

MEMORY = 256 << 20  # bytes that are kept outside of files


class ActivationCache:
    """Trees of tensors by key; those beyond a bound lie in files without a name.

    Args:
        folder: Where the files are made; they take space until their tensors are dropped.
        most_bytes: The memory.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = ActivationCache(Path(folder), most_bytes=0)
        ...     cache.put("a", (torch.ones(2), None))
        ...     cache.get("a"), cache.nbytes
        ((tensor([1., 1.]), None), 0)
    """

    def __init__(self, folder: Path, most_bytes: int = MEMORY) -> None:
        self._folder, self._most = folder, most_bytes
        self._kept: dict[Hashable, Any] = {}
        self._sizes: dict[Hashable, int] = {}  # of what lies in memory

    @property
    def nbytes(self) -> int:
        """The memory in use."""
        return sum(self._sizes.values())

    def put(self, key: Hashable, tree: Any) -> None:
        """Keep a tree under a key; its tensors must not be changed any more.

        Raises:
            WriteError: The disk is full.
        """
        self.drop(key)
        size = count_bytes(tree)
        if self.nbytes + size <= self._most:
            self._kept[key], self._sizes[key] = tree_map(torch.detach, tree), size
        else:
            self._kept[key] = tree_map(self._mapped, tree)

    def get(self, key: Hashable) -> Any:
        """The tree of a key; it is read only."""
        return self._kept[key]

    def drop(self, key: Hashable) -> None:
        """Free a tree, if there is one."""
        self._kept.pop(key, None)
        self._sizes.pop(key, None)

    def _mapped(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in a file that has no name any more."""
        tensor = tensor.detach()
        if not tensor.numel() or tensor.device.type != "cpu":
            return tensor
        path = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, path = tempfile.mkstemp(dir=self._folder, prefix=".activations-")
            try:  # a full disk would otherwise end the process when a page is written
                _allocate(descriptor, tensor.nbytes)
            finally:
                os.close(descriptor)
            storage = torch.UntypedStorage.from_file(path, True, tensor.nbytes)
        except OSError as error:
            raise WriteError(
                f"the activations of a block need {tensor.nbytes / 1e6:,.0f} MB in "
                f"{str(self._folder)!r}: {error.strerror or error}. Make room, or choose another "
                "disk with RANKNAS_CACHE; the layers that are done are kept."
            ) from error
        finally:
            if path is not None:
                with suppress(OSError):  # Windows keeps a mapped file until its end
                    os.unlink(path)
        found = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)  # type: ignore[call-overload]
        copied: Tensor = found.copy_(tensor)
        return copied


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
