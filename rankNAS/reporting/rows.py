"""The rows of a comparison of strategies, and their summary over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pandas as pd

__all__ = ["COLUMNS", "DENSE_MODEL", "OK", "Key", "Row", "summarise"]

OK, DENSE_MODEL = "ok", "dense"
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Row:
    """A strategy's answer to a budget under a seed; NaN is what was not measured.

    Attributes:
        strategy: Its name; ``dense`` for the dense model, once a seed.
        budget: Its label, such as ``macs<=0.5``; ``dense`` for the dense model.
        seed: Of splits and strategies.
        validation_accuracy: On the data that the search measured on, without training.
        test_accuracy: On data that the search did not see, without training.
        test_divergence: Of the dense model's predictions on that data from the answer's: the mean
            Kullback-Leibler divergence, in nats. It differs less by chance than accuracy does.
        macs_fraction: Multiply-adds kept of the dense model's.
        params_fraction: Parameters kept of the dense model's.
        search_seconds: Of the strategy's study so far: what it did before the first trial,
            proposals, evaluations and the choice of the answer. What a strategy keeps on disk, and
            importing a library for the first time in a process, make it vary.
        setup_seconds: What all strategies of the seed shared: splits, calibration, factors and
            tables. Less where a statistic was in the cache.
        evaluations: Trials of the study so far, failed ones and probes included.
        finetuned_test_accuracy: On the test data, after the training that is equal for all.
        status: ``ok``, or why there is no answer.
    """

    strategy: str
    budget: str
    seed: int
    validation_accuracy: float = math.nan
    test_accuracy: float = math.nan
    test_divergence: float = math.nan
    macs_fraction: float = math.nan
    params_fraction: float = math.nan
    search_seconds: float = math.nan
    setup_seconds: float = math.nan
    evaluations: int = 0
    finetuned_test_accuracy: float = math.nan
    status: str = OK

    @property
    def key(self) -> Key:
        """What the row is about."""
        return self.strategy, self.budget, self.seed


COLUMNS = tuple(column.name for column in fields(Row))


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Means and sample standard deviations over seeds, of the rows that are ``ok``.

    Args:
        rows: From `compare`.

    Returns:
        One row a budget and strategy: ``seeds``, their number; the mean of each measured column
        under its name; the standard deviations under ``NAME_std``, NaN for one seed. Budgets are
        in the order of their first row; within one the most accurate strategy, after training if
        there was any, comes first.

    >>> from dataclasses import asdict
    >>> rows = [Row("bo", "macs<=0.5", s, test_accuracy=a) for s, a in enumerate((0.7, 0.9))]
    >>> table = summarise(pd.DataFrame(map(asdict, rows)))
    >>> table[["strategy", "seeds", "test_accuracy", "test_accuracy_std"]].round(3).values.tolist()
    [['bo', 2, 0.8, 0.141]]
    """
    good = rows[rows.status == OK]
    measured = [c for c in COLUMNS if c not in ("strategy", "budget", "seed", "status")]
    grouped = good.groupby(["budget", "strategy"], sort=False)
    means, spreads = grouped[measured].mean(), grouped[measured].std().add_suffix("_std")
    table = pd.concat([grouped.size().rename("seeds"), means, spreads], axis=1).reset_index()
    place = {budget: i for i, budget in enumerate(good.budget.unique())}
    table["place"] = table.budget.map(place)
    by = ["place", "finetuned_test_accuracy", "test_accuracy"]
    table = table.sort_values(by, ascending=[True, False, False], kind="stable")
    return table.drop(columns="place").reset_index(drop=True)
