"""Paired confidence intervals of the differences between strategies, by the bootstrap.

Metrics follow from sums over test items (`Task.finish`), so a metric of resampled items follows
from resampled sums. Items are resampled in blocks (`BlockSums`), which are the same for all rows,
and seeds are resampled too: the bootstrap of crossed random effects. A draw has one seed fewer
than there are, since a draw of all of a few seeds has too small a variance.

References:
    Efron and Tibshirani, 1993, chapter 13: percentile intervals.
    Owen, Annals of Applied Statistics 2007: the bootstrap of crossed random effects.
    Rao and Wu, Journal of the American Statistical Association 1988: draws of n - 1 out of n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from rankNAS.exceptions import DataError, WeightsError
from rankNAS.io.fingerprints import fingerprint
from rankNAS.io.tensors import read_tensors, write_tensors
from rankNAS.reporting.rows import DENSE_MODEL, OK, Key

if TYPE_CHECKING:
    from rankNAS.tasks.base import Sums, Task

__all__ = ["BLOCKS", "BlockSums", "Difference", "block_size", "differences"]

Array = npt.NDArray[np.float64]
BLOCKS = 256  # at most; with fewer test items, each is a block
DRAWS = 1000
LEVEL = 0.95
TESTED, TUNED = "test", "finetuned_test"


def block_size(items: int) -> int:
    """The number of test items in a block, so that there are at most `BLOCKS` blocks."""
    return max(1, math.ceil(items / BLOCKS))


@dataclass
class BlockSums:
    """The sums of all metrics over blocks of test items, for each row of a comparison.

    Args:
        folder: Where they are kept for a later session; None keeps them in memory alone.

    Attributes:
        size: The number of items of a block; the last blocks may be smaller.
    """

    folder: Path | None = None
    size: int = 0
    _found: dict[tuple[Key, str], Sums] = field(default_factory=dict)

    def add(self, key: Key, column: str, blocks: Sequence[Sums], size: int) -> None:
        """Keep the sums of a row's blocks.

        Args:
            key: The key of the row.
            column: The column of the row whose value all of them give.
            blocks: The sums of each block, in the order of the blocks.
            size: The number of items of a block.
        """
        stacked = {name: torch.stack([b[name].cpu() for b in blocks]) for name in blocks[0]}
        self._found[key, column] = stacked
        self.size = size
        if self.folder is not None:
            labels = {"key": repr((key, column)), "size": str(size)}
            write_tensors(self._path(key, column), stacked, labels)

    def get(self, key: Key, column: str) -> Sums | None:
        """The sums (blocks, ...) of a row; None if they are unknown."""
        if (key, column) not in self._found and self.folder is not None:
            path = self._path(key, column)
            try:
                tensors, labels = read_tensors(path) if path.is_file() else ({}, {})
            except WeightsError:  # damaged: the row has no interval
                tensors, labels = {}, {}
            if labels.get("key") == repr((key, column)):
                self._found[key, column] = tensors
                self.size = int(labels["size"])
        return self._found.get((key, column))

    def _path(self, key: Key, column: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{fingerprint({}, repr((key, column)))[:24]}.safetensors"


@dataclass(frozen=True)
class Difference:
    """The difference of a strategy from the best one at a budget, with its confidence interval.

    Attributes:
        budget: Label of the budget.
        strategy: Name of the strategy.
        quantity: The metric, or the divergence; after fine-tuning with ``finetuned`` before it.
        value: Mean over the seeds.
        best: Name of the strategy with the best mean of the quantity at this budget.
        difference: `value` less that of the best, over the seeds that both have.
        low: Lower end of the 95 % interval of the difference.
        high: Its upper end.
        equal: Whether the interval includes 0: the two are equal within the noise.
        seeds: The number of seeds. With one seed, only test items are resampled.
        blocks: The number of blocks of test items.
        block_items: The number of items of a block.
    """

    budget: str
    strategy: str
    quantity: str
    value: float
    best: str
    difference: float
    low: float
    high: float
    equal: bool
    seeds: int
    blocks: int
    block_items: int


def differences(
    rows: pd.DataFrame, sums: BlockSums, task: Task, *, draws: int = DRAWS, seed: int = 0
) -> pd.DataFrame:
    """The difference of each row from the best row of its budget, one line per quantity.

    Args:
        rows: Rows of a comparison. Those that are not ``ok``, or whose sums are unknown, are left
            out.
        sums: The sums of the metrics over blocks of test items.
        task: Computes metrics from sums.
        draws: The number of bootstrap draws.
        seed: The random seed of the draws.

    Returns:
        The fields of `Difference`, sorted as the rows are.
    """
    good = rows[(rows.status == OK) & (rows.strategy != DENSE_MODEL)]
    main, divergence = task.main_metric, task.divergence_name
    wanted = [(TESTED, main, ""), (TESTED, divergence, ""), (TUNED, main, "finetuned ")]
    found: list[Difference] = []
    for budget in good.budget.unique():
        part = good[good.budget == budget]
        for column, metric, prefix in dict.fromkeys(wanted):
            drawn = {
                str(name): {
                    int(s): values
                    for s in group.seed
                    if (known := sums.get((str(name), str(budget), int(s)), column)) is not None
                    and (values := _drawn(known, task, metric, draws, seed)) is not None
                }
                for name, group in part.groupby("strategy", sort=False)
            }
            drawn = {name: seeds for name, seeds in drawn.items() if seeds}
            sign = 1 if task.directions.get(metric, "minimize") == "maximize" else -1
            found += _compared(str(budget), prefix + metric, drawn, sign, sums.size, seed)
    return pd.DataFrame(map(asdict, found), columns=[f.name for f in fields(Difference)])


@dataclass(frozen=True)
class _Values:
    """A metric on all items, and on each draw of them."""

    whole: float
    drawn: Array
    blocks: int


def _drawn(
    sums: Mapping[str, Tensor], task: Task, metric: str, draws: int, seed: int
) -> _Values | None:
    """The metric of a row; None if it has none. All rows have the same draws."""
    count = len(next(iter(sums.values())))
    generator = np.random.default_rng([seed, count])
    counts = generator.multinomial(count, np.full(count, 1 / count), size=draws)
    weights = torch.from_numpy(np.vstack([np.ones(count), counts])).double()
    totals = {
        name: (weights @ value.double().reshape(count, -1)).reshape(-1, *value.shape[1:])
        for name, value in sums.items()
    }
    values = [
        _metric({name: total[i] for name, total in totals.items()}, task, metric)
        for i in range(draws + 1)
    ]
    if math.isnan(values[0]):
        return None
    return _Values(values[0], np.array(values[1:]), count)


def _metric(sums: Mapping[str, Tensor], task: Task, metric: str) -> float:
    try:
        return task.finish(sums).get(metric, math.nan)
    except DataError:  # no item of the draw counts
        return math.nan


def _compared(
    budget: str,
    quantity: str,
    drawn: Mapping[str, Mapping[int, _Values]],
    sign: int,
    size: int,
    seed: int,
) -> list[Difference]:
    """Each strategy against the one of the best mean."""
    if not drawn:
        return []
    means = {name: float(np.mean([v.whole for v in s.values()])) for name, s in drawn.items()}
    best = max(means, key=lambda name: sign * means[name])
    found = []
    for name, seeds in drawn.items():
        common = [s for s in seeds if s in drawn[best]]
        if not common:
            continue
        whole = [seeds[s].whole - drawn[best][s].whole for s in common]
        each = np.stack([seeds[s].drawn - drawn[best][s].drawn for s in common])
        low, high = _interval(each, seed)
        equal = bool(low <= 0 <= high)
        blocks = seeds[common[0]].blocks
        middle = float(np.mean(whole))
        row = (budget, name, quantity, means[name], best, middle, low, high, equal)
        found.append(Difference(*row, len(common), blocks, size))
    return found


def _interval(each: Array, seed: int) -> tuple[float, float]:
    """The percentile interval of the mean over seeds of (seeds, draws)."""
    seeds, draws = each.shape
    if seeds > 1:
        generator = np.random.default_rng([seed, seeds, draws])
        chosen = generator.integers(seeds, size=(seeds - 1, draws))
        means = np.take_along_axis(each, chosen, axis=0).mean(0)
    else:
        means = each[0]
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(means, [tail, 100 - tail])
    return float(low), float(high)
