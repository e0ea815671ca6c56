"""Predicted against measured: whole networks, end to end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.exceptions import UsageError
from rankNAS.hw_models.base import LatencyTables, Progress
from rankNAS.hw_models.host import batched, built
from rankNAS.hw_models.timing import LEAST_ROUNDS, Turns, spread_of_median, waiting

__all__ = ["Agreement", "agreement", "validate"]

WITHIN = 0.1
DRAWS = 1000  # of measurements that might have been


@dataclass(frozen=True)
class Agreement:
    """How well predictions agree with measurements.

    Args:
        within: Share of the allocations predicted within 10 %.
        slowness: How much longer the dense network takes now than when the machine was profiled;
            NaN if it was not timed then.
        matched: Share within 10 % once that is divided out of the measurements: of what is
            predicted in seconds, at the speed that the machine had then.
        relative: Share of those whose time as a fraction of the dense network's is; it stays right
            where the machine as a whole has become slower or faster since it was profiled.
        mape: Mean absolute relative error.
        bias: Mean relative error; above 0 where predictions are too long.
        spearman: Rank correlation; NaN for fewer than three allocations.
        perfect: The 5th percentile and the median of the rank correlation that a perfect
            prediction would have had with measurements as noisy as these: if the first is below
            0.95, so may be `spearman`, whatever the predictions are.
        floor: Noise: how far apart two copies of the dense network were measured, relative.
        uncertainty: Median relative half-width of the measurements' 95 % intervals.
    """

    within: float
    slowness: float
    matched: float
    relative: float
    mape: float
    bias: float
    spearman: float
    perfect: tuple[float, float]
    floor: float
    uncertainty: float


def validate(
    tables: LatencyTables,
    network: nn.Module,
    inputs: Tensor,
    allocations: Mapping[str, Allocation],
    *,
    batch: int = 1,
    device: str | torch.device = "cpu",
    precision: float = 0.02,
    seconds: float = 600.0,
    seed: int = 0,
    on_progress: Progress | None = None,
    on_rows: Callable[[pd.DataFrame], object] | None = None,
) -> pd.DataFrame:
    """Measure networks end to end, with arbitrary weights, beside what is predicted.

    The networks are timed in turns, a few at a time, each time with the dense network twice; all
    times are scaled by how long the dense network takes then, against its median over all turns.

    Args:
        tables: Predictions for a space of the network.
        network: What the space was compiled from.
        inputs: At least one input.
        allocations: By name.
        batch: Inputs of a forward pass.
        device: Where to measure.
        precision: Relative half-width of the 95 % interval at which timing ends.
        seconds: Most time for all together.
        seed: Of the order.
        on_progress: Called with allocations done and all.
        on_rows: Called with the result for the allocations so far, whenever there are more.

    Returns:
        A row an allocation, after two of the dense network: ``name``, ``predicted``, ``sigma``,
        ``measured``, ``deviation`` (of the median) and ``rounds``.

    Raises:
        UsageError: There is nothing to measure.
    """
    if not allocations:
        raise UsageError("there is no allocation to validate; give at least one.")
    device = torch.device(device)
    x = batched(inputs, batch).to(device)
    dense = Allocation.of({name: choices[0] for name, choices in tables.choices.items()})
    dense_runs = [waiting(built(network, dense, x), device) for _ in range(2)]
    names = list(allocations)
    blocks = [names[i : i + 8] for i in range(0, len(names), 8)]
    found: list[tuple[list[str], np.ndarray]] = []
    begun = time.perf_counter()
    for number, block in enumerate(blocks):
        left = (seconds - (time.perf_counter() - begun)) / (len(blocks) - number)
        runs = [waiting(built(network, allocations[n], x), device) for n in block]
        found.append((block, _until(dense_runs + runs, precision, left, seed + number)))
        if on_progress is not None:
            on_progress(number * 8 + len(block), len(names))
        if on_rows is not None:
            on_rows(_rows(found, tables, dense, allocations))
    return _rows(found, tables, dense, allocations)


def _rows(
    found: Sequence[tuple[list[str], np.ndarray]],
    tables: LatencyTables,
    dense: Allocation,
    allocations: Mapping[str, Allocation],
) -> pd.DataFrame:
    """The result, from the times of each block's networks, (rounds, 2 + n), two dense first."""
    reference = float(np.median(np.concatenate([t[:, :2].ravel() for _, t in found])))
    both = np.concatenate([t[:, :2] / np.median(t[:, :2]) for _, t in found]) * reference
    rows = [_row("dense", dense, tables, both[:, i]) for i in range(2)]
    for block, times in found:
        scaled = times * (reference / np.median(times[:, :2]))
        rows += [_row(n, allocations[n], tables, scaled[:, 2 + i]) for i, n in enumerate(block)]
    return pd.DataFrame(rows)


def _until(
    runs: Sequence[Callable[[], object]], precision: float, seconds: float, seed: int
) -> np.ndarray:
    """Rounds until every median is known to the precision, or the time is over."""
    begun = time.perf_counter()
    with torch.no_grad():
        turns = Turns(runs, seed=seed)
        while True:
            turns.round()
            done = len(turns.rows)
            if done >= LEAST_ROUNDS and time.perf_counter() - begun >= seconds:
                return turns.times
            if done % 10 == 0:
                times = turns.times
                widths = 1.96 * spread_of_median(times) / np.median(times, axis=0)
                if widths.max() <= precision:
                    return times


def _row(
    name: str, allocation: Allocation, tables: LatencyTables, times: np.ndarray
) -> dict[str, object]:
    predicted, sigma = tables.predict(allocation)
    return {
        "name": name,
        "predicted": predicted,
        "sigma": sigma,
        "measured": float(np.median(times)),
        "deviation": float(spread_of_median(times[:, None])[0]),
        "rounds": len(times),
    }


def agreement(rows: pd.DataFrame, timed: float = math.nan) -> Agreement:
    """Figures of a validation, over all rows but the two of the dense network.

    Args:
        rows: From `validate`.
        timed: Seconds of the dense network when the machine was profiled; see `NetworkFit`.

    >>> rows = pd.DataFrame(
    ...     {"predicted": [1, 1, 1.0, 2.2, 3], "measured": [1, 1.01, 1, 2, 3], "deviation": 0.0}
    ... )
    >>> found = agreement(rows)
    >>> round(found.within, 2), round(found.mape, 3), found.spearman, round(found.floor, 4)
    (1.0, 0.033, 1.0, 0.01)
    """
    from scipy.stats import spearmanr  # not at the top: it takes long to import

    dense, others = rows.iloc[:2], rows.iloc[2:]
    ratios = (others.predicted / others.measured).to_numpy()
    errors = ratios - 1
    slowness = dense.measured.mean() / (timed or math.nan)
    enough = len(others) > 2 and others.measured.nunique() > 1 and others.predicted.nunique() > 1
    rank = float(spearmanr(others.predicted, others.measured).statistic) if enough else math.nan
    return Agreement(
        within=_within(ratios),
        slowness=slowness,
        matched=math.nan if math.isnan(slowness) else _within(slowness * ratios),
        relative=_within(dense.measured.mean() / dense.predicted.mean() * ratios),
        mape=float(np.abs(errors).mean()),
        bias=float(errors.mean()),
        spearman=rank,
        perfect=_perfect(others) if enough else (math.nan, math.nan),
        floor=float(abs(dense.measured.iloc[1] / dense.measured.iloc[0] - 1)),
        uncertainty=float((1.96 * others.deviation / others.measured).median()),
    )


def _within(ratios: np.ndarray) -> float:
    return float((np.abs(ratios - 1) <= WITHIN + 1e-12).mean())


def _perfect(rows: pd.DataFrame) -> tuple[float, float]:
    """Rank correlation of what was measured with itself, measured once more; see `Agreement`."""
    from scipy.spatial.distance import cdist
    from scipy.stats import rankdata

    times, deviation = rows.measured.to_numpy(), rows.deviation.to_numpy()
    again = times + deviation * np.random.default_rng(0).standard_normal((DRAWS, len(times)))
    found = 1 - cdist([rankdata(times)], rankdata(again, axis=1), "correlation")
    low, median = np.percentile(found, [5, 50])
    return float(low), float(median)
