"""The search: prepare, then propose, evaluate and record trials."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import optuna
import torch
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.budget import BUDGET_COSTS, check_budgets
from rankNAS.data.loading import DataSource
from rankNAS.deadline import Deadline, TimeLimitError, limited_by
from rankNAS.evaluation.context import Progress
from rankNAS.exceptions import RankNASError, UsageError
from rankNAS.execution.early_stopping import SuccessiveHalving
from rankNAS.execution.parallel import Parallel, Workers
from rankNAS.execution.scheduler import Executor, Serial, schedule
from rankNAS.fallback import uniform_trial
from rankNAS.hw_models import HardwareModel
from rankNAS.model_data import load_data_of
from rankNAS.objectives import CostObjective, Latency, ObjectiveBase, make_objective
from rankNAS.phases import Phases
from rankNAS.pipeline import prepare
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.wrappers import searchable
from rankNAS.search_spaces.zoo.huggingface import named_model
from rankNAS.settings import Settings, check_device, check_seed, study_identity
from rankNAS.storage.store import StudyStore, has_trials
from rankNAS.strategies import make_strategy
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.binding import bind, focused
from rankNAS.strategies.history import Trial
from rankNAS.strategies.problem import Problem
from rankNAS.study import Study
from rankNAS.tasks.base import Task
from rankNAS.tasks.infer import make_task, resolve_task

__all__ = ["objectives_of", "run", "run_within", "search"]

logger = logging.getLogger(__name__)


def search(
    model: nn.Module | str,
    data: DataSource,
    *,
    task: str | Task | None = None,
    objectives: Sequence[str | ObjectiveBase] | None = None,
    budget: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
    strategy: str | Strategy = "auto",
    n_trials: int = 40,
    storage: str | optuna.storages.BaseStorage | None = None,
    name: str = "study",
    seed: int = 0,
    resume: bool = False,
    start: Sequence[Allocation] = (),
    settings: Settings | None = None,
    hardware: str | HardwareModel = "host",
    space: SearchSpace | None = None,
    device: str | torch.device = "cpu",
    workers: int | Workers = 1,
    time_limit: float | Deadline | None = None,
    on_progress: Progress | None = None,
    on_record: Callable[[], object] | None = None,
    on_trial: Callable[[Trial, Trial | None], None] | None = None,
) -> Study:
    """Search the ranks of a trained model.

    Args:
        model: The dense model, which is not changed; or ``hf:FOLDER``, the model of a folder for
            ``transformers``.
        data: A source (see `load_data`), a `Data`, a training and a test set, or one set alone,
            labelled or not.
        task: What the model is for: a name (see `rankNAS.tasks.TASKS`) or a `Task`; found from the
            data and the model's output if None.
        objectives: Names, or `Objective` objects; by default the task's first metric. With
            several, see ``Study.pareto_front``.
        budget: Cost name to the fraction kept of the dense model's, for example
            ``{"macs": 0.3}``. A sequence of budgets runs one search per budget, with the same
            factors, tables and trials.
        strategy: A name, or a `Strategy`.
        n_trials: The number of trials for each budget, failed ones included. The measurements
            that some strategies make first (`Strategy.probes`) are extra.
        storage: An Optuna storage or URL such as ``sqlite:///study.db``; None keeps the study in
            memory.
        name: The study's name in the storage.
        seed: The random seed. Equal seeds give equal trials.
        resume: Continue an existing study of that name.
        start: Allocations to evaluate first, for example the best of an earlier study; for each
            budget those that meet it. They count as trials.
        settings: How candidates are made and measured.
        hardware: A name or a `HardwareModel`, where latency is budgeted.
        space: From `compile_space`; compiled here if not given.
        device: Where to evaluate.
        workers: The number of trials that are evaluated at the same time, or the workers that
            evaluate them. Ray runs more than one.
        time_limit: Seconds from now, or a deadline, after which the best answer so far is given;
            before any trial has finished that is the uniform allocation within the budget
            (`Study.limit_note` says so). What runs then is abandoned at its next batch or layer,
            and not recorded. A resumed study that has trials is prepared in full, because the
            network of its best trial needs the factors. Without a limit nothing depends on the
            clock.
        on_progress: Called with a stage's name, steps done, and steps in all.
        on_record: Called once, when all arguments are valid and the study is open.
        on_trial: Called with each trial and the best one so far.

    Raises:
        BudgetError: A budget that is malformed or that nothing can meet.
        DataError: Data that is missing or does not fit the model.
        ObjectiveError: Three trials in a row failed.
        StudyError: The study exists and `resume` is false, or its configuration differs.
        UsageError: The strategy cannot do what is asked, or the seed, the device or the time limit
            is none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> x, y = torch.randn(200, 64), torch.randint(0, 4, (200,))
        >>> data = TensorDataset(x[:150], y[:150]), TensorDataset(x[150:], y[150:])
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> study = search(model, data, budget={"macs": 0.5}, strategy="energy")
        >>> study.best.metrics["macs"] <= 0.5 * study.dense["macs"]
        True
    """
    settings = settings or Settings()
    workers = Workers(workers) if isinstance(workers, int) else workers
    started, deadline, phases = time.perf_counter(), Deadline.of(time_limit), Phases()
    check_seed(seed)
    check_device(device)
    chosen = make_strategy(strategy)
    settings = settings.of(chosen)
    for objective in objectives or ():
        make_objective(objective, None if task is None else make_task(task))
    budgets = check_budgets(budget)
    if n_trials < 1:
        raise UsageError(f"`n_trials` must be at least 1, got {n_trials}.")
    loaded = load_data_of(model, data)
    model = searchable(named_model(model))
    resolved = resolve_task(task, model, loaded)
    measured = objectives_of(objectives, resolved)
    if settings.early_stopping:
        _pruner(measured, resolved)
    begun = resume and storage is not None and has_trials(storage, name)
    with phases.timed("prepare"):
        with limited_by(None if begun else deadline):
            context, problems = prepare(
                model,
                loaded,
                resolved,
                strategies=[chosen],
                budgets=budgets,
                objectives=measured,
                settings=settings,
                hardware=hardware,
                space=space,
                device=device,
                seed=seed,
                start=start,
                on_progress=on_progress,
                phases=phases,
            )
        store = StudyStore.open(
            storage if context.complete else None,
            name,
            configuration=study_identity(
                model,
                loaded,
                resolved,
                chosen,
                measured,
                budgets,
                settings.sized(loaded),
                seed,
                len(context.factorisation.space.layers),
            ),
            choices=problems[0].labels(),
            directions=problems[0].directions,
            resume=resume,
        )
        if on_record is not None:
            on_record()
        _check_choices(problems[0], store)
        bound = chosen  # no more is needed of it if the time ends here
        if context.complete:
            with suppress(TimeLimitError), limited_by(deadline):
                context = focused(chosen, context, problems[0])
            with suppress(TimeLimitError), limited_by(deadline), phases.timed("prepare"):
                bound = bind(chosen, context)
        study = Study(name, store, problems, bound, context, loaded, context.dense())
    try:
        run_within(deadline, study, n_trials, on_trial, workers, start)
    finally:
        store.close()
    study.seconds = time.perf_counter() - started
    return study


def objectives_of(given: Sequence[str | ObjectiveBase] | None, task: Task) -> list[ObjectiveBase]:
    """The objectives, by default the first metric of the task; all are checked.

    Raises:
        UsageError: There is none, two have one name, or one has the name of a cost.
    """
    names = [task.main_metric] if given is None else given
    objectives = [make_objective(objective, task) for objective in names]
    if not objectives:
        raise UsageError(f"at least one objective is needed, for example {task.main_metric!r}.")
    found = [o.name for o in objectives]
    if len(set(found)) < len(found):
        raise UsageError(f"objectives must have different names, got {', '.join(found)}.")
    for objective in objectives:
        if objective.name in BUDGET_COSTS and not isinstance(objective, CostObjective | Latency):
            raise UsageError(
                f"an objective of yours has the name of a cost, {objective.name!r}, which is "
                "known without measuring; give it another name."
            )
    return objectives


def _pruner(objectives: Sequence[ObjectiveBase], task: Task) -> SuccessiveHalving:
    return SuccessiveHalving(
        [o.name for o in objectives],
        [o.direction for o in objectives],
        metrics=tuple(task.directions),
    )


def _check_choices(problem: Problem, store: StudyStore) -> None:
    """Raise a RankNASError unless a resumed study has the choices that it was made with."""
    if all(
        [str(c) for c in choices] == list(store.choices[name])
        for name, choices in problem.choices.items()
    ):
        return
    raise RankNASError(
        f"study {store.study.study_name!r} was made with other choices of ranks than this "
        "machine and these versions give; start a new study."
    )


def run_within(deadline: Deadline | None, study: Study, *arguments: Any) -> None:
    """Run a study until its end or that of the time, and see that every budget has an answer.

    Args:
        deadline: The end of the time; None if there is none.
        study: As for `run`.
        arguments: As for `run`.

    Raises:
        ObjectiveError: As for `run`.
    """
    phases = study.context.phases
    try:
        if study.context.complete:
            with limited_by(deadline), phases.timed("trials"):
                run(study, *arguments)
            return
    except TimeLimitError:
        study.evaluator.forget()  # activations of an abandoned pass
    study.limit, study.ended = deadline, phases.interrupted
    with phases.timed("answer"):
        for problem in study.problems:
            if not study.history.feasible(problem):
                study.stopgaps[problem.budget_key] = uniform_trial(problem, study.evaluator)
    logger.warning("%s", study.limit_note)


def run(
    study: Study,
    n_trials: int,
    on_trial: Callable[[Trial, Trial | None], None] | None = None,
    workers: Workers | None = None,
    start: Sequence[Allocation] = (),
) -> None:
    """Propose, evaluate and record trials until every budget has its number of trials.

    Args:
        study: The study, with the trials so far; its strategy is bound.
        n_trials: Trials proposed for each budget, failed ones included. Probes are extra.
        on_trial: Called with each trial and the best one so far for its budget.
        workers: The workers that evaluate trials; None for this process alone.
        start: Allocations to evaluate first, for each budget those that meet it.

    Raises:
        ObjectiveError: Three trials in a row failed.
    """
    history = study.history
    for trial in history.complete:
        final = study.final and not trial.probe
        screening = trial.probe and study.strategy.screens
        study.evaluator.remember(
            trial.allocation,
            trial.metrics,
            final=final,
            screening=screening,
            weights=trial.weights,
        )
    problem, pruner = study.problem, None
    if len(study.evaluator.parts) > 1:
        pruner = SuccessiveHalving(
            problem.objectives,
            problem.directions,
            metrics=problem.metrics,
            divergence=problem.divergence if problem.ranked_by_divergence else None,
        )
        pruner.learn(history)
    executor: Executor
    if workers is not None and workers.parallel:
        executor = Parallel(study.evaluator, workers, pruner)
    else:
        executor = Serial(study.evaluator, pruner)
    try:
        schedule(study, n_trials, executor, on_trial, start)
    finally:
        executor.close()
