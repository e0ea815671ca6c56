"""Timing several things against each other: in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["interleaved", "spread_of_median", "waiting"]

Array = npt.NDArray[np.float64]
LEAST = 5e-4  # seconds of one sample: shorter things are run several times for it
MOST_RUNS = 20  # of one sample


def waiting(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The same, returning when the device is done."""

    def synchronised() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return synchronised


def interleaved(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    warm_up: int = 2,
    seed: int = 0,
) -> Array:
    """Seconds that each run takes, (rounds done, runs).

    Args:
        runs: What to time; each must return when it is done.
        rounds: Each round times every run once, in random order.
        seconds: No round begins after that many; three are done in any case.
        warm_up: Runs of each before the first round.
        seed: Of the order.
    """
    order = random.Random(seed)
    counts = []
    for run in runs:
        for _ in range(max(1, warm_up)):
            taken = _timed(run, 1)
        counts.append(min(MOST_RUNS, max(1, round(LEAST / max(taken, 1e-7)))))
    begun = time.perf_counter()
    rows: list[Array] = []
    while len(rows) < 3 or (len(rows) < rounds and time.perf_counter() - begun < seconds):
        row = np.zeros(len(runs))
        for i in order.sample(range(len(runs)), len(runs)):
            row[i] = _timed(runs[i], counts[i])
        rows.append(row)
    return np.array(rows)


def _timed(run: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - started) / count


def spread_of_median(times: Array) -> Array:
    """Standard deviation of the medians of columns, (runs,).

    From the interquartile range, as disturbances make the tails of timings heavy: for normal
    samples the range is 1.349 standard deviations, and the median varies sqrt(pi / 2) times as
    much as the mean.
    """
    upper, lower = np.percentile(times, [75, 25], axis=0)
    deviations: Array = (upper - lower) / 1.349 * np.sqrt(np.pi / 2 / len(times))
    return deviations
