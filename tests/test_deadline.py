"""Time limits: what is checked, and by which clock."""

from __future__ import annotations

import math

import pytest
import torch
from clocks import Clock

from rankNAS.data.samples import Samples
from rankNAS.deadline import Deadline, TimeLimitError, check_time, limited_by
from rankNAS.exceptions import UsageError


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf])
def test_a_limit_is_a_positive_number(seconds: float) -> None:
    with pytest.raises(UsageError, match="positive number of seconds"):
        Deadline(seconds)


def test_time_is_checked_in_a_context_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    deadline = Deadline(5.0)
    with limited_by(deadline):
        check_time()
        clock.now = 5.0
        with pytest.raises(TimeLimitError, match="5 s"):
            check_time()
        with limited_by(None):
            check_time()
    check_time()


def test_handlers_of_errors_do_not_take_it_for_one() -> None:
    assert not issubclass(TimeLimitError, Exception)


def test_every_batch_is_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    samples = Samples.of(torch.zeros(6, 2))
    held = samples.batched(2)
    with limited_by(Deadline(5.0)):
        batches = samples.batches(2)
        next(batches)
        assert len(held[0]) == 2
        clock.end()
        with pytest.raises(TimeLimitError):
            next(batches)
        with pytest.raises(TimeLimitError):
            held[1]
    assert len(held[1]) == 2
