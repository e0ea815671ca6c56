"""Timing in turns, with a made-up clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rankNAS.hw_models import timing
from rankNAS.hw_models.timing import interleaved, spread_of_median, waiting


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def __call__(self) -> float:
        return self.now

    def task(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.runs.append(name)
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", made)
    return made


def test_every_round_times_everything_once(clock: Clock) -> None:
    tasks = [clock.task("a", 0.01), clock.task("b", 0.02)]
    times = interleaved(tasks, rounds=5, seconds=100.0, warm_up=2)
    np.testing.assert_allclose(times, [[0.01, 0.02]] * 5)
    assert clock.runs[:4] == ["a", "a", "b", "b"]
    rounds = [set(clock.runs[i : i + 2]) for i in range(4, 14, 2)]
    assert rounds == [{"a", "b"}] * 5 and len(clock.runs) == 14


def test_short_things_are_run_several_times_for_a_sample(clock: Clock) -> None:
    times = interleaved([clock.task("a", 1e-4), clock.task("b", 1e-9)], rounds=3, seconds=9.0)
    np.testing.assert_allclose(times, [[1e-4, 1e-9]] * 3, rtol=1e-6)
    assert clock.runs.count("a") == 2 + 3 * 5 and clock.runs.count("b") == 2 + 3 * 20


def test_time_is_limited_after_three_rounds(clock: Clock) -> None:
    assert len(interleaved([clock.task("a", 1.0)], rounds=50, seconds=0.0)) == 3
    assert len(interleaved([clock.task("a", 1.0)], rounds=50, seconds=6.5)) == 7


def test_the_spread_of_a_median() -> None:
    rng = np.random.default_rng(0)
    medians = np.median(rng.normal(5, 2, (25, 4000)), axis=0)
    estimated = spread_of_median(rng.normal(5, 2, (25, 4000)))
    assert np.median(estimated) == pytest.approx(medians.std(), rel=0.1)


def test_waiting_runs_it() -> None:
    seen: list[int] = []
    waiting(lambda: seen.append(1), torch.device("cpu"))()
    assert seen == [1]
