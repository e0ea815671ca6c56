"""Files that are either complete or absent, and the folder of cached ones."""

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
    """Let ``write`` fill a temporary file, then put it in the place of ``path`` in one step.

    A reader sees the old file or the new one, never a part of it, even after a power cut. Missing
    parent folders are made. Whatever ``write`` raises leaves ``path`` as it was.

    Args:
        path: The file to make or replace.
        write: Called with the path of the temporary file, which it must create. The name ends in
            ``.tmp``, so that no pattern such as ``*.json`` finds one that a killed process left.
            Libraries hide why they could not write; let it write bytes that it has already, or
            through a file object of Python.

    Raises:
        WriteError: The disk is full, the folder cannot be written, or another OSError.
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
    """What a JSON file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError:  # a RuntimeError, although the file is what is wrong
        raise ValueError("it is nested too deeply") from None


def is_full(error: OSError) -> bool:
    """Whether there was no room for a file: a full disk, a quota, or a limit on its size."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))


def write_json(path: Path, obj: object) -> None:
    """Write ``obj`` as indented JSON, atomically.

    Raises:
        TypeError: ``obj`` holds something that JSON can not express.
        ValueError: ``obj`` holds NaN or an infinity, which other JSON readers refuse.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    save_atomically(path, lambda temporary: _write_text(temporary, text))


def cache_folder() -> Path:
    """The folder for what can be made again (not created here).

    ``RANKNAS_CACHE`` if it is set, else ``XDG_CACHE_HOME/ranknas``, else ``~/.cache/ranknas``.
    """
    if own := os.environ.get("RANKNAS_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "ranknas"
    return Path.home() / ".cache" / "ranknas"


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    if "\0" in str(path):  # Python raises a ValueError, as for a mistake in code
        raise OSError(errno.EINVAL, "its name has a NUL character")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unlike tempfile's, a file that the writer creates itself has the permissions of the umask.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # Windows can not open a folder
        _sync(path.parent, os.O_RDONLY)


def _not_written(path: Path, error: OSError) -> WriteError:
    """The error for the user."""
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
    """The space that is left for the nearest folder that exists."""
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
