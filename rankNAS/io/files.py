"""Atomic file writes, and the cache folder."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankNAS.exceptions import WriteError

__all__ = [
    "cache_folder",
    "is_full",
    "read_json",
    "save_atomically",
    "save_bytes",
    "write_json",
]


def save_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Replace ``path`` atomically by a temporary file that ``write`` fills.

    A reader sees the old file or the new one, never a partial file, even after a power failure.
    Missing parent folders are created. If ``write`` raises an error, ``path`` is unchanged.

    Args:
        path: The file to create or replace.
        write: Called with the path of the temporary file, which it must create. The name ends in
            ``.tmp``, so patterns such as ``*.json`` skip files that a killed process left behind.
            Libraries hide the cause of a failed write, so it should write prepared bytes or use
            a Python file object.

    Raises:
        WriteError: The disk is full, the folder is not writable, or another OSError occurred.
    """
    try:
        _replace(path, write)
    except WriteError:
        raise
    except OSError as error:
        raise _not_written(path, error) from error


def save_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write bytes, atomically.

    Raises:
        WriteError: As for `save_atomically`.
    """
    save_atomically(path, lambda temporary: _write_bytes(temporary, content))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError:  # a RuntimeError, although the file is at fault
        raise ValueError("it is nested too deeply") from None


def is_full(error: OSError) -> bool:
    """Whether a write failed for lack of space: a full disk, a quota, or a file-size limit."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))


def write_json(path: Path, obj: object) -> None:
    """Write ``obj`` as indented JSON, atomically.

    Raises:
        TypeError: ``obj`` contains a value that JSON cannot express.
        ValueError: ``obj`` contains NaN or an infinity, which other JSON readers refuse.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    save_atomically(path, lambda temporary: _write_text(temporary, text))


def cache_folder() -> Path:
    """The folder for reproducible cached files (not created here).

    It is ``RANKNAS_CACHE`` if set, else ``XDG_CACHE_HOME/ranknas``, else ``~/.cache/ranknas``.
    """
    if own := os.environ.get("RANKNAS_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "ranknas"
    return Path.home() / ".cache" / "ranknas"


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    if "\0" in str(path):  # Python would raise a ValueError instead
        raise OSError(errno.EINVAL, "its name has a NUL character")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unlike tempfile's files, a file that the writer creates has the permissions of the umask.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        _sync(path.parent, os.O_RDONLY)


def _not_written(path: Path, error: OSError) -> WriteError:
    """The error for the user, with its cause."""
    cause = reason = error.strerror or str(error) or type(error).__name__
    kept = "The earlier file is intact." if os.path.isfile(path) else "No part of it is left."
    if is_full(error):
        reason += f", {_free(path.parent)} free there"
        step = (
            "Make room, raise the limit (ulimit -f, quota), or choose another disk with --out "
            "(for cached files with RANKNAS_CACHE)"
        )
    else:
        step = "Give a place that can be written"
    found = WriteError(f"{str(path)!r} cannot be written: {reason}. {kept} {step}.")
    found.errno, found.strerror = error.errno, cause
    return found


def _free(folder: Path) -> str:
    """The free space of the nearest existing folder."""
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB"
    except OSError:
        return "unknown space"


def _write_bytes(path: Path, content: bytes | memoryview) -> None:
    path.write_bytes(content)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
