"""Timing in turns, with a made-up clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.hw_models import timing
from rankNAS.hw_models.timing import (
    DriftMonitor,
    effects_of_blocks,
    interleaved,
    spread_of_median,
    waiting,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0
        self.runs: list[str] = []

    def __call__(self) -> float:
        return self.now

    def task(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.runs.append(name)
            self.now += self.slowness * seconds

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


def test_the_pace_is_spread_over_the_measurements(clock: Clock) -> None:
    pace = DriftMonitor([clock.task("a", 0.01), clock.task("b", 0.03)], rounds=100, seconds=0.39)
    done = []
    for share in (0.5, 0.75, 1.0):
        clock.now += 5.0  # something else is measured
        pace.after(share)
        done.append((clock.runs.count("a") - 2, clock.runs.count("b") - 2))
    assert done == [(5, 5), (8, 8), (10, 10)]  # of 0.04 seconds a round
    np.testing.assert_allclose(pace.seconds(), [0.01, 0.03])


def test_the_number_of_rounds_is_limited_too(clock: Clock) -> None:
    pace = DriftMonitor([clock.task("a", 0.01)], rounds=8, seconds=100.0)
    pace.after(0.5)
    assert clock.runs.count("a") - 2 == 4
    pace.after(1.0)
    assert clock.runs.count("a") - 2 == 8


def test_slow_networks_are_timed_three_times_at_least(clock: Clock) -> None:
    pace = DriftMonitor([clock.task("a", 10.0)], rounds=100, seconds=5.0)
    for i in range(4):
        clock.slowness = 2.0 if i == 3 else 1.0
        pace.after((i + 1) / 4)
    assert clock.runs.count("a") - 2 == 3


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_blocks_are_told_from_what_they_hold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, size = 128, 16
    items = np.concatenate([rng.permutation(count) for _ in range(2)])
    blocks = np.arange(len(items)) // size
    added = rng.normal(0, 0.3, len(items) // size)
    values = rng.normal(0, 1, count)[items] + added[blocks]
    expected = added - np.median(added)
    # Medians by turns can end where no single one improves, a little off.
    assert np.abs(effects_of_blocks(items, blocks, values) - expected).max() < 0.05
    values[:: 2 * size] += 5.0  # one in every second block
    found = effects_of_blocks(items, blocks, values)
    assert np.abs(found - expected - np.median(found - expected)).max() < 0.5


def test_the_spread_of_a_median() -> None:
    rng = np.random.default_rng(0)
    medians = np.median(rng.normal(5, 2, (25, 4000)), axis=0)
    estimated = spread_of_median(rng.normal(5, 2, (25, 4000)))
    assert np.median(estimated) == pytest.approx(medians.std(), rel=0.1)


def test_waiting_runs_it() -> None:
    seen: list[int] = []
    waiting(lambda: seen.append(1), torch.device("cpu"))()
    assert seen == [1]
