"""The rows of a comparison of strategies, and their summary over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pandas as pd

from rankNAS.io.formats import BEFORE_TASKS

__all__ = ["COLUMNS", "DENSE_MODEL", "OK", "Key", "Row", "summarise", "with_current_columns"]

OK, DENSE_MODEL = "ok", "dense"
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Row:
    """A strategy's solution for a budget and a seed; values that were not measured are NaN.

    Attributes:
        strategy: Name of the strategy; ``dense`` for the dense model, once per seed.
        budget: Label of the budget, such as ``macs<=0.5``; ``dense`` for the dense model.
        seed: Seed of splits and strategies.
        validation: The metric on the search's validation data, without training.
        test: The metric on unseen test data, without training; NaN if there are none.
        test_divergence: The task's divergence of the dense model's predictions on the test data
            from the solution's, such as the mean Kullback-Leibler divergence in nats. It has less
            sampling noise than accuracy.
        macs_fraction: Fraction of the dense model's multiply-adds kept.
        params_fraction: Fraction of the dense model's parameters kept.
        search_seconds: Time of the strategy's study so far: preparation, proposals, evaluations
            and the selection of the solution. It varies with the strategy's caches on disk and
            with first imports of libraries.
        setup_seconds: Time of the shared set-up of the seed: splits, calibration, factors and
            tables. Cached statistics reduce it.
        evaluations: Trials of the study so far, including failed ones and probes.
        finetuned_test: The metric on the test data after fine-tuning or recovery, equal for all;
            of the dense model after the recovery, the control.
        metric: Name of the task's main metric; empty if nothing was measured.
        direction: Whether to ``maximize`` or ``minimize`` the metric.
        status: ``ok``, or why there is no solution.
        search_cpu_seconds: CPU seconds of the strategy's study so far, as `search_seconds`.
        setup_cpu_seconds: CPU seconds of the shared set-up of the seed.
        note: What a time limit has ended, if it has; such a row is no result of equal conditions.
        labels: 1 if the search has trained weights on labels, which the others have not seen.
    """

    strategy: str
    budget: str
    seed: int
    validation: float = math.nan
    test: float = math.nan
    test_divergence: float = math.nan
    macs_fraction: float = math.nan
    params_fraction: float = math.nan
    search_seconds: float = math.nan
    setup_seconds: float = math.nan
    evaluations: int = 0
    finetuned_test: float = math.nan
    metric: str = ""
    direction: str = "maximize"
    status: str = OK
    search_cpu_seconds: float = math.nan
    setup_cpu_seconds: float = math.nan
    note: str = ""
    labels: int = 0

    @property
    def key(self) -> Key:
        """The key of the row: strategy, budget and seed."""
        return self.strategy, self.budget, self.seed


COLUMNS = tuple(column.name for column in fields(Row))
TEXTS = ("strategy", "budget", "seed", "metric", "direction", "status", "note")
#: Columns of the time when every model was a classifier.
RENAMED = {
    "validation_accuracy": "validation",
    "test_accuracy": "test",
    "finetuned_test_accuracy": "finetuned_test",
}


def with_current_columns(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a comparison, of this version or an earlier one, with the columns of `Row`.

    Raises:
        KeyError: A column is missing.
    """
    if "test_accuracy" in rows:
        main = BEFORE_TASKS["metrics"][0]
        rows = rows.rename(columns=RENAMED).assign(metric=main, direction="maximize")
    # Columns newer than the rows.
    rows = rows.copy()
    for name in ("search_cpu_seconds", "setup_cpu_seconds", "note"):
        if name not in rows:
            rows[name] = math.nan
    if "labels" not in rows:
        rows["labels"] = 0
    rows["note"] = rows.note.astype(object).fillna("")
    return rows[list(COLUMNS)]


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Means and sample standard deviations over seeds, of the rows that are ``ok``.

    Args:
        rows: Rows from `compare`.

    Returns:
        One row per budget and strategy: the number of ``seeds``; the ``metric`` and its
        ``direction``; the mean of each measured column under its name; its standard deviation
        under ``NAME_std``, NaN for one seed. Budgets are in the order of their first row. Within a
        budget, strategies are sorted by the metric, best first: after training if there was any,
        and on the test data if there are any.

    >>> from dataclasses import asdict
    >>> rows = [Row("bo", "macs<=0.5", s, test=a) for s, a in enumerate((0.7, 0.9))]
    >>> table = summarise(pd.DataFrame(map(asdict, rows)))
    >>> table[["strategy", "seeds", "test", "test_std"]].round(3).values.tolist()
    [['bo', 2, 0.8, 0.141]]
    """
    good = rows[rows.status == OK]
    measured = [c for c in COLUMNS if c not in TEXTS]
    grouped = good.groupby(["budget", "strategy"], sort=False)
    means, spreads = grouped[measured].mean(), grouped[measured].std().add_suffix("_std")
    seeds, named = grouped.size().rename("seeds"), grouped[["metric", "direction"]].first()
    table = pd.concat([seeds, named, means, spreads], axis=1).reset_index()
    place = {budget: i for i, budget in enumerate(good.budget.unique())}
    table["place"] = table.budget.map(place)
    rising = bool((good.direction == "minimize").any())
    quality = ["finetuned_test", "test"] if table.test.notna().any() else ["validation"]
    ascending = [True, *(rising for _ in quality)]
    table = table.sort_values(["place", *quality], ascending=ascending, kind="stable")
    return table.drop(columns="place").reset_index(drop=True)
