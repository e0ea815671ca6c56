"""``ranknas search``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.cli.interrupts import interruptible
from rankNAS.cli.loading import (
    check_options,
    check_writable,
    chosen_recipe,
    load_model,
    load_named_data,
    load_space,
    load_task,
    named_strategy,
    untrained_model,
    within_context,
    workers_of,
)
from rankNAS.cli.options.command import reproduction
from rankNAS.cli.options.search import CONFIGURATION, SearchControl, SearchOptions
from rankNAS.cli.options.stored import options_format, write_options
from rankNAS.cli.output import (
    ProgressDisplay,
    number,
    percent,
    print_json,
    print_table,
    progress_display,
)
from rankNAS.cli.results import keep
from rankNAS.cli.started import deadline_of
from rankNAS.cli.starting import keep_start, start_allocations
from rankNAS.data.base import Data
from rankNAS.deadline import Deadline
from rankNAS.decompositions.shapes import LAYER_COSTS
from rankNAS.engine import objectives_of, search
from rankNAS.exceptions import StudyError, UsageError
from rankNAS.io.files import read_json, write_json
from rankNAS.io.formats import current_format
from rankNAS.objectives import ObjectiveBase
from rankNAS.pipeline import requests
from rankNAS.recovery.config import affordable_training
from rankNAS.reporting.metrics import metric_name, metric_text, quality_names
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.settings import Settings
from rankNAS.storage.redaction import redacted, without_password
from rankNAS.storage.store import study_names
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.history import Trial
from rankNAS.study import Study
from rankNAS.tasks.base import Task

__all__ = ["run_search"]


def run_search(options: SearchOptions, control: SearchControl) -> None:
    """Run a search: search, test, fine-tune, write files and print."""
    started, deadline = time.perf_counter(), deadline_of(control.time_limit)
    options = options.named(control.resume)
    if control.resume:
        _check_resumable(options)
    settings = check_options(options)
    strategy = named_strategy(options.strategy, options)
    check_writable(options.folder)
    start = start_allocations(options)
    with (
        progress_display(control.quiet) as progress,
        interruptible(),
        redirect_stdout(sys.stderr),  # what the user's own code prints; stdout is for results
    ):
        data = load_named_data(options)
        if settings.recovery is not None:
            recovery = affordable_training(settings.recovery, data.train)
            settings = replace(settings, recovery=recovery)
        untrained = untrained_model(options, data)
        data = within_context(options, data, untrained)
        task = load_task(options, data, untrained, progress)
        measured = objectives_of(options.objective or None, task)
        if (recipe := chosen_recipe(options)) is not None:
            recipe.check(task)
        for request in requests(data, options.budgets, measured, settings):
            strategy.check(request)
        space = load_space(options, data, untrained, task, settings)
        for allocation in start:
            space.check(allocation)
        del untrained  # the weights of a folder, perhaps; they are loaded again below
        model = load_model(options, data, task, settings, space, options.seed, progress)
        arguments = _Arguments(
            task, measured, settings, data, model, space, strategy, control.resume, start, deadline
        )
        study = _search(options, arguments, progress)
        progress.say("testing the dense network and the compressed ones")
        result = keep(options, study, model, progress, deadline)
    result["seconds"] = round(time.perf_counter() - started, 2)
    write_json(options.folder / "result.json", result)
    if control.json:
        print_json(result)
    else:
        _print(options, result)
    if failures := [s["failed"] for s in result["solutions"] if "failed" in s]:
        raise UsageError(f"{failures[0]} The networks from before it are kept.")


def _check_resumable(options: SearchOptions) -> None:
    """Raise a StudyError if a study has an older format, or its storage no longer contains it."""
    if not (options.folder / CONFIGURATION).is_file():
        return
    if _never_begun(options.folder):
        return
    found, current = options_format(options.folder), current_format("options")
    if found < current:
        raise StudyError(
            f"study {options.study!r} was made by an older version of RankNAS (format {found}; "
            f"this version continues format {current}). Start anew from its best allocation with: "
            f"{reproduction(replace(options, start=str(options.folder)))}"
        )
    if options.study not in study_names(options.storage_url):
        raise StudyError(
            f"the study storage {redacted(options.storage_url)!r} has no study {options.study!r}, "
            f"although {str(options.folder)!r} says that it was begun; give the right one with "
            "--storage, or remove the folder to begin again."
        )


def _never_begun(folder: Path) -> bool:
    """Whether a time limit ended the study before its first trial could be proposed."""
    try:
        return bool(read_json(folder / "result.json").get("unprepared"))
    except (OSError, ValueError, AttributeError):
        return False


@dataclass(frozen=True, eq=False)
class _Arguments:
    """The arguments of `search` that are made from the options."""

    task: Task
    objectives: Sequence[ObjectiveBase]
    settings: Settings
    data: Data
    model: nn.Module
    space: SearchSpace
    strategy: Strategy
    resume: bool
    start: Sequence[Allocation]
    deadline: Deadline | None


def _search(options: SearchOptions, given: _Arguments, progress: ProgressDisplay) -> Study:
    folder, best = options.folder, _Best(given.objectives[0].name)
    fresh = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        study = search(
            given.model,
            given.data,
            task=given.task,
            objectives=given.objectives,
            budget=options.budgets,
            strategy=given.strategy,
            n_trials=options.trials,
            storage=options.storage_url,
            name=options.study or "",
            seed=options.seed,
            resume=given.resume,
            start=given.start,
            settings=given.settings,
            hardware=options.hardware,
            space=given.space,
            device=options.device,
            workers=workers_of(options),
            time_limit=given.deadline,
            on_progress=progress.stage,
            on_record=lambda: _keep_options(options, given.start),
            on_trial=_counting(options, progress, best),
        )
    except KeyboardInterrupt:
        resume_with = f"ranknas resume {options.study} --out {options.out}"
        if options.storage and without_password(options.storage) != options.storage:
            resume_with += " --storage URL"  # its password is not stored
        progress.insist(*best.lines())
        progress.insist(f"interrupted; finished trials are kept. Go on with: {resume_with}")
        sys.exit(130)
    finally:
        with suppress(OSError):  # remove the files of a search that never started
            for path in fresh:
                path.rmdir()
    count = len(study.trials)  # a strategy may propose fewer than requested
    progress.stage("trials", count, count)
    shape = given.data.input_shape
    study.model = {
        "space": options.space,
        "num_classes": given.data.num_classes,
        "input_shape": None if shape is None else list(shape),
    }
    return study


def _keep_options(options: SearchOptions, start: Sequence[Allocation]) -> None:
    """Write the files needed to resume; the options last, as they mark the folder as a study."""
    keep_start(options, start)
    write_options(options.folder / CONFIGURATION, options)


class _Best:
    """The best trial of each budget so far, for the message at an interrupt."""

    def __init__(self, objective: str) -> None:
        self.objective = objective
        self.trials: dict[str, Trial] = {}

    def lines(self) -> list[str]:
        """One line per budget."""
        return [
            f"best so far for {target}: trial {trial.number}, {self.objective} "
            f"{metric_text(trial.values[0])}, MACs {number(trial.metrics['macs'])}"
            for target, trial in self.trials.items()
        ]


def _counting(
    options: SearchOptions, progress: ProgressDisplay, found: _Best
) -> Callable[[Trial, Trial | None], None]:
    """Callback that shows the trials of all budgets in one bar; each probe extends its total."""
    total = options.trials * len(options.budgets)

    def on_trial(trial: Trial, best: Trial | None) -> None:
        nonlocal total
        total += trial.probe
        done = trial.number + 1
        if best is not None:
            found.trials[trial.budget_key] = best
        note = "" if best is None else f"best {found.objective} {metric_text(best.values[0])}"
        note += f" at {trial.budget_key}" if len(options.budgets) > 1 else ""
        # A resumed study has probes and trials of other budgets, which are not counted above.
        progress.stage("trials", done, max(done, total), note)

    return on_trial


def _print(options: SearchOptions, result: dict[str, Any]) -> None:
    dense, solutions = result["dense"], result["solutions"]
    names = quality_names(result)
    rows = [
        [
            metric_name(name),
            *(metric_text(n[name]) for n in (dense, *(a["best"] for a in solutions))),
        ]
        for name in names
    ]
    if options.finetune or options.recover:
        done = "fine-tuned" if options.finetune else "recovered"
        rows += [
            [f"{done}, {metric_name(name)}", ""]
            + [metric_text(a.get("finetuned", {}).get(name)) for a in solutions]
            for name in names
        ]
    bounded = [name for a in solutions for name in a["budget"] if name in LAYER_COSTS]
    costs = ("macs", "params", *dict.fromkeys(bounded), "weight_bytes", "predicted_latency")
    rows += [
        [name, percent(dense, dense, name), *(percent(a["best"], dense, name) for a in solutions)]
        for name in costs
        if name in dense
    ]
    columns = ["", "dense", *(a["budget_key"] if a["budget"] else "no budget" for a in solutions)]
    print_table(str(result["study"]), columns, rows)
    probes = sum(t["probe"] for t in result["trials"])
    trials = f"{len(result['trials']) - probes} trials" + f" and {probes} probes" * bool(probes)
    typer.echo(f"{trials}, {result['seconds']:.0f} s")
    for note in result["notes"]:
        typer.echo(note)
    for solution in solutions:
        typer.echo(f"network  {solution['artifact']}")
    typer.echo(f"details  ranknas show {result['study']} --out {options.out}")
