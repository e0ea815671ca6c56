"""The preparation of a search: data, space, statistics, factors and problems."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.factors import Screen, Select
from rankNAS.compression.preparation import Preparation
from rankNAS.compression.streaming import exceeds
from rankNAS.copies import copied
from rankNAS.data.base import Data
from rankNAS.data.splits import Splits, held_out, split
from rankNAS.deadline import TimeLimitError, check_time, limited_by
from rankNAS.decompositions.shapes import EXACT_COSTS, LAYER_COSTS
from rankNAS.evaluation.context import Progress, SearchContext, silent
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.evaluation.pruning import PARTS
from rankNAS.evaluation.verification import verify_plain
from rankNAS.exceptions import UsageError
from rankNAS.fallback import sparse_space, uniform_space
from rankNAS.hw_models import HardwareModel, LatencyTables, compile_latency, make_hardware
from rankNAS.hw_models.tokens import first_tokens, space_of_tokens
from rankNAS.objectives import ObjectiveBase
from rankNAS.phases import Phases
from rankNAS.recovery.refinement import Refiner
from rankNAS.recovery.trainer import Recovery
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.compiler import compile_space, prepared_model
from rankNAS.search_spaces.policies import RankPolicy, hardware_choices
from rankNAS.search_spaces.wrappers import searchable
from rankNAS.settings import NORM, Settings
from rankNAS.solver.pareto import pareto_filter, pareto_screen
from rankNAS.strategies.base import Request, Strategy
from rankNAS.strategies.needed import needed_choices, with_choices
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.tables import build_problem, check_reachable
from rankNAS.tasks.base import Task
from rankNAS.tasks.text import warn_of_targets
from rankNAS.trees import Inputs

__all__ = ["prepare", "requests"]

logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    data: Data,
    task: Task,
    *,
    strategies: Sequence[Strategy],
    budgets: Sequence[Mapping[str, float]],
    objectives: Sequence[ObjectiveBase],
    settings: Settings,
    hardware: str | HardwareModel = "host",
    space: SearchSpace | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    start: Sequence[Allocation] = (),
    on_progress: Progress | None = None,
    phases: Phases | None = None,
) -> tuple[SearchContext, tuple[Problem, ...]]:
    """Prepare a search: split the data, compile the space, calibrate, factorise, make tables.

    Args:
        model: The dense model; it is not changed.
        data: The data.
        task: Reads batches and outputs; see `resolve_task`.
        strategies: All strategies that will be used; the choices that any of them may need stay.
        budgets: One for each problem.
        objectives: What is measured.
        settings: How candidates are made and measured.
        hardware: A name or a `HardwareModel`, where latency is budgeted.
        space: From `compile_space`; compiled here if not given.
        device: Where to evaluate.
        seed: The random seed.
        start: Allocations whose choices are kept, whatever they cost.
        on_progress: Called with a stage's name, steps done, and steps in all.
        phases: Takes the CPU seconds of each phase.

    Returns:
        The search context, and one problem for each budget; all problems share their tables. If
        the active deadline (`limited_by`) passes first, they hold the choices of uniform answers
        alone, and the context is not ``complete``.

    Raises:
        UsageError: A strategy cannot do what is asked.
        BudgetError: Nothing can meet a budget.
        DataError: The data does not fit the model.
    """
    report, phases = on_progress or silent, phases or Phases()
    settings = _settled(settings, strategies)
    for strategy in strategies:
        for request in requests(data, budgets, objectives, settings):
            strategy.check(request)
    sizes = settings.sizes(data)
    splits = split(data, calibration=sizes.calibration, validation=sizes.validation, seed=seed)
    recovery = _recovery(splits, task, settings, seed)
    given = searchable(model)
    example = task.inputs_of(splits.calibration.example(1, device))
    model = prepared_model(given, example, settings.policy)
    verify_plain(model, given, example)
    model = copied(model).to(device).eval()
    warn_of_targets(model, task, splits.calibration)
    given_space = space
    space = space or compile_space(model, example, policy=settings.policy)
    for allocation in start:
        space.check(allocation)
    costs = {name for budget in budgets for name in budget}
    names = {*costs, *(o.name for o in objectives)}
    exact = _exact(names)
    needed = needed_choices(strategies, model, space, settings.policy, exact, settings.choices)
    space = with_choices(space, needed)
    if given_space is None and not start:
        space = _operators(space, strategies, settings)
    with limited_by(None):
        check_reachable(space, budgets)
    latency = None
    if "latency" in costs or any(s.needs_latency for s in strategies):
        measured = partial(_latency, model, example, settings, hardware, report, start)
        with suppress(TimeLimitError), phases.timed("time"):
            space, latency = _in_time(measured, space, start, budgeted="latency" in costs)
    needs = list(dict.fromkeys((s.operators, s.needs_latency) for s in strategies))
    kept = {n: {*found, *(a[n] for a in start)} for n, found in needed.items()}
    select, screen = _selection(exact, latency, "latency" in names, settings.choices, needs, kept)
    factorisation, losses, complete = Preparation(
        model,
        space,
        splits.calibration,
        task,
        settings.norm or NORM,
        select,
        screen,
        salt=_salt(exact, latency, settings, needs, kept),
        batch_norm=settings.batch_norm,
        moments=any("outputs" in strategy.needs_spectra for strategy in strategies),
        memory=settings.memory,
        seed=seed,
        report=report,
        phases=phases,
    ).factorised(
        partial(uniform_space, budgets=budgets, latency=latency),
        any(s.needs_losses for s in strategies),
    )
    if latency is not None:
        latency = latency.restrict(
            {name: layer.choices for name, layer in factorisation.space.layers.items()}
        )
    with limited_by(None):  # an answer needs them
        problems = _problems(factorisation, losses, task, budgets, objectives, latency)
        evaluator = Evaluator(
            factorisation,
            task,
            splits.calibration,
            splits.validation,
            objectives,
            extra_costs=None if latency is None else partial(_predicted, latency),
            batch_norm=settings.batch_norm,
            batch_size=sizes.batch_size,
            device=device,
            low_memory=factorisation.streamed,
            sequential=settings.sequential,
            recovery=recovery,
            screened=sizes.screening,
            refiner=None
            if settings.refine is None
            else Refiner(splits.training, task, settings.refine, seed, report),
            parts=PARTS if settings.early_stopping else (1.0,),
            phases=phases,
            report=report,
        )
    context = SearchContext(
        factorisation, splits, evaluator, task, device, seed, report, phases, complete
    )
    return context, problems


def _settled(settings: Settings, strategies: Sequence[Strategy]) -> Settings:
    """The settings with the one norm of all strategies, if they name none."""
    settled = {settings.of(strategy).norm: settings.of(strategy) for strategy in strategies}
    if len(settled) > 1:
        raise UsageError(
            f"the strategies have different norms, {', '.join(map(str, settled))}; prepare them "
            "one after the other, or give `norm`."
        )
    return next(iter(settled.values()), settings)


def requests(
    data: Data,
    budgets: Sequence[Mapping[str, float]],
    objectives: Sequence[ObjectiveBase],
    settings: Settings,
) -> list[Request]:
    """One request to a strategy for each budget; known before any work is done."""
    names = [o.name for o in objectives]
    training = len(data.train) - held_out(data, settings.sizes(data).validation)
    return [Request(b, names, training) for b in budgets]


def _recovery(splits: Splits, task: Task, settings: Settings, seed: int) -> Recovery | None:
    """The training of every trial's network, with its samples in memory."""
    if settings.recovery is None:
        return None
    recovery = Recovery.of(splits, task, settings.recovery, seed, settings.recovery_samples)
    return replace(recovery, data=recovery.data.kept())


def _in_time(
    measured: Callable[[SearchSpace], tuple[SearchSpace, LatencyTables]],
    space: SearchSpace,
    start: Sequence[Allocation],
    *,
    budgeted: bool,
) -> tuple[SearchSpace, LatencyTables]:
    """Latency tables of a space; of a few choices alone if the active deadline passes.

    Args:
        measured: Measures the choices of a space.
        space: The space.
        start: Allocations whose choices are kept.
        budgeted: Whether a budget bounds latency. Only then an answer needs latency tables.

    Raises:
        TimeLimitError: The active deadline has passed, and no answer needs the tables.
    """
    try:
        return measured(space)
    except TimeLimitError:
        if not budgeted:
            raise
    with limited_by(None):
        return measured(sparse_space(space, start))


def _latency(
    model: nn.Module,
    example: Inputs,
    settings: Settings,
    hardware: str | HardwareModel,
    report: Progress,
    start: Sequence[Allocation],
    space: SearchSpace,
) -> tuple[SearchSpace, LatencyTables]:
    """Latency tables, and the space without the choices that the policy drops for their latency.

    Args:
        model: The dense model.
        example: The model's arguments for one sample.
        settings: The batch size and the tokens that count, and the policy.
        hardware: A name or a `HardwareModel`.
        report: Called with the stage ``time``.
        start: Allocations whose choices are kept.
        space: The model's space.

    Raises:
        TimeLimitError: The active deadline has passed.
    """
    asked = space
    if settings.latency_tokens is not None:
        example = first_tokens(model, example, settings.latency_tokens)
        asked = space_of_tokens(model, space, example)
    asked = asked.at_batch(settings.latency_batch * space.batch_size)
    predictor = make_hardware(hardware, strict=settings.strict_hardware)

    def on_step(done: int, total: int) -> None:
        report("time", done, total)
        check_time()

    bound = predictor.bind(model, asked, example, on_step)
    latency = compile_latency(bound, asked)
    kept = {}
    for name, layer in space.layers.items():
        found = {*hardware_choices(layer, latency.seconds[name].tolist(), settings.policy)}
        found |= {allocation[name] for allocation in start}
        kept[name] = tuple(choice for choice in layer.choices if choice in found)
    return space.restrict(kept), latency.restrict(kept)


def _selection(
    exact: Sequence[str],
    latency: LatencyTables | None,
    timed: bool,
    most: int,
    needs: Sequence[tuple[tuple[str, ...] | None, bool]],
    stay: Mapping[str, set[Choice]],
) -> tuple[Select, Screen]:
    """Select the choices of a layer that no other choice dominates in error and costs.

    Args:
        exact: Exact costs that budgets bound or objectives measure.
        latency: Latency tables, if any.
        timed: Whether a budget bounds latency or an objective measures it.
        most: The largest number of choices to keep for each need.
        needs: By strategy, its operators (None for all), and whether it needs latency although no
            budget bounds it. Choices are selected for each need separately.
        stay: By layer, choices that are kept, whatever they cost.

    Returns:
        The selection by errors, and the screen by estimates of them.
    """

    def tables(layer: Layer) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Positions of the choices of each need, and their costs."""
        for operators, needs_latency in needs:
            costs: list[Sequence[float]] = [[c[name] for c in layer.costs] for name in exact]
            costs = costs or [[c["macs"] for c in layer.costs]]
            if latency is not None and (needs_latency or timed):
                costs.append(latency.seconds[layer.name].tolist())
            rows = [
                i
                for i, c in enumerate(layer.choices)
                if operators is None or c == DENSE or c.operator in operators
            ]
            yield rows, [[cost[i] for i in rows] for cost in costs]

    def keep(
        layer: Layer, found: Callable[..., list[int]], *errors: Sequence[float]
    ) -> list[Choice]:
        kept = set(stay[layer.name])
        for rows, costs in tables(layer):
            chosen = found(*([column[i] for i in rows] for column in errors), costs)
            kept |= {layer.choices[rows[i]] for i in chosen}
        return [c for c in layer.choices if c in kept]

    def select(layer: Layer, errors: Sequence[float]) -> list[Choice]:
        return keep(layer, partial(pareto_filter, most=most), errors)

    def screen(layer: Layer, errors: Sequence[float], estimates: Sequence[float]) -> list[Choice]:
        return keep(layer, pareto_screen, errors, estimates)

    return select, screen


def _operators(
    space: SearchSpace, strategies: Sequence[Strategy], settings: Settings
) -> SearchSpace:
    """The space of a large linear model with ``svd`` alone, if nobody has named operators.

    In SmolLM2-135M grouped decompositions have smaller errors only where a layer keeps more than
    0.8 of its parameters, and they multiply the time and the memory by three.
    """
    named = settings.policy.operators != RankPolicy().operators
    if named or any(strategy.operators is not None for strategy in strategies):
        return space
    if not exceeds(space, settings.norm or NORM, settings.memory):
        return space
    logger.info("the operator is svd: others rarely win in large linear layers")
    return space.restrict(
        {
            name: [choice for choice in layer.choices if choice.operator == "svd"]
            for name, layer in space.layers.items()
        }
    )


def _salt(
    exact: Sequence[str],
    latency: LatencyTables | None,
    settings: Settings,
    needs: Sequence[tuple[tuple[str, ...] | None, bool]],
    stay: Mapping[str, set[Choice]],
) -> str:
    """What the selection of choices depends on, besides their errors."""
    seconds = {} if latency is None else {n: t.tolist() for n, t in latency.seconds.items()}
    kept = {name: sorted(choices) for name, choices in stay.items()}
    return f"{list(exact)} {settings.choices} {list(needs)} {kept} {seconds}"


def _exact(names: set[str]) -> list[str]:
    """The costs of a layer among those that budgets bound or objectives measure."""
    wanted = [LAYER_COSTS.get(name, name) for name in EXACT_COSTS if name in names]
    return list(dict.fromkeys(wanted))  # of one layer, both counts are equal


def _problems(
    factorisation: Factorisation,
    losses: Mapping[str, Sequence[float]],
    task: Task,
    budgets: Sequence[Mapping[str, float]],
    objectives: Sequence[ObjectiveBase],
    latency: LatencyTables | None,
) -> tuple[Problem, ...]:
    """One problem for each budget; raises a BudgetError if nothing can meet it."""
    errors = factorisation.errors()
    named = [(o.name, o.direction) for o in objectives]
    problems = tuple(
        build_problem(
            factorisation.space,
            errors,
            budget,
            latency=latency,
            objectives=named,
            task=task,
            losses=losses,
            streamed=factorisation.streamed,
        )
        for budget in budgets
    )
    for problem in problems:
        problem.check()
    return problems


def _predicted(latency: LatencyTables, allocation: Mapping[str, Choice]) -> dict[str, float]:
    """Seconds of the whole network with their standard deviation, and joules if known."""
    seconds, sigma = latency.predict(allocation)
    costs = {"predicted_latency": seconds, "predicted_latency_std": sigma}
    energy = latency.predict_energy(allocation)
    return costs if energy is None else {**costs, "predicted_energy": energy}
