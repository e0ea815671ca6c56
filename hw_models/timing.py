"""Interleaved timing: runs take turns, so that a disturbance affects all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from rankNAS.deadline import check_time

__all__ = [
    "DriftMonitor",
    "InterleavedTimer",
    "effects_of_blocks",
    "interleaved",
    "spread_of_median",
    "wait_for",
    "waiting",
]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
LEAST = 5e-4  # shortest sample in seconds; faster runs are repeated within a sample
MOST_RUNS = 20  # per sample
LEAST_ROUNDS = 3
SWEEPS = 100  # each halves the error if items are seen twice


def waiting(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The run, followed by a device synchronisation."""

    def synchronised() -> None:
        run()
        wait_for(device)

    return synchronised


def wait_for(device: torch.device) -> None:
    """Synchronise with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class InterleavedTimer:
    """Times several runs interleaved, for a given number of rounds.

    A time limit that ends is heeded before each run.

    Args:
        runs: The runs to time; each must return when its work is done.
        warm_up: Calls of each run before the first round.
        seed: Random seed of the order within rounds.

    Attributes:
        rows: Seconds of each run, one list per round.
    """

    def __init__(
        self, runs: Sequence[Callable[[], object]], *, warm_up: int = 2, seed: int = 0
    ) -> None:
        self.rows: list[list[float]] = []
        self._runs, self._order = runs, random.Random(seed)
        self._counts = []
        for run in runs:
            check_time()
            for _ in range(max(1, warm_up)):
                taken = _timed(run, 1)
            self._counts.append(min(MOST_RUNS, max(1, round(LEAST / max(taken, 1e-7)))))

    def round(self) -> None:
        """Time every run once, in random order."""
        row = [0.0] * len(self._runs)
        for i in self._order.sample(range(len(row)), len(row)):
            check_time()
            row[i] = _timed(self._runs[i], self._counts[i])
        self.rows.append(row)

    @property
    def times(self) -> Array:
        """Times in seconds, (rounds, runs)."""
        return np.array(self.rows).reshape(len(self.rows), len(self._runs))


def interleaved(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    warm_up: int = 2,
    seed: int = 0,
) -> Array:
    """Interleaved times of runs in seconds, (rounds done, runs); see `InterleavedTimer`.

    Args:
        runs: The runs to time.
        rounds: Largest number of rounds.
        seconds: Time after which no round starts; at least three rounds are run.
        warm_up: Calls of each run before the first round.
        seed: Random seed of the order.
    """
    turns = InterleavedTimer(runs, warm_up=warm_up, seed=seed)
    begun = time.perf_counter()
    while len(turns.rows) < LEAST_ROUNDS or (
        len(turns.rows) < rounds and time.perf_counter() - begun < seconds
    ):
        turns.round()
    return turns.times


class DriftMonitor:
    """Times whole networks interleaved, a few rounds at a time, between other measurements.

    The speed of a machine drifts during profiling, so the networks are timed over the same period
    as all other measurements.

    Args:
        runs: The networks.
        rounds: Largest number of rounds.
        seconds: Time after which no round starts; at least three rounds are run.
        seed: Random seed of the order.
    """

    def __init__(
        self, runs: Sequence[Callable[[], object]], *, rounds: int, seconds: float, seed: int = 0
    ) -> None:
        self._turns = InterleavedTimer(runs, seed=seed)
        self._rounds, self._seconds, self._spent = rounds, seconds, 0.0

    def after(self, share: float) -> None:
        """Time the networks until a share (0, 1] of the rounds is done."""
        rows = self._turns.rows
        least = LEAST_ROUNDS if share >= 1 else 0
        while len(rows) < least or (
            len(rows) < share * self._rounds and self._spent < share * self._seconds
        ):
            begun = time.perf_counter()
            self._turns.round()
            self._spent += time.perf_counter() - begun

    def seconds(self) -> Array:
        """Median times in seconds, (runs,)."""
        medians: Array = np.median(self._turns.times, axis=0)
        return medians


def effects_of_blocks(items: Indices, blocks: Indices, values: Array) -> Array:
    """Block effects of an additive model, (blocks,).

    Value i belongs to item items[i] and block blocks[i], (n,) each; the model is item + block +
    noise. The median effect is 0. The fit alternates between items and blocks: first with means,
    then with medians, which are robust to outliers (median polish). The medians start from the
    means because coordinate-wise steps can otherwise stall.
    """
    effects, counts = np.zeros(int(blocks.max()) + 1), np.bincount(items)
    members = [np.flatnonzero(blocks == k) for k in range(len(effects))]
    for centre in (np.mean, np.median):
        for _ in range(SWEEPS):
            means = np.bincount(items, values - effects[blocks]) / counts
            left = values - means[items]
            effects = np.array([centre(left[own]) if len(own) else 0.0 for own in members])
            effects -= np.median(effects)
    return effects


def _timed(run: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - started) / count


def spread_of_median(times: Array) -> Array:
    """Standard deviation of the medians of columns, (runs,).

    It is estimated from the interquartile range, because disturbances make the tails of timings
    heavy. For normal samples the range is 1.349 standard deviations, and the standard deviation
    of the median is sqrt(pi / 2) times that of the mean.
    """
    upper, lower = np.percentile(times, [75, 25], axis=0)
    deviations: Array = (upper - lower) / 1.349 * np.sqrt(np.pi / 2 / len(times))
    return deviations
