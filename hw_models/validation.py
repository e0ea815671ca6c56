"""Validation of latency predictions against end-to-end measurements of networks."""

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
from rankNAS.hw_models.networks import batched, built
from rankNAS.hw_models.timing import Array, interleaved, spread_of_median, waiting
from rankNAS.trees import Inputs, to_device

__all__ = ["Agreement", "agreement", "validate"]

WITHIN = 0.1
BLOCK = 8  # networks per visit
VISIT = 1.0  # seconds per visit, after three rounds
MOST_ROUNDS = 200  # per visit
LEAST_PASSES = 4  # visits needed to estimate the spread between visits
DRAWS = 1000  # simulated repetitions of the measurements


@dataclass(frozen=True)
class Agreement:
    """Accuracy of latency predictions against measurements.

    Args:
        within: Share of the allocations predicted within 10 %.
        slowness: Time of the dense network now, relative to its time at profiling; NaN if it was
            not timed then.
        matched: Share within 10 % after dividing the measurements by `slowness`: predictions in
            seconds at the machine's speed at profiling.
        relative: Share within 10 % of time as a fraction of the dense network's. It is robust to a
            change of the machine's overall speed since profiling.
        mape: Mean absolute relative error.
        bias: Mean relative error; positive if predictions are too long.
        spearman: Rank correlation; NaN for fewer than three allocations.
        perfect: The 5th percentile and the median of the rank correlation of a perfect prediction
            with equally noisy measurements. If the first is below 0.95, `spearman` may be below
            0.95 for a perfect prediction.
        floor: Noise floor: relative difference between two measured copies of the dense network.
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
    inputs: Inputs | Tensor,
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
    """End-to-end measurements of networks with random weights, next to their predictions.

    The networks are visited repeatedly, a few at a time. Each visit builds them anew and times
    them interleaved with two copies of the dense network. Consecutive rounds are correlated; the
    median over spaced visits is reported, with its deviation from the spread of the visits.

    Args:
        tables: Latency predictions for a space of the network.
        network: The network that the space was compiled from.
        inputs: The network's arguments for at least one sample.
        allocations: The allocations by name.
        batch: Inputs per forward pass.
        device: The device to measure.
        precision: Relative half-width of the 95 % interval at which timing stops.
        seconds: Total time limit; each network is visited at least once.
        seed: Random seed of the order.
        on_progress: Called with (percentage of the time used, 100).
        on_rows: Called with the result for the allocations so far, whenever it grows.

    Returns:
        One row per allocation, after two of the dense network: ``name``, ``predicted``, ``sigma``,
        ``measured``, ``deviation`` (of the median) and ``rounds``.

    Raises:
        UsageError: There is nothing to measure.
    """
    if not allocations:
        raise UsageError("there is no allocation to validate; give at least one.")
    device = torch.device(device)
    x = to_device(batched(inputs, batch), device)
    dense = Allocation.of({name: choices[0] for name, choices in tables.choices.items()})
    names = list(allocations)
    blocks = [names[i : i + BLOCK] for i in range(0, len(names), BLOCK)]
    visits: list[tuple[list[str], Array]] = []
    begun = time.perf_counter()
    while True:
        for block in blocks:
            chosen = [dense, dense, *(allocations[name] for name in block)]
            runs = [waiting(built(network, allocation, x), device) for allocation in chosen]
            visits.append((block, _visit(runs, seed + len(visits))))
            rows = _rows(visits, tables, dense, allocations)
            if on_rows is not None:
                on_rows(rows)
            spent = time.perf_counter() - begun
            if on_progress is not None:
                on_progress(min(99, int(100 * spent / max(seconds, spent))), 100)
        passes = len(visits) // len(blocks)
        known = 1.96 * (rows.deviation / rows.measured).max() <= precision
        if spent * (1 + 1 / passes) > seconds or (passes >= LEAST_PASSES and known):
            break
    if on_progress is not None:
        on_progress(100, 100)
    return rows


def _visit(runs: Sequence[Callable[[], object]], seed: int) -> Array:
    """Interleaved rounds of one visit, at least three, (rounds, runs)."""
    with torch.no_grad():
        return interleaved(runs, rounds=MOST_ROUNDS, seconds=VISIT, seed=seed)


def _rows(
    visits: Sequence[tuple[list[str], Array]],
    tables: LatencyTables,
    dense: Allocation,
    allocations: Mapping[str, Allocation],
) -> pd.DataFrame:
    """The result from the times of each visit, (rounds, 2 + n), the two dense copies first."""
    references = [float(np.median(times[:, :2])) for _, times in visits]
    reference = float(np.median(references))
    both: tuple[list[Array], list[Array]] = ([], [])
    found: dict[str, list[Array]] = {}
    for (block, times), slow in zip(visits, references, strict=True):
        scaled = times * (reference / slow)
        for i, copy in enumerate(both):
            copy.append(scaled[:, i])
        for i, name in enumerate(block, 2):
            found.setdefault(name, []).append(scaled[:, i])
    rows = [_row("dense", dense, tables, copy) for copy in both]
    rows += [_row(name, allocations[name], tables, own) for name, own in found.items()]
    return pd.DataFrame(rows)


def _row(
    name: str, allocation: Allocation, tables: LatencyTables, visits: Sequence[Array]
) -> dict[str, object]:
    predicted, sigma = tables.predict(allocation)
    medians = np.array([np.median(times) for times in visits])
    # Too few visits to estimate their spread: use single rounds, which underestimate it.
    times = medians if len(visits) >= LEAST_PASSES else np.concatenate(visits)
    return {
        "name": name,
        "predicted": predicted,
        "sigma": sigma,
        "measured": float(np.median(medians)),
        "deviation": float(spread_of_median(times[:, None])[0]),
        "rounds": sum(map(len, visits)),
    }


def agreement(rows: pd.DataFrame, timed: float = math.nan) -> Agreement:
    """Accuracy figures of a validation, over all rows but the two of the dense network.

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
    from scipy.stats import spearmanr  # imported here: it loads slowly

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
    """Rank correlation of the measurements with simulated repetitions; see `Agreement`."""
    from scipy.spatial.distance import cdist
    from scipy.stats import rankdata

    times, deviation = rows.measured.to_numpy(), rows.deviation.to_numpy()
    again = times + deviation * np.random.default_rng(0).standard_normal((DRAWS, len(times)))
    found = 1 - cdist([rankdata(times)], rankdata(again, axis=1), "correlation")
    low, median = np.percentile(found, [5, 50])
    return float(low), float(median)
