"""The studies of one seed of a comparison, and their rows.

Each strategy has its own study, in which it solves the budgets in the given order, and an
evaluator with an empty cache. A strategy reuses its results for later budgets. Evaluations and
seconds are therefore counted from the start of the study: those of the last budget are the study's
totals.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.comparison_plan import Plan
from rankNAS.copies import copied
from rankNAS.data.samples import Samples
from rankNAS.deadline import TimeLimitError, limited_by
from rankNAS.engine import objectives_of, run_within
from rankNAS.evaluation.context import SearchContext
from rankNAS.evaluation.outputs import Reference, dense_reference, network_sums
from rankNAS.exceptions import RankNASError, UsageError
from rankNAS.objectives import ObjectiveBase
from rankNAS.phases import Phases
from rankNAS.pipeline import prepare
from rankNAS.reporting.rows import DENSE_MODEL, Key, Row
from rankNAS.reporting.significance import block_size
from rankNAS.search_spaces.wrappers import searchable
from rankNAS.storage.store import StudyStore
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.binding import bind, focused
from rankNAS.strategies.history import Trial
from rankNAS.strategies.one_shot.uniform import Uniform
from rankNAS.strategies.problem import Problem
from rankNAS.study import Study
from rankNAS.tasks.base import Sums, Task, summed
from rankNAS.tasks.infer import resolve_task

__all__ = ["SeedStudies", "seed_rows"]

logger = logging.getLogger(__name__)


def seed_rows(plan: Plan, seed: int, missing: set[Key]) -> Iterator[Row]:
    """The missing rows of a seed of a comparison."""
    if not missing:
        return
    # Before the model is made: a comparison of refusals alone needs none.
    refusals = plan.refusals(plan.named_objectives())
    yield from plan.refused_rows(seed, refusals, missing)
    if not plan.accepted(refusals, missing):
        return
    if plan.is_late():
        yield from plan.late_rows(seed, plan.accepted(refusals, missing), missing)
        return
    model = searchable(plan.model if isinstance(plan.model, nn.Module) else plan.model(seed))
    task = resolve_task(plan.task, model, plan.data)
    objectives = objectives_of(plan.objectives, task)
    later = {n: r for n, r in plan.refusals(objectives).items() if n not in refusals}
    yield from plan.refused_rows(seed, later, missing)
    accepted = plan.accepted(refusals | later, missing)
    if not accepted:
        return
    # All of them, so that a resumed comparison has the choices of a full one.
    for names in plan.by_norm(accepted):
        shared = {name: accepted[name] for name in names}
        dense = (DENSE_MODEL, DENSE_MODEL, seed) in missing and names[0] == next(iter(accepted))
        if dense or any(key[0] in shared for key in missing):
            yield from _rows_of(plan, seed, model, task, objectives, shared, missing, dense)


def _rows_of(
    plan: Plan,
    seed: int,
    model: nn.Module,
    task: Task,
    objectives: Sequence[ObjectiveBase],
    strategies: Mapping[str, Strategy],
    missing: set[Key],
    dense: bool,
) -> Iterator[Row]:
    """The missing rows of strategies that share their factors, and that of the dense model."""
    started, phases = time.perf_counter(), Phases()
    with limited_by(plan.deadline), phases.timed("prepare"):
        context, problems = prepare(
            model,
            plan.data,
            task,
            strategies=list(strategies.values()),
            budgets=plan.budgets,
            objectives=objectives,
            settings=plan.settings,
            hardware=plan.hardware,
            space=plan.space,
            device=plan.device,
            seed=seed,
            on_progress=plan.report,
            phases=phases,
        )
    if not context.complete:
        late = plan.late_rows(seed, strategies, missing)
        yield from (row for row in late if dense or row.strategy != DENSE_MODEL)
        return
    setup = time.perf_counter() - started, phases.total
    at = SeedStudies(plan, seed, model, context, problems, *setup)
    if dense:
        yield at.dense_row()
    for name, strategy in strategies.items():
        if any(key[0] == name for key in missing):
            yield from at.study(name, strategy, missing)


@dataclass(frozen=True)
class _Tested:
    """The metric of a network on validation and test data, and on test data after training."""

    validation: float
    test: float = math.nan
    divergence: float = math.nan
    finetuned: float = math.nan
    blocks: Mapping[str, Sequence[Sums]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class SeedStudies:
    """State shared by all strategies of a seed that decompose in one norm."""

    plan: Plan
    seed: int
    model: nn.Module
    context: SearchContext
    problems: Sequence[Problem]
    setup_seconds: float
    setup_cpu_seconds: float
    tested: dict[tuple[Allocation, str], _Tested] = field(default_factory=dict)

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
        return None if test is None else self._reference(test, self.block_size)

    @cached_property
    def block_size(self) -> int:
        """The number of test items in a block."""
        test = self.context.splits.test
        return 1 if test is None else block_size(len(test))

    def dense_row(self) -> Row:
        """The row of the dense model, which a recipe trains as it trains the solutions."""
        tested, control = self.test_reference, self._control()
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
            search_cpu_seconds=0.0,
            setup_cpu_seconds=self.setup_cpu_seconds,
            finetuned_test=control.finetuned,
            note=control.note,
        )

    def _control(self) -> _Tested:
        """The dense model after the recipe, except `plain`; empty if there is none."""
        recipe, untrained = self.plan.recipe, _Tested(math.nan)
        if recipe is None or recipe.name == "plain" or self.context.splits.test is None:
            return untrained
        study = self._open(DENSE_MODEL, Uniform(), Phases())
        return self._retested(study, copied(self.model), untrained)

    def study(self, name: str, strategy: Strategy, missing: set[Key]) -> Iterator[Row]:
        """Search the budgets in order; yield a row for each one that is missing."""
        keys = [(name, problem.budget_key, self.seed) for problem in self.problems]
        self.context.evaluator.forget()
        seconds, cpu_seconds = 0.0, 0.0
        phases = Phases()
        started = time.perf_counter()
        if self.plan.is_late():
            yield from (Row(*key, status=self.plan.not_begun) for key in keys if key in missing)
            return
        try:
            with phases.timed("prepare"):
                study = self._open(name, strategy, phases)
        except Exception as error:  # in one strategy; the others can still be compared
            yield from (_failed(key, error) for key in keys if key in missing)
            return
        for key, problem in zip(keys, self.problems, strict=True):
            if self.plan.is_late():
                if key in missing:
                    yield Row(*key, status=self.plan.not_begun)
                continue
            try:
                try:
                    part = replace(study, problems=(problem,))
                    run_within(self.plan.deadline, part, self.plan.n_trials, self._on_trial())
                    with phases.timed("answer"):
                        solution = part.solution(problem)
                finally:
                    seconds += time.perf_counter() - started
                    cpu_seconds += phases.total
                    phases.seconds.clear()
                spent = seconds, cpu_seconds
                row = self._row(key, part, solution, spent) if key in missing else None
                phases.seconds.clear()  # of testing
            except Exception as error:
                row = _failed(key, error)
            if row is not None and key in missing:
                yield row
            started = time.perf_counter()
        count = len(study.trials)  # a strategy may propose fewer than requested
        self.plan.report("trials", count, count)

    def _open(self, name: str, strategy: Strategy, phases: Phases) -> Study:
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
        context = replace(self.context, phases=phases)
        with suppress(TimeLimitError), limited_by(self.plan.deadline):
            context = focused(strategy, context, first)
        bound = strategy
        with suppress(TimeLimitError), limited_by(self.plan.deadline):
            bound = bind(strategy, context)
        return Study(name, store, tuple(self.problems), bound, context, self.plan.data, dense)

    def _on_trial(self) -> Callable[[Trial, Trial | None], None]:
        total = self.plan.n_trials * len(self.problems)

        def on_trial(trial: Trial, best: Trial | None) -> None:
            nonlocal total
            total += trial.probe
            self.plan.report("trials", trial.number + 1, max(total, trial.number + 1))

        return on_trial

    def _row(self, key: Key, study: Study, solution: Trial, seconds: tuple[float, float]) -> Row:
        # A strategy that trains its answer has a network of its own.
        own = study.strategy.finishes or bool(solution.weights)
        asked = solution.allocation, study.name if own else ""
        if asked not in self.tested:
            self.tested[asked] = self._tested(study, solution.allocation)
        tested = self.tested[asked]
        if self.plan.block_sums is not None:
            for column, blocks in tested.blocks.items():
                self.plan.block_sums.add(key, column, blocks, self.block_size)
        return Row(
            *key,
            validation=tested.validation,
            test=tested.test,
            test_divergence=tested.divergence,
            macs_fraction=solution.metrics["macs"] / study.dense["macs"],
            params_fraction=solution.metrics["params"] / study.dense["params"],
            search_seconds=seconds[0],
            setup_seconds=self.setup_seconds,
            evaluations=len(study.trials),
            finetuned_test=tested.finetuned,
            metric=self.metric,
            direction=self.context.task.directions[self.metric],
            search_cpu_seconds=seconds[1],
            setup_cpu_seconds=self.setup_cpu_seconds,
            note="; ".join(filter(None, [study.limit_note, tested.note])),
            labels=int(study.strategy.trains and study.task.labelled),
        )

    def _tested(self, study: Study, allocation: Allocation) -> _Tested:
        """Quality of the network of an allocation; equal allocations are trained once."""
        network, splits = study.materialise(allocation), study.splits
        validation = study.measure(network, splits.validation, self.validation_reference)
        before = _Tested(validation[self.metric])
        if splits.test is None:
            return before
        blocks = {"test": self._blocks(network, splits.test)}
        test = self._finished(blocks["test"])
        divergence = test[study.task.divergence_name]
        before = replace(before, test=test[self.metric], divergence=divergence, blocks=blocks)
        if self.plan.training is None and self.plan.recipe is None:
            return before
        return self._retested(study, network, before)

    def _retested(self, study: Study, network: nn.Module, before: _Tested) -> _Tested:
        """The quality of a network with that after its training, which changes it."""
        try:
            with limited_by(self.plan.deadline):
                before = replace(before, note=self._train(study, network))
        except TimeLimitError as error:
            return replace(before, note=f"{error}, during the fine-tuning")
        except UsageError as error:  # the loss is not finite, for example
            return replace(before, note=" ".join(str(error).split()))
        assert study.splits.test is not None
        found = self._blocks(network, study.splits.test)
        blocks = {**before.blocks, "finetuned_test": found}
        return replace(before, finetuned=self._finished(found)[self.metric], blocks=blocks)

    def _train(self, study: Study, network: nn.Module) -> str:
        """Train a network in place; a note if a time limit has ended it."""

        def on_step(step: int, total: int, loss: float) -> None:
            self.plan.report("finetune", step, total)

        config, samples = self.plan.training, self.plan.training_samples
        if config is not None:
            recovery = self.context.recovery(config, samples)
            study.finetune(
                network, self.model, recovery.config, data=recovery.data, on_step=on_step
            )
            return ""
        assert self.plan.recipe is not None
        data = study.splits.training
        data = data if samples is None else data.subsample(samples, self.seed)
        plain = self.plan.recipe.name == "plain"
        report = study.recover(
            network, self.model, self.plan.recipe, data=data, keeps_best=not plain, on_step=on_step
        )
        if not report.stopped or self.plan.deadline is None or not self.plan.deadline.passed:
            return ""
        return f"the time limit ended the recovery after {report.steps} of {report.planned} steps"

    def _blocks(self, network: nn.Module, samples: Samples) -> list[Sums]:
        """The sums of the metrics over each block of test items."""
        return network_sums(
            network,
            samples,
            self.context.task,
            reference=self.test_reference,
            batch_size=self.block_size,
            device=self.plan.device,
        )

    def _finished(self, blocks: Sequence[Sums]) -> dict[str, float]:
        return self.context.task.finish(summed(blocks))

    def _reference(self, samples: Samples, batch_size: int = 256) -> Reference:
        model, task = copied(self.model).eval(), self.context.task
        return dense_reference(
            model, samples, task, batch_size=batch_size, device=self.plan.device
        )


def _failed(key: Key, error: Exception) -> Row:
    reason = str(error)
    if not isinstance(error, RankNASError):  # an error in the strategy: log its traceback
        logger.warning("%s failed at %s, seed %d", *key, exc_info=error)
        reason = f"{type(error).__name__}: {error}"
    return Row(*key, status=" ".join(reason.split()))
