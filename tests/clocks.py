"""A clock for time limits that stands still until a test says that the time is over."""

from __future__ import annotations

import pytest


class Clock:
    """Replaces the clock of `rankNAS.deadline`; a limit ends when `end` is called."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr("rankNAS.deadline.clock", lambda: self.now)

    def end(self) -> None:
        self.now = 1e9

    def at(self, stage: str, count: int = 1) -> StageClock:
        """A progress callback that ends the time in a stage."""
        return StageClock(self, stage, count)


class StageClock:
    """Ends the time after a number of steps of a stage."""

    def __init__(self, clock: Clock, stage: str, count: int) -> None:
        self.clock, self.stage, self.count = clock, stage, count

    def __call__(self, stage: str, done: int, total: int, *_: object) -> None:
        if stage == self.stage and done >= self.count:
            self.clock.end()
