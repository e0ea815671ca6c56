"""Files that are either complete or absent, and the folder of cached ones."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

__all__ = ["cache_folder", "save_atomically", "write_json"]


def save_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, then put it in the place of ``path`` in one step.

    A reader sees the old file or the new one, never a part of it, even after a power cut. Missing
    parent folders are made. Whatever ``write`` raises goes through and leaves ``path`` as it was.

    Args:
        path: The file to make or replace.
        write: Called with the path of the temporary file, which it must create. The name ends in
            ``.tmp``, so that no pattern such as ``*.json`` finds one that a killed process left.
    """
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


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
