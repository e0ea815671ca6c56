"""The search: compile, calibrate, factorise, then propose, evaluate and record."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import optuna
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rankNAS.allocation import DENSE, Choice
from rankNAS.budget import BUDGET_COSTS, check_budgets
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import Factorisation, Select, factorise
from rankNAS.data.loading import (
    Data,
    Splits,
    check_labels,
    held_out,
    in_memory,
    len_of,
    load_data,
    split,
    subsample,
)
from rankNAS.decompositions.norms import NORMS, NormName
from rankNAS.decompositions.shapes import COSTS
from rankNAS.evaluation.context import Progress, SearchContext, silent
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.exceptions import RankNASError, UsageError
from rankNAS.execution.early_stopping import PARTS, SuccessiveHalving
from rankNAS.execution.parallel import Parallel, Workers
from rankNAS.execution.scheduler import Executor, Serial, schedule
from rankNAS.hw_models import HardwareModel, LatencyTables, compile_latency, make_hardware
from rankNAS.io.files import cache_folder
from rankNAS.io.fingerprints import fingerprint
from rankNAS.objectives import CostObjective, Latency, ObjectiveBase, make_objective
from rankNAS.recovery.training import Recovery, TrainingConfig
from rankNAS.renamed import renamed
from rankNAS.search_spaces.attention import separate_attention
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy, hardware_choices
from rankNAS.solver.pareto import pareto_filter
from rankNAS.storage.store import StudyStore
from rankNAS.strategies import make_strategy
from rankNAS.strategies.base import Problem, Request, Strategy, Trial
from rankNAS.strategies.tables import build_problem
from rankNAS.study import Study

__all__ = ["Settings", "prepare", "requests", "run", "search"]

logger = logging.getLogger(__name__)
Source = str | Data | tuple[Dataset[Any], Dataset[Any]]


@renamed(metric="norm")
@dataclass(frozen=True)
class Settings:
    """How candidates are made and measured; part of a study's configuration.

    Args:
        norm: The norm of the decompositions: ``fisher``, ``input``, ``pooled`` or ``weight``.
        calibration: Training samples for statistics and batch norms, at most.
        validation: Further training samples that metrics are measured on, at most.
        batch_norm: Correct batch-norm statistics after truncation.
        sequential: Give the networks that are handed out factors that suit the inputs which the
            layers before leave them; trials are measured without, unless the strategy refits.
        policy: Which ranks are offered.
        choices: Most choices a layer keeps once their errors are known.
        batch_size: Samples a forward pass of an evaluation.
        latency_batch: Samples of the forward pass whose latency counts.
        strict_hardware: Whether tables of latencies raise an error for what they have not seen.
        early_stopping: Give trials up that are behind after a part of their epochs, or on a part
            of the validation samples; see `SuccessiveHalving`.
        recovery: Train the network of every trial, and those that are handed out, before they are
            measured. The search gives the seed, and says whether images may be mirrored.
        recovery_samples: Training samples of an epoch, at most.

    Raises:
        UsageError: An unknown metric, or a number below one.

    Example:
        >>> Settings(norm="input", policy=RankPolicy(multiple_of=8)).validation
        1024
    """

    norm: NormName = "fisher"
    calibration: int = 1024
    validation: int = 1024
    batch_norm: bool = True
    sequential: bool = True
    policy: RankPolicy = RankPolicy()
    choices: int = 64
    batch_size: int = 256
    latency_batch: int = 1
    strict_hardware: bool = False
    early_stopping: bool = False
    recovery: TrainingConfig | None = None
    recovery_samples: int = 2048

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f"`norm` must be one of {', '.join(NORMS)}, got {self.norm!r}.")
        counts = ("calibration", "validation", "choices", "batch_size", "latency_batch")
        for name in (*counts, "recovery_samples"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.early_stopping and self.recovery is not None and self.recovery.epochs < 2:
            raise UsageError(
                "early stopping compares trials after some of their epochs; let them train for "
                "two or more, or leave it out."
            )


def search(
    model: nn.Module,
    data: Source,
    *,
    objectives: Sequence[str | ObjectiveBase] = ("accuracy",),
    budget: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
    strategy: str | Strategy = "auto",
    n_trials: int = 40,
    storage: str | optuna.storages.BaseStorage | None = None,
    name: str = "study",
    seed: int = 0,
    resume: bool = False,
    settings: Settings | None = None,
    hardware: str | HardwareModel = "host",
    space: SearchSpace | None = None,
    device: str | torch.device = "cpu",
    workers: int | Workers = 1,
    on_progress: Progress | None = None,
    on_record: Callable[[], object] | None = None,
    on_trial: Callable[[Trial, Trial | None], None] | None = None,
) -> Study:
    """Search the ranks of a trained model.

    Args:
        model: The dense model; it is not changed.
        data: A source (see `load_data`), a `Data`, or a training and a test set.
        objectives: Names, or `Objective` objects. With several, see ``Study.pareto_front``.
        budget: Cost name to the fraction kept of the dense model's, for example
            ``{"macs": 0.3}``. Several such budgets are answered one after the other, by the
            same factors, tables and trials.
        strategy: A name, or a `Strategy`.
        n_trials: How many trials each budget shall have in the end, failed ones included; the
            measurements that some strategies make first (`Strategy.probes`) come on top.
        storage: An Optuna storage or URL such as ``sqlite:///study.db``; None keeps the study in
            memory.
        name: The study's name in the storage.
        seed: Of everything that is drawn. Equal seeds give equal trials.
        resume: Go on with an existing study of that name.
        settings: How candidates are made and measured.
        hardware: A name or a `HardwareModel`, where latency is budgeted.
        space: From `compile_space`; compiled here if not given.
        device: Where to evaluate.
        workers: How many trials are evaluated at the same time, and by whom. More than one are
            run by Ray.
        on_progress: Called with a stage's name, steps done, and steps in all.
        on_record: Called once, when all arguments have proved right and the study is open.
        on_trial: Called with each trial and the best one so far.

    Raises:
        BudgetError: A budget that is malformed or that nothing can meet.
        DataError: Data that is missing or does not fit the model.
        ObjectiveError: Three trials in a row failed.
        StudyError: The study exists and `resume` is false, or its configuration differs.
        UsageError: The strategy cannot do what is asked.

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
    started = time.perf_counter()
    chosen = make_strategy(strategy)
    measured = [make_objective(o) for o in objectives]
    budgets = check_budgets(budget)
    _check(n_trials, measured)
    if settings.early_stopping:
        SuccessiveHalving([o.name for o in measured], [o.direction for o in measured])
    loaded = load_data(data)
    context, problems = prepare(
        model,
        loaded,
        strategies=[chosen],
        budgets=budgets,
        objectives=measured,
        settings=settings,
        hardware=hardware,
        space=space,
        device=device,
        seed=seed,
        on_progress=on_progress,
    )
    store = StudyStore.open(
        storage,
        name,
        configuration=_configuration(
            model, loaded, chosen, measured, budgets, settings, seed, context.factorisation
        ),
        choices=problems[0].labels(),
        directions=problems[0].directions,
        resume=resume,
    )
    if on_record is not None:
        on_record()
    _check_choices(problems[0], store)
    study = Study(name, store, problems, chosen.bind(context), context, loaded, context.dense())
    try:
        run(study, n_trials, on_trial, workers)
    finally:
        store.close()
    study.seconds = time.perf_counter() - started
    return study


def prepare(
    model: nn.Module,
    data: Data,
    *,
    strategies: Sequence[Strategy],
    budgets: Sequence[Mapping[str, float]],
    objectives: Sequence[ObjectiveBase],
    settings: Settings,
    hardware: str | HardwareModel = "host",
    space: SearchSpace | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> tuple[SearchContext, tuple[Problem, ...]]:
    """Everything that is done once: the splits, the space, its factors, its tables.

    Args:
        model: The dense model; it is not changed.
        data: The data.
        strategies: All that will work on it; each keeps the choices it may need.
        budgets: One a problem.
        objectives: What is measured.
        settings: How candidates are made and measured.
        hardware: A name or a `HardwareModel`, where latency is budgeted.
        space: From `compile_space`; compiled here if not given.
        device: Where to evaluate.
        seed: Of everything that is drawn.
        on_progress: Called with a stage's name, steps done, and steps in all.

    Returns:
        The workbench, and one problem for each budget, with the same tables.

    Raises:
        UsageError: A strategy cannot do what is asked.
        BudgetError: Nothing can meet a budget.
        DataError: The data does not fit the model.
    """
    report = on_progress or silent
    for strategy in strategies:
        for request in requests(data, budgets, objectives, settings):
            strategy.check(request)
    splits = split(
        data, calibration=settings.calibration, validation=settings.validation, seed=seed
    )
    recovery = _recovery(data, splits, settings, seed)
    model = copy.deepcopy(separate_attention(model)).to(device).eval()
    inputs = splits.calibration[0].to(device)
    check_labels(data, _outputs(model, inputs))
    space = space or compile_space(model, inputs[:1], policy=settings.policy)
    named = [(o.name, o.direction) for o in objectives]
    for budget in budgets:
        build_problem(space, None, {k: v for k, v in budget.items() if k != "latency"}).check()
    costs = {name for budget in budgets for name in budget}
    latency = None
    if "latency" in costs or any(s.needs_latency for s in strategies):
        asked = space.at_batch(settings.latency_batch * space.input_shape[0])
        predictor = make_hardware(hardware, strict=settings.strict_hardware)
        bound = predictor.bind(model, asked, inputs[:1], partial(report, "time"))
        latency = compile_latency(bound, asked)
        kept = {
            name: hardware_choices(layer, latency.seconds[name].tolist(), settings.policy)
            for name, layer in space.layers.items()
        }
        space, latency = space.restrict(kept), latency.restrict(kept)
    statistics = calibrate(
        model,
        space,
        inputs,
        norm=settings.norm,
        seed=seed,
        cache=cache_folder() / "calibration",
        on_batch=lambda done, total: report("calibrate", done, total),
    )
    needs = list(dict.fromkeys((s.operators, s.needs_latency) for s in strategies))
    factorisation = factorise(
        model,
        space,
        statistics,
        norm=settings.norm,
        centred=None if settings.batch_norm else False,
        select=_selection({*costs, *(n for n, _ in named)}, latency, settings.choices, needs),
        on_layer=lambda done, total: report("factorise", done, total),
    )
    if latency is not None:
        latency = latency.restrict(
            {name: layer.choices for name, layer in factorisation.space.layers.items()}
        )
    problems = tuple(
        build_problem(
            factorisation.space, factorisation.errors(), budget, latency=latency, objectives=named
        )
        for budget in budgets
    )
    for problem in problems:
        problem.check()
    evaluator = Evaluator(
        factorisation,
        splits.calibration[0],
        splits.validation,
        objectives,
        extra_costs=None if latency is None else partial(_predicted, latency),
        batch_norm=settings.batch_norm,
        batch_size=settings.batch_size,
        device=device,
        sequential=settings.sequential,
        recovery=recovery,
        parts=PARTS if settings.early_stopping else (1.0,),
    )
    return SearchContext(
        factorisation, splits, evaluator, device, seed, data.flip, report
    ), problems


def _recovery(data: Data, splits: Splits, settings: Settings, seed: int) -> Recovery | None:
    """The training of every trial's network; its samples are in memory, to be shared."""
    if settings.recovery is None:
        return None
    if data.num_classes is None:
        raise UsageError(f"{data.name} has no class labels; networks cannot be trained on it.")
    samples = in_memory(subsample(splits.training, settings.recovery_samples, seed))
    return Recovery(samples, replace(settings.recovery, seed=seed, flip=data.flip))


def requests(
    data: Data,
    budgets: Sequence[Mapping[str, float]],
    objectives: Sequence[ObjectiveBase],
    settings: Settings,
) -> list[Request]:
    """What a strategy is asked for, one request a budget; known before any work is done."""
    names = [o.name for o in objectives]
    training = len_of(data.train) - held_out(len_of(data.train), settings.validation)
    return [Request(b, names, training, data.num_classes is not None) for b in budgets]


def _selection(
    names: set[str],
    latency: LatencyTables | None,
    most: int,
    needs: Sequence[tuple[tuple[str, ...] | None, bool]],
) -> Select:
    """Which choices of a layer may be part of a good allocation, given the costs that matter.

    They are looked for by each strategy's needs apart: its operators, and whether latency matters
    to it although nobody bounds it.
    """
    exact = [name for name in COSTS if name in names]

    def select(layer: Layer, errors: Sequence[float]) -> list[Choice]:
        kept: set[Choice] = set()
        for operators, needs_latency in needs:
            costs: list[Sequence[float]] = [[c[name] for c in layer.costs] for name in exact]
            costs = costs or [[c["macs"] for c in layer.costs]]
            if latency is not None and (needs_latency or "latency" in names):
                costs.append(latency.seconds[layer.name].tolist())
            rows = [
                i
                for i, c in enumerate(layer.choices)
                if operators is None or c == DENSE or c.operator in operators
            ]
            columns = [[cost[i] for i in rows] for cost in costs]
            found = pareto_filter([errors[i] for i in rows], columns, most)
            kept |= {layer.choices[rows[i]] for i in found}
        return [c for c in layer.choices if c in kept]

    return select


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


def run(
    study: Study,
    n_trials: int,
    on_trial: Callable[[Trial, Trial | None], None] | None = None,
    workers: Workers | None = None,
) -> None:
    """Propose, evaluate and record until every budget has its number of trials.

    Args:
        study: What is known so far; its strategy is bound.
        n_trials: Trials proposed for each budget, failed ones included. Probes come on top.
        on_trial: Called with each trial and the best one so far for its budget.
        workers: Who evaluates; None for this process alone.

    Raises:
        ObjectiveError: Three trials in a row failed.
    """
    history = study.history
    for trial in history.complete:
        final = study.final and not trial.probe
        study.evaluator.remember(trial.allocation, trial.metrics, final=final)
    problem, pruner = study.problem, None
    if len(study.evaluator.parts) > 1:
        pruner = SuccessiveHalving(problem.objectives, problem.directions)
        pruner.learn(history)
    executor: Executor
    if workers is not None and workers.parallel:
        executor = Parallel(study.evaluator, workers, pruner)
    else:
        executor = Serial(study.evaluator, pruner)
    try:
        schedule(study, n_trials, executor, on_trial)
    finally:
        executor.close()


def _predicted(latency: LatencyTables, allocation: Mapping[str, Choice]) -> dict[str, float]:
    """Seconds of the whole network with their standard deviation, and joules if known."""
    seconds, sigma = latency.predict(allocation)
    costs = {"predicted_latency": seconds, "predicted_latency_std": sigma}
    energy = latency.predict_energy(allocation)
    return costs if energy is None else {**costs, "predicted_energy": energy}


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> int:
    """Size of the last axis of the model's output."""
    return int(model(inputs[:1]).shape[-1])


def _check(n_trials: int, objectives: Sequence[ObjectiveBase]) -> None:
    if n_trials < 1:
        raise UsageError(f"`n_trials` must be at least 1, got {n_trials}.")
    if not objectives:
        raise UsageError("at least one objective is needed, for example 'accuracy'.")
    names = [o.name for o in objectives]
    if len(set(names)) < len(names):
        raise UsageError(f"objectives must have different names, got {', '.join(names)}.")
    for objective in objectives:
        if objective.name in BUDGET_COSTS and not isinstance(objective, CostObjective | Latency):
            raise UsageError(
                f"an objective of yours has the name of a cost, {objective.name!r}, which is "
                "known without measuring; give it another name."
            )


def _configuration(
    model: nn.Module,
    data: Data,
    strategy: Strategy,
    objectives: Sequence[ObjectiveBase],
    budgets: Sequence[Mapping[str, float]],
    settings: Settings,
    seed: int,
    factorisation: Factorisation,
) -> dict[str, Any]:
    """What must not change while a study goes on."""
    return {
        "weights": fingerprint(model.state_dict()),
        "data": data.fingerprint,
        "strategy": strategy,
        "objectives": [f"{o.name}={o.direction}" for o in objectives],
        # A study goes on under another bound, but the choices depend on the costs that matter.
        "costs": sorted({name for budget in budgets for name in budget}),
        "settings": settings,
        "seed": seed,
        "layers": len(factorisation.space.layers),
    }
