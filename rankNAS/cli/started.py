"""When the running command began; its time limit counts from then."""

from __future__ import annotations

from rankNAS import deadline
from rankNAS.deadline import Deadline

__all__ = ["begin", "deadline_of"]

_began = deadline.clock()


def begin() -> None:
    """A command begins now."""
    global _began
    _began = deadline.clock()


def deadline_of(seconds: float | None) -> Deadline | None:
    """The end of a command that may take so many seconds; None without a limit."""
    return None if seconds is None else Deadline(seconds, _began)
