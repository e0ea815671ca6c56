"""CPU seconds by phase."""

from __future__ import annotations

import time

import pytest

from rankNAS.deadline import TimeLimitError
from rankNAS.phases import Phases


def test_nested_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "process_time", lambda: now)
    phases = Phases()
    with phases.timed("outer"):
        now = 1.0
        with phases.timed("inner"):
            now = 3.0
            with phases.timed("outer"):
                now = 3.5
        now = 7.0
    phases.add("inner", 10.0)  # of a worker
    assert phases.seconds == {"outer": 5.0, "inner": 12.0}
    assert phases.total == 17.0


def test_the_innermost_phase_that_a_limit_ends_is_known() -> None:
    phases = Phases()
    with pytest.raises(ZeroDivisionError), phases.timed("a"):
        raise ZeroDivisionError
    assert phases.interrupted is None and "a" in phases.seconds
    with pytest.raises(TimeLimitError), phases.timed("a"), phases.timed("b"):
        raise TimeLimitError
    assert phases.interrupted == "b"
