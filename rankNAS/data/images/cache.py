"""Decoded images on disk: kept by the files that they come from, memory-mapped when read again.

An entry is a file with a checksum, written atomically, so that processes may share the folder. The
least recently used entries are removed beyond a bound.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rankNAS.data.fingerprint import digest
from rankNAS.exceptions import DataError, WeightsError, WriteError
from rankNAS.io.files import cache_folder
from rankNAS.io.tensors import read_tensors, write_tensors

__all__ = ["LIMIT", "allows", "entry", "read", "write"]

logger = logging.getLogger(__name__)
LIMIT = "RANKNAS_IMAGE_CACHE_GB"  #: The variable with the bound on all entries; 0 keeps none.
DEFAULT_GB = 8.0
STALE = 86_400  # seconds after which a temporary file belongs to no running process
VERSION = "1"
IMAGES = "the decoded images"


def allows(size: int) -> bool:
    """Whether images of so many bytes are kept."""
    return size <= _limit()


def entry(files: Sequence[Path], options: Sequence[object]) -> Path:
    """The path of the entry of images, which exists if they are kept.

    Args:
        files: The files that the images come from; other paths, sizes or times of change give
            another entry.
        options: What else decides the pixels.

    Raises:
        DataError: A file is missing.
    """
    import PIL

    parts = [VERSION, PIL.__version__, *map(repr, options)]
    for path in files:
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path} ({error}); fetch the file again.") from error
        parts += [str(path.resolve()), str(found.st_size), str(found.st_mtime_ns)]
    return _folder() / f"{digest(part.encode() for part in parts)[:32]}.safetensors"


def read(path: Path, what: str = IMAGES) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors, mapped from the file, and the texts of an entry; None if absent or damaged.

    Args:
        path: The entry.
        what: What it holds, for messages.
    """
    if _limit() == 0 or not path.exists():
        return None
    try:
        found = read_tensors(path)
    except WeightsError as error:
        logger.warning("%s (%s) are unreadable and are made again: %s", what, path, error)
        return None
    with contextlib.suppress(OSError):  # a folder that cannot be written
        os.utime(path)
    return found


def write(
    path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str], what: str = IMAGES
) -> None:
    """Keep an entry, and remove the least recently used ones beyond the bound.

    A full disk or a folder that cannot be written is no error: the entry is made again.

    Args:
        path: The entry.
        tensors: Tensors by name.
        texts: Texts by name.
        what: What it holds, for messages.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if not allows(size):
        return
    try:
        write_tensors(path, tensors, texts)
    except WriteError as error:
        logger.warning("%s could not be kept: %s", what, error)
        return
    _evict(path)


def _evict(newest: Path) -> None:
    """Remove the oldest entries until all fit into the bound; the newest stays.

    Temporary files that killed processes left behind are removed after a day.
    """
    for path in newest.parent.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink(missing_ok=True)
    found = []
    for path in newest.parent.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another process removed it
            found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total, limit = sum(size for _, size, _ in found), _limit()
    for _, size, path in sorted(found):
        if total <= limit:
            return
        if path != newest:
            with contextlib.suppress(OSError):  # in use, on Windows
                path.unlink(missing_ok=True)
                total -= size


def _folder() -> Path:
    return cache_folder() / "images"


def _limit() -> float:
    """The bound in bytes."""
    text = os.environ.get(LIMIT, "")
    try:
        limit = float(text) if text else DEFAULT_GB
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise DataError(f"{LIMIT} is {text!r}; give gigabytes, such as 8, or 0 to keep none.")
    return limit * 1e9
