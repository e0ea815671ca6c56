"""Warnings about old names, printed as one plain line each on stderr."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rankNAS.renamed import RenamedWarning

__all__ = ["flush_notices", "plain_notices", "taken_notices"]

_waiting: list[str] = []


@contextmanager
def plain_notices() -> Iterator[None]:
    """Context that queues each `RenamedWarning` as a line; other warnings are unchanged."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=RenamedWarning)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, RenamedWarning):
                usual(message, category, filename, lineno, file, line)
            elif str(message) not in _waiting:
                _waiting.append(str(message))

        warnings.showwarning = show
        try:
            yield
        finally:
            flush_notices()


def flush_notices() -> None:
    """Print the queued lines."""
    for text in taken_notices():
        print(f"ranknas: warning: {text}", file=sys.stderr)


def taken_notices() -> list[str]:
    """Remove and return the queued lines, to be printed in another way."""
    taken = _waiting.copy()
    _waiting.clear()
    return taken
