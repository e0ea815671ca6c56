"""Output files of a search: the networks, a table of the trials, ``result.json``."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.budget import parse_budget
from rankNAS.cli.fronts import describe_front
from rankNAS.cli.layers import describe_layers
from rankNAS.cli.loading import chosen_recipe
from rankNAS.cli.measuring import concerns_latency, measure
from rankNAS.cli.options.search import SearchOptions
from rankNAS.cli.options.stored import parsing_context
from rankNAS.cli.output import ProgressDisplay
from rankNAS.copies import copied
from rankNAS.deadline import Deadline, TimeLimitError, limited_by
from rankNAS.exceptions import UsageError
from rankNAS.fallback import UNNUMBERED
from rankNAS.io.files import save_atomically, write_json
from rankNAS.io.formats import FORMAT, current_format, upgraded
from rankNAS.recovery.recipe import Recipe
from rankNAS.reporting.environment import machine, versions
from rankNAS.strategies.history import Trial
from rankNAS.strategies.problem import Problem
from rankNAS.study import Study

__all__ = ["solution_for", "describe_trial", "keep", "load_result"]

WORSE = 0.01  # relative change of the main metric from which a training has made a network worse


def keep(
    options: SearchOptions,
    study: Study,
    model: nn.Module,
    progress: ProgressDisplay,
    deadline: Deadline | None = None,
) -> dict[str, Any]:
    """Write the artifacts and return the result document.

    The deadline only ends fine-tuning: a network whose fine-tuning does not end in time is kept as
    it was before.

    The document contains one entry of ``solutions`` per budget. The entries of the first budget's
    solution are also at its top level.
    """
    trials = study.to_pandas()
    save_atomically(options.folder / "trials.csv", lambda path: trials.to_csv(path, index=False))
    dense_test = _tested(study, copied(model))
    solutions = [
        _solution(options, study, problem, model, progress, deadline) for problem in study.problems
    ]
    dense = _summary(study, study.dense, dense_test)
    if concerns_latency(study):
        progress.say("timing the dense network and the compressed ones")
        chosen = [study.solution(p).allocation for p in study.problems]
        times = measure(study, chosen, options.latency_batch, options.latency_tokens)
        for summary, found in zip([dense, *(a["best"] for a in solutions)], times, strict=True):
            summary["measured_latency"] = found
    return {
        FORMAT: current_format("result"),
        "study": options.study,
        "strategy": options.strategy,
        **study.model,
        "task": study.task.name,
        "metrics": list(study.task.directions),
        "cost": options.cost,
        "objectives": list(study.problem.objectives),
        "directions": list(study.problem.directions),
        "dense": dense,
        **solutions[0],
        "solutions": solutions,
        "trials": [describe_trial(t) for t in study.trials],
        "cpu_seconds": {name: round(s, 3) for name, s in study.cpu_seconds.items()},
        "notes": [
            *filter(None, [study.limit_note]),
            *_untuned(options, solutions, deadline),
            *_worse(study, solutions),
        ],
        "unprepared": not study.context.complete,
        "versions": versions(),
        "machine": machine(),
    }


def _solution(
    options: SearchOptions,
    study: Study,
    problem: Problem,
    model: nn.Module,
    progress: ProgressDisplay,
    deadline: Deadline | None,
) -> dict[str, Any]:
    """The trial chosen for one budget; saves, tests and fine-tunes its network."""
    suffix = f"-{_safe(problem.budget_key)}" if len(study.problems) > 1 else ""
    chosen = study.solution(problem)
    network = study.materialise(chosen.allocation)
    labels = chosen.allocation.labels()
    write_json(options.folder / f"best{suffix}.json", labels)
    path = options.folder / f"best{suffix}.safetensors"
    artifact = study.save(path, chosen.allocation, network)
    layers = study.evaluator.factorisation.space.layers
    solution: dict[str, Any] = {
        "budget": dict(problem.budget),
        "budget_key": problem.budget_key,
        "trial": None if chosen.number == UNNUMBERED else chosen.number,
        "best": _summary(study, study.metrics_of(chosen, network), _tested(study, network))
        | {"allocation": labels},
        **describe_front(problem, study.history),
        "layers": describe_layers(problem, layers, chosen.allocation),
        "artifact": str(artifact),
    }
    recipe = chosen_recipe(options)
    if recipe is not None and not (deadline is not None and deadline.passed):
        try:
            tuned = _recovered(
                recipe,
                options,
                study,
                model,
                network,
                chosen.allocation,
                suffix,
                progress,
                deadline,
            )
        except TimeLimitError:
            return solution
        except UsageError as error:  # the result so far is kept before the error is shown
            return solution | {"failed": str(error)}
        path = options.folder / f"finetuned{suffix}.safetensors"
        artifact = study.save(path, chosen.allocation, network.cpu())
        solution["finetuned"] = tuned | {"artifact": str(artifact)}
        solution["artifact"] = str(artifact)
    return solution


def _untuned(
    options: SearchOptions, solutions: Sequence[Mapping[str, Any]], deadline: Deadline | None
) -> list[str]:
    """Says whose fine-tuning the time limit has ended."""
    wanted = options.finetune or options.recover
    left = [s["budget_key"] for s in solutions if wanted and not {"finetuned", "failed"} & {*s}]
    cut = [s["budget_key"] for s in solutions if s.get("finetuned", {}).get("stopped")]
    if deadline is None or not left:
        return [f"the time ended the recovery for {'; '.join(cut)}"] * bool(cut)
    return [
        f"the time limit of {deadline.seconds:g} s ended the fine-tuning for {'; '.join(left)}; "
        "the network is kept as it was before"
    ]


def _worse(study: Study, solutions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says which trainings have made a network clearly worse, and where the one before is."""
    main, found = study.task.main_metric, list[str]()
    sign = 1 if study.task.directions[main] == "maximize" else -1
    for solution in solutions:
        after = solution.get("finetuned", {}).get(main)
        before = solution["best"].get(main)
        if after is None or before is None or sign * (before - after) <= WORSE * abs(before):
            continue
        path = Path(solution["artifact"])
        kept = path.with_name(path.name.replace("finetuned", "best"))
        found.append(
            f"the training has made the network for {solution['budget_key']} worse ({main} "
            f"{before:.4g}, then {after:.4g}); the one before it is {str(kept)!r}; train for "
            "longer, or with a lower learning rate"
        )
    return found


def _safe(label: str) -> str:
    """A budget's label as part of a file name: ``macs<=0.5`` becomes ``macs-0.5``."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", label)


def _recovered(
    recipe: Recipe,
    options: SearchOptions,
    study: Study,
    model: nn.Module,
    network: nn.Module,
    allocation: Allocation,
    suffix: str,
    progress: ProgressDisplay,
    deadline: Deadline | None,
) -> dict[str, Any]:
    """Train a chosen network in place and measure it like the others.

    Raises:
        TimeLimitError: A fine-tuning does not end in time.
        UsageError: The recipe does not fit, the loss is not finite, or the time is too short.
    """
    started = time.perf_counter()
    stage = "finetune" if options.finetune else "recover"
    members: list[dict[str, Any]] = []

    def on_member(number: int) -> None:
        with limited_by(None):
            path = options.folder / f"member{number}{suffix}.safetensors"
            members.append(study.save_member(path, allocation, network))

    with limited_by(deadline):
        report = study.recover(
            network,
            model,
            recipe,
            keeps_best=not options.finetune,
            on_member=on_member,
            on_step=lambda step, total, loss: progress.stage(
                stage, step, total, f"loss {loss:.3f}"
            ),
        )
    seconds = time.perf_counter() - started
    validation = study.measure(network, study.splits.validation)
    return {
        "epochs": recipe.epochs,
        "recipe": str(recipe),
        "steps": report.steps,
        "stopped": report.stopped,
        **_summary(study, validation, _tested(study, network)),
        "seconds": round(seconds, 2),
        **({"members": members} if members else {}),
    }


def _tested(study: Study, network: nn.Module) -> dict[str, float]:
    """The metrics of a network on the test data; empty if there are none."""
    return {} if study.splits.test is None else study.test(network)


def _summary(
    study: Study, metrics: Mapping[str, Any], test: Mapping[str, float]
) -> dict[str, Any]:
    """All metrics of a network, those of the test data as ``test_NAME``; the main ones first."""
    main = study.task.main_metric
    tested = {f"test_{name}": value for name, value in test.items()}
    named = {name: {**metrics, **tested}.get(name) for name in (main, f"test_{main}")}
    return {k: v for k, v in {**named, **metrics, **tested}.items() if v is not None}


def describe_trial(trial: Trial) -> dict[str, Any]:
    """A trial of the result document."""
    return {
        "number": trial.number,
        "state": trial.state,
        "probe": trial.probe,
        "budget_key": trial.budget_key,
        "values": list(trial.values),
        "metrics": dict(trial.metrics),
        "allocation": trial.allocation.labels(),
        "seconds": round(trial.seconds, 3),
        **({"reason": trial.reason} if trial.reason else {}),
        **({"weights": trial.weights} if trial.weights else {}),
    }


def load_result(folder: Path) -> dict[str, Any]:
    """The result document of a finished search.

    Raises:
        UsageError: The search has not finished.
    """
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        raise UsageError(
            f"study {folder.name!r} has no result yet; go on with: ranknas resume {folder.name} "
            f"--out {folder.parent}"
        ) from None
    with parsing_context(folder / "result.json"):
        return upgraded("result", result, f"the result {str(folder / 'result.json')!r}")


def solution_for(result: Mapping[str, Any], budget: list[str]) -> dict[str, Any]:
    """The solution of a study for one of its budgets; for the first if none is given.

    Raises:
        UsageError: The study has no such budget.
    """
    solutions: list[dict[str, Any]] = result["solutions"]
    if not budget:
        return solutions[0]
    wanted = parse_budget(budget, result["cost"])
    for solution in solutions:
        if solution["budget"] == wanted:
            return solution
    known = "; ".join(solution["budget_key"] for solution in solutions)
    raise UsageError(
        f"`--budget` must be one of the study's budgets, {known}; got {' '.join(budget)}."
    )
