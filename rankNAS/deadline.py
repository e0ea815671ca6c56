"""A limit on the wall-clock time of a search.

While a `Deadline` is active, a computation that has run out of time stops at its next check. The
time is checked whenever a batch of data is taken (`rankNAS.data.samples`) and wherever
`check_time` is called: in the loops of the solver, of strategies and of latency measurements.
Nothing else of a search depends on the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from rankNAS.exceptions import UsageError

__all__ = ["Deadline", "TimeLimitError", "check_time", "clock", "limited_by", "seconds_left"]


def clock() -> float:
    """Seconds of a clock that never goes back."""
    return time.monotonic()


class TimeLimitError(BaseException):
    """The time limit has ended.

    Like KeyboardInterrupt it is no failure of what was running, so code that handles failures
    does not catch it.
    """


@dataclass(frozen=True)
class Deadline:
    """The end of the time that a search may take.

    Args:
        seconds: The limit.
        started: When its seconds began, by `clock`; now by default.

    Raises:
        UsageError: The limit is not a positive number.

    Example:
        >>> deadline = Deadline(60.0)
        >>> deadline.passed
        False
    """

    seconds: float
    started: float = field(default_factory=lambda: clock())

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise UsageError(
                f"the time limit must be a positive number of seconds, got {self.seconds:g}."
            )

    @classmethod
    def of(cls, limit: float | Deadline | None) -> Deadline | None:
        """The deadline of a number of seconds from now; deadlines and None are unchanged."""
        return limit if limit is None or isinstance(limit, Deadline) else cls(limit)

    @property
    def passed(self) -> bool:
        """Whether the time has ended."""
        return clock() - self.started >= self.seconds


_active: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


@contextmanager
def limited_by(deadline: Deadline | None) -> Iterator[None]:
    """Context in which `check_time` heeds a deadline; with None, none at all."""
    token = _active.set(deadline)
    try:
        yield
    finally:
        _active.reset(token)


def check_time() -> None:
    """Raise a TimeLimitError if the active deadline has passed.

    >>> with limited_by(Deadline(1.0, started=-10.0)):
    ...     try:
    ...         check_time()
    ...     except TimeLimitError:
    ...         print("too late")
    too late
    """
    deadline = _active.get()
    if deadline is not None and deadline.passed:
        raise TimeLimitError(f"the time limit of {deadline.seconds:g} s has ended")


def seconds_left() -> float:
    """Seconds until the active deadline, at least 0; infinite without one.

    >>> seconds_left()
    inf
    """
    deadline = _active.get()
    if deadline is None:
        return math.inf
    return max(0.0, deadline.started + deadline.seconds - clock())
