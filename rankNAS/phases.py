"""CPU seconds of the phases of a search."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rankNAS.deadline import TimeLimitError

__all__ = ["Phases"]


@dataclass
class Phases:
    """A stopwatch of CPU seconds by phase: those of this process, and of workers where known.

    The seconds of a phase within another one count for the inner one alone, so that the phases add
    up to the whole.

    Attributes:
        seconds: CPU seconds by phase, in the order of their first end.
        interrupted: The innermost phase that a time limit has ended, if any.

    Example:
        >>> phases = Phases()
        >>> with phases.timed("outer"):
        ...     with phases.timed("inner"):
        ...         pass
        >>> list(phases.seconds)
        ['inner', 'outer']
    """

    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: str | None = None
    _inner: list[float] = field(default_factory=list)  # seconds of ended phases within open ones

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Context whose CPU seconds are added to a phase."""
        started = time.process_time()
        self._inner.append(0.0)
        try:
            yield
        except TimeLimitError:
            self.interrupted = self.interrupted or phase
            raise
        finally:
            spent = time.process_time() - started
            self.add(phase, spent - self._inner.pop())
            if self._inner:
                self._inner[-1] += spent

    def add(self, phase: str, seconds: float) -> None:
        """Add CPU seconds to a phase, for example those of a worker."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @property
    def total(self) -> float:
        """The sum over all phases."""
        return sum(self.seconds.values())
