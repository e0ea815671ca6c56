"""Handling of Ctrl-C: the first finishes cleanly, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["interruptible"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[None]:
    """Context in which the first SIGINT or SIGTERM raises KeyboardInterrupt; the next one kills.

    The operating system handles the second signal, without waiting for running code.
    """
    if threading.current_thread() is not threading.main_thread():  # only it can set handlers
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = [signal.signal(each, interrupt) for each in SIGNALS]
    try:
        yield
    finally:
        for each, handler in zip(SIGNALS, before, strict=True):
            signal.signal(each, handler)
