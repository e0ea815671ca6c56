"""Comparison of strategies: per seed, all share the model, splits, factors and tables.

Shared parts are prepared once per seed. Each strategy then has its own study, in which it solves
the budgets in the given order, and an evaluator with an empty cache. A strategy reuses its results
for later budgets. Evaluations and seconds are therefore counted from the start of the study: those
of the last budget are the study's totals.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import pandas as pd
import torch
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.budget import budget_key, check_budgets
from rankNAS.copies import copied
from rankNAS.data.base import Data
from rankNAS.data.loading import DataSource, load_data
from rankNAS.data.samples import Samples
from rankNAS.engine import objectives_of, run
from rankNAS.evaluation.context import Progress, SearchContext, silent
from rankNAS.evaluation.outputs import Reference, dense_reference
from rankNAS.exceptions import RankNASError, UsageError
from rankNAS.hw_models import HardwareModel
from rankNAS.objectives import ObjectiveBase, make_objective
from rankNAS.pipeline import prepare, requests
from rankNAS.recovery.config import TrainingConfig
from rankNAS.reporting.rows import COLUMNS, DENSE_MODEL, OK, Key, Row, with_current_columns
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.wrappers import searchable
from rankNAS.settings import Settings, check_device, check_seed
from rankNAS.storage.store import StudyStore
from rankNAS.strategies import make_strategy
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.binding import bind
from rankNAS.strategies.history import Trial
from rankNAS.strategies.problem import Problem
from rankNAS.study import Study
from rankNAS.tasks.base import Task
from rankNAS.tasks.infer import make_task, resolve_task

__all__ = ["compare"]

logger = logging.getLogger(__name__)


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
    training_samples: int | None = None,
    settings: Settings | None = None,
    hardware: str | HardwareModel = "host",
    space: SearchSpace | None = None,
    device: str | torch.device = "cpu",
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
        training_samples: Size of the random subset for fine-tuning; None for all but the
            validation data.
        settings: How candidates are built and measured.
        hardware: The hardware model, used if latency is budgeted or a strategy needs it.
        space: A space from `compile_space`; compiled here if not given.
        device: The device for evaluation and training.
        earlier: Rows of an interrupted comparison with the same arguments. Rows that are ``ok``
            are kept. A study with missing rows is searched as a whole, so that those rows equal
            the ones of an uninterrupted comparison.
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
    plan = _Plan(
        model=model,
        data=load_data(data),
        strategies=_named(strategies),
        budgets=check_budgets(budgets),
        task=task,
        objectives=objectives,
        n_trials=n_trials,
        training=training,
        training_samples=training_samples,
        settings=settings or Settings(),
        hardware=hardware,
        space=space,
        device=device,
        report=on_progress or silent,
    )
    rows: list[Row] = []
    if earlier is not None:
        known = with_current_columns(earlier[earlier.status == OK])
        rows = [Row(*values) for values in known.itertuples(index=False, name=None)]
    wanted = {seed: plan.keys(seed) for seed in seeds}
    missing = {key for keys in wanted.values() for key in keys} - {row.key for row in rows}
    total = sum(map(len, wanted.values()))
    for seed, keys in wanted.items():
        for row in plan.rows(seed, missing.intersection(keys)):
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


@dataclass(frozen=True)
class _Plan:
    """Settings shared by all seeds; the fields are the arguments of `compare`."""

    model: nn.Module | Callable[[int], nn.Module]
    data: Data
    strategies: Mapping[str, Strategy]
    budgets: Sequence[Mapping[str, float]]
    task: str | Task | None
    objectives: Sequence[str | ObjectiveBase] | None
    n_trials: int
    training: TrainingConfig | None
    training_samples: int | None
    settings: Settings
    hardware: str | HardwareModel
    space: SearchSpace | None
    device: str | torch.device
    report: Progress

    def __post_init__(self) -> None:
        self.named_objectives()
        if self.n_trials < 1:
            raise UsageError(f"`n_trials` must be at least 1, got {self.n_trials}.")
        if self.training_samples is not None and self.training_samples < 1:
            raise UsageError(
                f"`training_samples` must be at least 1, got {self.training_samples}."
            )
        if self.settings.recovery is not None:
            raise UsageError(
                "answers are compared without training and after `training`; leave "
                "`Settings.recovery` out."
            )

    def keys(self, seed: int) -> list[Key]:
        """Keys of all rows of a seed."""
        pairs = [(name, budget_key(budget)) for name in self.strategies for budget in self.budgets]
        return [(*pair, seed) for pair in [(DENSE_MODEL, DENSE_MODEL), *pairs]]

    def rows(self, seed: int, missing: set[Key]) -> Iterator[Row]:
        """The missing rows of a seed."""
        if not missing:
            return
        # Before the model is made: a comparison of refusals alone needs none.
        refusals = self._refusals(self.named_objectives())
        yield from self._refused(seed, refusals, missing)
        if not self._accepted(refusals, missing):
            return
        model = searchable(self.model if isinstance(self.model, nn.Module) else self.model(seed))
        task = resolve_task(self.task, model, self.data)
        objectives = objectives_of(self.objectives, task)
        later = {n: r for n, r in self._refusals(objectives).items() if n not in refusals}
        yield from self._refused(seed, later, missing)
        accepted = self._accepted(refusals | later, missing)
        if not accepted:
            return
        started = time.perf_counter()
        context, problems = prepare(
            model,
            self.data,
            task,
            # All of them, so that a resumed comparison has the choices of a full one.
            strategies=list(accepted.values()),
            budgets=self.budgets,
            objectives=objectives,
            settings=self.settings,
            hardware=self.hardware,
            space=self.space,
            device=self.device,
            seed=seed,
            on_progress=self.report,
        )
        at = _Seed(self, seed, model, context, problems, time.perf_counter() - started)
        if (DENSE_MODEL, DENSE_MODEL, seed) in missing:
            yield at.dense_row()
        for name, strategy in accepted.items():
            if any(key[0] == name for key in missing):
                yield from at.study(name, strategy, missing)

    def named_objectives(self) -> list[ObjectiveBase]:
        """The objectives as far as they are known without a model.

        Raises:
            UsageError: One of them is wrong.
        """
        if self.task is not None:
            return objectives_of(self.objectives, make_task(self.task))
        # A loss stands for the first metric of a task that is unknown yet.
        return [make_objective(objective) for objective in self.objectives or ("loss",)]

    def _refused(self, seed: int, refusals: Mapping[str, str], missing: set[Key]) -> Iterator[Row]:
        """The rows of the strategies that cannot do what is asked."""
        for name, reason in refusals.items():
            for key in self.keys(seed):
                if key[0] == name and key in missing:
                    yield Row(*key, status=reason)

    def _accepted(self, refusals: Mapping[str, str], missing: set[Key]) -> dict[str, Strategy]:
        """The other strategies; none if no missing row concerns them or the dense model."""
        accepted = {n: s for n, s in self.strategies.items() if n not in refusals}
        concerned = any(key[0] in (DENSE_MODEL, *accepted) for key in missing)
        return accepted if concerned else {}

    def _refusals(self, objectives: Sequence[ObjectiveBase]) -> dict[str, str]:
        """Reasons, by name, of the strategies that cannot do what is asked."""
        asked = requests(self.data, self.budgets, objectives, self.settings)
        refusals: dict[str, str] = {}
        for name, strategy in self.strategies.items():
            for request in asked:
                try:
                    strategy.check(request)
                except UsageError as error:
                    refusals.setdefault(name, str(error))
        return refusals


@dataclass(frozen=True)
class _Tested:
    """The metric of a network on validation and test data, and on test data after training."""

    validation: float
    test: float = math.nan
    divergence: float = math.nan
    finetuned: float = math.nan


@dataclass(frozen=True)
class _Seed:
    """State shared by all strategies of a seed."""

    plan: _Plan
    seed: int
    model: nn.Module
    context: SearchContext
    problems: Sequence[Problem]
    setup_seconds: float
    tested: dict[Allocation, _Tested] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The main metric of the task."""
        return self.context.task.main_metric

    @cached_property
    def validation_reference(self) -> Reference:
        """Predictions of the dense model on the validation data."""
        return self._reference(self.context.splits.validation)

    @cached_property
    def test_reference(self) -> Reference | None:
        """Predictions of the dense model on the test data; None if there are none."""
        test = self.context.splits.test
        return None if test is None else self._reference(test)

    def dense_row(self) -> Row:
        """The row of the dense model."""
        tested = self.test_reference
        return Row(
            DENSE_MODEL,
            DENSE_MODEL,
            self.seed,
            validation=self.context.dense()[self.metric],
            test=math.nan if tested is None else tested.task.finish(tested.sums)[self.metric],
            test_divergence=math.nan if tested is None else 0.0,
            macs_fraction=1.0,
            params_fraction=1.0,
            search_seconds=0.0,
            setup_seconds=self.setup_seconds,
            metric=self.metric,
            direction=self.context.task.directions[self.metric],
        )

    def study(self, name: str, strategy: Strategy, missing: set[Key]) -> Iterator[Row]:
        """Search the budgets in order; yield a row for each one that is missing."""
        keys = [(name, problem.budget_key, self.seed) for problem in self.problems]
        self.context.evaluator.forget()
        seconds = 0.0
        started = time.perf_counter()
        try:
            study = self._open(name, strategy)
        except Exception as error:  # in one strategy; the others can still be compared
            yield from (_failed(key, error) for key in keys if key in missing)
            return
        for key, problem in zip(keys, self.problems, strict=True):
            try:
                try:
                    run(replace(study, problems=(problem,)), self.plan.n_trials, self._on_trial())
                    solution = study.solution(problem)
                finally:
                    seconds += time.perf_counter() - started
                row = self._row(key, study, solution, seconds) if key in missing else None
            except Exception as error:
                row = _failed(key, error)
            if row is not None and key in missing:
                yield row
            started = time.perf_counter()
        count = len(study.trials)  # a strategy may propose fewer than requested
        self.plan.report("trials", count, count)

    def _open(self, name: str, strategy: Strategy) -> Study:
        first = self.problems[0]
        store = StudyStore.open(
            None,
            name,
            configuration={},
            choices=first.labels(),
            directions=first.directions,
            resume=False,
        )
        dense = self.context.dense()
        bound = bind(strategy, self.context)
        return Study(name, store, tuple(self.problems), bound, self.context, self.plan.data, dense)

    def _on_trial(self) -> Callable[[Trial, Trial | None], None]:
        total = self.plan.n_trials * len(self.problems)

        def on_trial(trial: Trial, best: Trial | None) -> None:
            nonlocal total
            total += trial.probe
            self.plan.report("trials", trial.number + 1, max(total, trial.number + 1))

        return on_trial

    def _row(self, key: Key, study: Study, solution: Trial, seconds: float) -> Row:
        if solution.allocation not in self.tested:
            self.tested[solution.allocation] = self._tested(study, solution.allocation)
        tested = self.tested[solution.allocation]
        return Row(
            *key,
            validation=tested.validation,
            test=tested.test,
            test_divergence=tested.divergence,
            macs_fraction=solution.metrics["macs"] / study.dense["macs"],
            params_fraction=solution.metrics["params"] / study.dense["params"],
            search_seconds=seconds,
            setup_seconds=self.setup_seconds,
            evaluations=len(study.trials),
            finetuned_test=tested.finetuned,
            metric=self.metric,
            direction=self.context.task.directions[self.metric],
        )

    def _tested(self, study: Study, allocation: Allocation) -> _Tested:
        """Quality of the network of an allocation; equal allocations are trained once."""
        network, config, splits = study.materialise(allocation), self.plan.training, study.splits
        validation = study.measure(network, splits.validation, self.validation_reference)
        before = _Tested(validation[self.metric])
        if splits.test is None:
            return before
        test = study.measure(network, splits.test, self.test_reference)
        divergence = test[study.task.divergence_name]
        before = replace(before, test=test[self.metric], divergence=divergence)
        if config is None:
            return before
        recovery = self.context.recovery(config, self.plan.training_samples)
        study.finetune(
            network,
            self.model,
            recovery.config,
            data=recovery.data,
            on_step=lambda step, total, _: self.plan.report("finetune", step, total),
        )
        tuned = study.measure(network, splits.test, self.test_reference)
        return replace(before, finetuned=tuned[self.metric])

    def _reference(self, samples: Samples) -> Reference:
        model, task = copied(self.model).eval(), self.context.task
        return dense_reference(model, samples, task, device=self.plan.device)


def _failed(key: Key, error: Exception) -> Row:
    reason = str(error)
    if not isinstance(error, RankNASError):  # an error in the strategy: log its traceback
        logger.warning("%s failed at %s, seed %d", *key, exc_info=error)
        reason = f"{type(error).__name__}: {error}"
    return Row(*key, status=" ".join(reason.split()))
