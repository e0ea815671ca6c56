"""The search: compile, calibrate, factorise, then propose, evaluate and record."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from torch import nn
from torch.utils.data import Dataset

from rankNAS.allocation import Allocation, Choice
from rankNAS.budget import check_budget
from rankNAS.calibration import calibrate
from rankNAS.data import Data, Splits, check_labels, load_data, split
from rankNAS.decompositions.metrics import METRICS, MetricName
from rankNAS.decompositions.shapes import COSTS
from rankNAS.evaluation import Evaluator, quality
from rankNAS.exceptions import ObjectiveError, RankNASError, UsageError
from rankNAS.files import cache_folder
from rankNAS.fingerprints import fingerprint
from rankNAS.hw_models import HardwareModel, latency_tables, make_hardware
from rankNAS.network import Factorisation, Select, factorise
from rankNAS.objectives import ObjectiveBase, make_objective
from rankNAS.record import Record
from rankNAS.search_spaces.attention import separate_attention
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.strategies import make_strategy
from rankNAS.strategies.base import History, Problem, Strategy, Trial
from rankNAS.study import Study, best_trial
from rankNAS.tables import make_problem, worthwhile

__all__ = ["Settings", "prepare", "search"]

logger = logging.getLogger(__name__)
FAILURES = 3  # in a row, and the search stops
Progress = Callable[[str, int, int], None]
Source = str | Data | tuple[Dataset[Any], Dataset[Any]]


@dataclass(frozen=True)
class Settings:
    """How candidates are made and measured; part of a study's configuration.

    Args:
        metric: The norm of the decompositions: ``fisher``, ``input`` or ``weight``.
        calibration: Training samples for statistics and batch norms, at most.
        validation: Further training samples that metrics are measured on, at most.
        batch_norm: Re-estimate batch-norm statistics after truncation.
        policy: Which ranks are offered.
        choices: Most choices a layer keeps once their errors are known.
        batch_size: Samples a forward pass.

    Raises:
        UsageError: An unknown metric, or a number below one.

    Example:
        >>> Settings(metric="input", policy=RankPolicy(multiple_of=8)).validation
        1024
    """

    metric: MetricName = "fisher"
    calibration: int = 1024
    validation: int = 1024
    batch_norm: bool = True
    policy: RankPolicy = RankPolicy()
    choices: int = 64
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"`metric` must be one of {', '.join(METRICS)}, got {self.metric!r}.")
        for name in ("calibration", "validation", "choices", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def search(
    model: nn.Module,
    data: Source,
    *,
    objectives: Sequence[str | ObjectiveBase] = ("accuracy",),
    budget: Mapping[str, float] | None = None,
    strategy: str | Strategy = "bo",
    n_trials: int = 40,
    storage: str | optuna.storages.BaseStorage | None = None,
    name: str = "study",
    seed: int = 0,
    resume: bool = False,
    settings: Settings | None = None,
    hardware: str | HardwareModel = "host",
    space: SearchSpace | None = None,
    device: str | torch.device = "cpu",
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
            ``{"macs": 0.3}``.
        strategy: A name, or a `Strategy`.
        n_trials: How many trials the study shall have in the end, failed ones included.
        storage: An Optuna storage or URL such as ``sqlite:///study.db``; None keeps the study in
            memory.
        name: The study's name in the storage.
        seed: Of everything that is drawn. Equal seeds give equal trials.
        resume: Go on with an existing study of that name.
        settings: How candidates are made and measured.
        hardware: A name or a `HardwareModel`, where latency is budgeted.
        space: From `compile_space`; compiled here if not given.
        device: Where to evaluate.
        on_progress: Called with a stage's name, steps done, and steps in all.
        on_record: Called once, when all arguments have proved right and the study is open.
        on_trial: Called with each trial and the best one so far.

    Raises:
        BudgetError: A budget that is malformed or that nothing can meet.
        DataError: Data that is missing or does not fit the model.
        ObjectiveError: Three trials in a row failed.
        StudyError: The study exists and `resume` is false, or its configuration differs.

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
    started = time.perf_counter()
    chosen = make_strategy(strategy)
    measured = [make_objective(o) for o in objectives]
    budget = check_budget(budget or {})
    _check(n_trials, measured)
    loaded = load_data(data)
    splits = split(
        loaded, calibration=settings.calibration, validation=settings.validation, seed=seed
    )
    report = on_progress or (lambda *_: None)
    factorisation, problem = prepare(
        model,
        splits,
        budget=budget,
        objectives=measured,
        settings=settings,
        hardware=hardware,
        space=space,
        device=device,
        seed=seed,
        on_progress=report,
    )
    check_labels(loaded, _outputs(factorisation.model, splits))
    record = Record.open(
        storage,
        name,
        configuration=_configuration(
            model, loaded, chosen, measured, budget, settings, seed, factorisation
        ),
        choices={layer: [str(c) for c in choices] for layer, choices in problem.choices.items()},
        directions=problem.directions,
        resume=resume,
    )
    if on_record is not None:
        on_record()
    _check_choices(problem, record)
    evaluator = Evaluator(
        factorisation,
        splits.calibration[0],
        splits.validation,
        measured,
        extra_costs=_predicted(problem),
        batch_norm=settings.batch_norm,
        batch_size=settings.batch_size,
        device=device,
    )
    dense = {
        **quality(evaluator.dense_logits, splits.validation[1].to(device)),
        **evaluator.costs(factorisation.space.dense),
    }
    study = Study(name, record, problem, chosen, evaluator, loaded, splits, dense)
    _run(study, n_trials, seed, on_trial)
    study.seconds = time.perf_counter() - started
    return study


def prepare(
    model: nn.Module,
    splits: Splits,
    *,
    budget: Mapping[str, float],
    objectives: Sequence[ObjectiveBase],
    settings: Settings,
    hardware: str | HardwareModel = "host",
    space: SearchSpace | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    on_progress: Progress,
) -> tuple[Factorisation, Problem]:
    """Everything that is done once: the space, its factors and its tables."""
    model = copy.deepcopy(separate_attention(model)).to(device).eval()
    inputs = splits.calibration[0].to(device)
    space = space or compile_space(model, inputs[:1], policy=settings.policy)
    named = [(o.name, o.direction) for o in objectives]
    make_problem(space, None, {k: v for k, v in budget.items() if k != "latency"}).check()
    latency = None
    if "latency" in budget:
        latency = latency_tables(
            make_hardware(hardware), space, lambda done, total: on_progress("time", done, total)
        )
    statistics = calibrate(
        model,
        space,
        inputs,
        metric=settings.metric,
        seed=seed,
        cache=cache_folder() / "calibration",
        on_batch=lambda done, total: on_progress("calibrate", done, total),
    )
    factorisation = factorise(
        model,
        space,
        statistics,
        metric=settings.metric,
        centred=None if settings.batch_norm else False,
        select=_selection({*budget, *(name for name, _ in named)}, latency, settings.choices),
        on_layer=lambda done, total: on_progress("factorise", done, total),
    )
    if latency is not None:
        latency = {
            name: [latency[name][space.layers[name].choices.index(c)] for c in layer.choices]
            for name, layer in factorisation.space.layers.items()
        }
    problem = make_problem(
        factorisation.space, factorisation.errors(), budget, latency=latency, objectives=named
    )
    problem.check()
    return factorisation, problem


def _selection(
    names: set[str], latency: Mapping[str, Sequence[float]] | None, most: int
) -> Select:
    """Which choices of a layer may be part of a good allocation, given the costs that matter."""
    exact = [name for name in COSTS if name in names]

    def select(layer: Layer, errors: Sequence[float]) -> list[Choice]:
        costs: list[Sequence[float]] = [[c[name] for c in layer.costs] for name in exact]
        if latency is not None:
            costs.append(latency[layer.name])
        costs = costs or [[c["macs"] for c in layer.costs]]
        return [layer.choices[i] for i in worthwhile(errors, costs, most)]

    return select


def _check_choices(problem: Problem, record: Record) -> None:
    """Raise a RankNASError unless a resumed study has the choices that it was made with."""
    if all(
        [str(c) for c in choices] == list(record.choices[name])
        for name, choices in problem.choices.items()
    ):
        return
    raise RankNASError(
        f"study {record.study.study_name!r} was made with other choices of ranks than this "
        "machine and these versions give; start a new study."
    )


def _run(
    study: Study,
    n_trials: int,
    seed: int,
    on_trial: Callable[[Trial, Trial | None], None] | None,
) -> None:
    history = study.history
    for trial in history.complete:
        study.evaluator.remember(trial.allocation, trial.metrics)
    while len(history.trials) < n_trials:
        rng = np.random.default_rng([seed, len(history.trials)])
        proposals = study.strategy.propose(study.problem, history, 1, rng)
        if not proposals:
            break
        trial = _evaluate(study, proposals[0], len(history.trials))
        study.record.add(trial, study.problem.objectives)
        history = History((*history.trials, trial))
        if on_trial is not None:
            on_trial(trial, best_trial(study.problem, history) if history.complete else None)
        _stop_if_failing(history)


def _evaluate(study: Study, allocation: Allocation, number: int) -> Trial:
    problem = study.problem
    study.evaluator.factorisation.space.check(allocation)
    if not problem.meets(problem.indices(allocation)):
        raise RankNASError(
            f"strategy {study.strategy.name!r} proposed an allocation that breaks the budget "
            f"{dict(problem.budget)}: {problem.fractions(problem.indices(allocation))}."
        )
    started = time.perf_counter()
    try:
        metrics = study.evaluator.evaluate(allocation)
    except (ObjectiveError, torch.OutOfMemoryError) as error:
        logger.warning("trial %d failed: %s", number, error)
        seconds = time.perf_counter() - started
        return Trial(number, allocation, "failed", seconds=seconds, reason=str(error))
    values = tuple(metrics[name] for name in problem.objectives)
    seconds = time.perf_counter() - started
    return Trial(number, allocation, "complete", values, metrics, seconds)


def _stop_if_failing(history: History) -> None:
    last = history.trials[-FAILURES:]
    if len(last) == FAILURES and all(t.state == "failed" for t in last):
        raise ObjectiveError(
            f"{FAILURES} trials in a row failed, so the search stops; the last: {last[-1].reason}"
        )


def _predicted(problem: Problem) -> Callable[[Mapping[str, Any]], dict[str, float]] | None:
    """Predicted latency of an allocation, where there is a table of it."""
    if "latency" not in problem.costs:
        return None

    def costs(allocation: Mapping[str, Any]) -> dict[str, float]:
        table = problem.costs["latency"]
        indices = problem.indices(allocation)
        return {"predicted_latency": float(sum(t[i] for t, i in zip(table, indices, strict=True)))}

    return costs


@torch.no_grad()
def _outputs(model: nn.Module, splits: Splits) -> int:
    """Size of the last axis of the model's output."""
    device = next(model.parameters()).device
    return int(model(splits.calibration[0][:1].to(device)).shape[-1])


def _check(n_trials: int, objectives: Sequence[ObjectiveBase]) -> None:
    if n_trials < 1:
        raise UsageError(f"`n_trials` must be at least 1, got {n_trials}.")
    if not objectives:
        raise UsageError("at least one objective is needed, for example 'accuracy'.")
    names = [o.name for o in objectives]
    if len(set(names)) < len(names):
        raise UsageError(f"objectives must have different names, got {', '.join(names)}.")


def _configuration(
    model: nn.Module,
    data: Data,
    strategy: Strategy,
    objectives: Sequence[ObjectiveBase],
    budget: Mapping[str, float],
    settings: Settings,
    seed: int,
    factorisation: Factorisation,
) -> dict[str, Any]:
    """What must not change while a study goes on; JSON values."""
    return {
        "weights": fingerprint(model.state_dict()),
        "data": data.fingerprint,
        "strategy": repr(strategy),
        "objectives": [f"{o.name}={o.direction}" for o in objectives],
        "budget": dict(budget),
        "settings": repr(settings),
        "seed": seed,
        "layers": len(factorisation.space.layers),
    }
