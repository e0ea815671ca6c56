"""Comparison of strategies: per seed, all share the model and the splits.

Those that decompose in one norm share the factors and tables too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

import pandas as pd
import torch
from torch import nn

from rankNAS.budget import check_budgets
from rankNAS.comparison_plan import Plan
from rankNAS.comparison_seed import seed_rows
from rankNAS.data.loading import DataSource
from rankNAS.deadline import Deadline
from rankNAS.evaluation.context import Progress, silent
from rankNAS.exceptions import UsageError
from rankNAS.hw_models import HardwareModel
from rankNAS.model_data import load_data_of
from rankNAS.objectives import ObjectiveBase
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.recipe import Recipe, make_recipe
from rankNAS.reporting.rows import COLUMNS, DENSE_MODEL, OK, Row, with_current_columns
from rankNAS.reporting.significance import BlockSums
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.settings import Settings, check_device, check_seed
from rankNAS.strategies import make_strategy
from rankNAS.strategies.base import Strategy
from rankNAS.tasks.base import Task

__all__ = ["compare"]


def compare(
    model: nn.Module | Callable[[int], nn.Module],
    data: DataSource,
    strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy],
    budgets: Sequence[Mapping[str, float]],
    seeds: Iterable[int],
    *,
    task: str | Task | None = None,
    objectives: Sequence[str | ObjectiveBase] | None = None,
    n_trials: int = 40,
    training: TrainingConfig | None = None,
    recipe: str | Recipe | None = None,
    training_samples: int | None = None,
    settings: Settings | None = None,
    hardware: str | HardwareModel = "host",
    space: SearchSpace | None = None,
    device: str | torch.device = "cpu",
    time_limit: float | Deadline | None = None,
    block_sums: BlockSums | None = None,
    earlier: pd.DataFrame | None = None,
    on_row: Callable[[Row], object] | None = None,
    on_progress: Progress | None = None,
) -> pd.DataFrame:
    """Compare several strategies under equal conditions.

    Rows of a strategy that rejects the demands or fails state the reason; the others continue.

    Args:
        model: The trained dense model; or a function of the seed that returns one, called for
            seeds with missing rows.
        data: As for `search`.
        strategies: Names or strategies; the keys of a mapping name them in the rows.
        budgets: One mapping per budget, from cost name to the fraction kept.
        seeds: Random seeds. The splits differ between seeds, so that deterministic strategies
            vary too.
        task: As for `search`; its first metric is the one that is compared.
        objectives: As for `search`.
        n_trials: Trials proposed for each budget; probes are extra.
        training: Configuration of the fine-tuning of each solution; its seed is replaced by the
            row's. None skips fine-tuning.
        recipe: How each solution is trained instead, for equal seconds with its option
            ``seconds``; see `rankNAS.recover`.
        training_samples: Size of the random subset for fine-tuning; None for all but the
            validation data.
        settings: How candidates are built and measured. Without a norm, each method decomposes in
            that of its paper.
        hardware: The hardware model, used if latency is budgeted or a strategy needs it.
        space: A space from `compile_space`; compiled here if not given.
        device: The device for evaluation and training.
        time_limit: Seconds from now, or a deadline, for the whole comparison. The study that is
            running then gives its best answer so far, which the ``note`` of its row says; rows
            whose search has not begun have a ``status`` that says so.
        block_sums: Takes the sums of the metrics over blocks of test items, from which
            `rankNAS.reporting.significance.differences` makes confidence intervals.
        earlier: Rows of an interrupted comparison with the same arguments. Rows that are ``ok``
            are kept, unless they have a note. A study with missing rows is searched as a whole, so
            that those rows equal the ones of an uninterrupted comparison.
        on_row: Called with each new row as soon as it is known.
        on_progress: Called with a stage's name, the steps done, and the total number of steps.

    Returns:
        One row per strategy, budget and seed, and one row of the dense model per seed; see `Row`.

    Raises:
        BudgetError: No allocation meets a budget.
        DataError: Data is missing or does not fit the model.
        UsageError: Arguments are wrong for every strategy.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> x, y = torch.randn(200, 64), torch.randint(0, 4, (200,))
        >>> data = TensorDataset(x[:150], y[:150]), TensorDataset(x[150:], y[150:])
        >>> sizes = [(64, 64), (64, 64), (64, 4)]
        >>> model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
        >>> rows = compare(model, data, ["uniform", "energy"], [{"macs": 0.5}], seeds=range(2))
        >>> rows.strategy.tolist()
        ['dense', 'uniform', 'energy', 'dense', 'uniform', 'energy']
    """
    check_device(device)
    seeds = list(seeds)
    for seed in seeds:
        check_seed(seed)
    plan = Plan(
        model=model,
        data=load_data_of(model if isinstance(model, nn.Module) else "", data),
        strategies=_named(strategies),
        budgets=check_budgets(budgets),
        task=task,
        objectives=objectives,
        n_trials=n_trials,
        training=training,
        recipe=None if recipe is None else make_recipe(recipe),
        training_samples=training_samples,
        settings=settings or Settings(),
        hardware=hardware,
        space=space,
        device=device,
        report=on_progress or silent,
        deadline=Deadline.of(time_limit),
        block_sums=block_sums,
    )
    rows: list[Row] = []
    if earlier is not None:
        known = with_current_columns(earlier[earlier.status == OK])
        known = known[known.note == ""]
        rows = [Row(*values) for values in known.itertuples(index=False, name=None)]
    wanted = {seed: plan.keys(seed) for seed in seeds}
    missing = {key for keys in wanted.values() for key in keys} - {row.key for row in rows}
    total = sum(map(len, wanted.values()))
    for seed, keys in wanted.items():
        for row in seed_rows(plan, seed, missing.intersection(keys)):
            missing.discard(row.key)
            rows.append(row)
            if on_row is not None:
                on_row(row)
            plan.report("rows", total - len(missing), total)
    return pd.DataFrame([asdict(row) for row in rows], columns=list(COLUMNS))


def _named(
    strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy],
) -> dict[str, Strategy]:
    if isinstance(strategies, Mapping):
        pairs = list(strategies.items())
    else:
        pairs = [(s if isinstance(s, str) else s.name, s) for s in strategies]
    names = [name for name, _ in pairs]
    if not names or len(set(names)) < len(names) or DENSE_MODEL in names:
        raise UsageError(
            f"`strategies` must be one or more with different names, none of them "
            f"{DENSE_MODEL!r}, got {names}; a mapping gives them names."
        )
    return {name: make_strategy(strategy) for name, strategy in pairs}
