"""``ranknas search``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import typer
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.cli.interrupts import interruptible
from rankNAS.cli.loading import (
    check_options,
    check_writable,
    load_model,
    load_named_data,
    load_space,
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
from rankNAS.cli.starting import keep_start, start_allocations
from rankNAS.data.base import Data
from rankNAS.engine import search
from rankNAS.exceptions import StudyError
from rankNAS.io.files import write_json
from rankNAS.io.formats import current_format
from rankNAS.objectives import make_objective
from rankNAS.pipeline import requests
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.settings import Settings
from rankNAS.storage.redaction import redacted, without_password
from rankNAS.storage.store import study_names
from rankNAS.strategies import make_strategy
from rankNAS.strategies.history import Trial
from rankNAS.study import Study

__all__ = ["run_search"]


def run_search(options: SearchOptions, control: SearchControl) -> None:
    """Run a search: search, test, fine-tune, write files and print."""
    started = time.perf_counter()
    options = options.named(control.resume)
    if control.resume:
        _check_resumable(options)
    settings = check_options(options)
    strategy = make_strategy(options.strategy)
    check_writable(options.folder)
    start = start_allocations(options)
    with progress_display(control.quiet) as progress, interruptible():
        data = load_named_data(options)
        measured = [make_objective(o) for o in options.objective]
        for request in requests(data, options.budgets, measured, settings):
            strategy.check(request)
        space = load_space(options, data, settings)
        for allocation in start:
            space.check(allocation)
        model = load_model(options, data, settings, space, options.seed, progress)
        study = _search(options, settings, data, model, space, progress, control.resume, start)
        progress.say("testing the dense network and the compressed ones")
        result = keep(options, study, model, progress)
    result["seconds"] = round(time.perf_counter() - started, 2)
    write_json(options.folder / "result.json", result)
    if control.json:
        print_json(result)
    else:
        _print(options, result)


def _check_resumable(options: SearchOptions) -> None:
    """Raise a StudyError if a study has an older format, or its storage no longer contains it."""
    if not (options.folder / CONFIGURATION).is_file():
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


def _search(
    options: SearchOptions,
    settings: Settings,
    data: Data,
    model: nn.Module,
    space: SearchSpace,
    progress: ProgressDisplay,
    resume: bool,
    start: Sequence[Allocation],
) -> Study:
    folder, best = options.folder, _Best(options)
    fresh = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        study = search(
            model,
            data,
            objectives=options.objective,
            budget=options.budgets,
            strategy=options.strategy,
            n_trials=options.trials,
            storage=options.storage_url,
            name=options.study or "",
            seed=options.seed,
            resume=resume,
            start=start,
            settings=settings,
            hardware=options.hardware,
            space=space,
            device=options.device,
            workers=workers_of(options),
            on_progress=progress.stage,
            on_record=lambda: _keep_options(options, start),
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
    study.model = {
        "space": options.space,
        "num_classes": data.num_classes,
        "input_shape": list(data.input_shape),
    }
    return study


def _keep_options(options: SearchOptions, start: Sequence[Allocation]) -> None:
    """Write the files needed to resume; the options last, as they mark the folder as a study."""
    keep_start(options, start)
    write_options(options.folder / CONFIGURATION, options)


class _Best:
    """The best trial of each budget so far, for the message at an interrupt."""

    def __init__(self, options: SearchOptions) -> None:
        self.objective = options.objective[0]
        self.trials: dict[str, Trial] = {}

    def lines(self) -> list[str]:
        """One line per budget."""
        return [
            f"best so far for {target}: trial {trial.number}, "
            f"{self.objective} {trial.values[0]:.4f}, MACs {number(trial.metrics['macs'])}"
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
        note = "" if best is None else f"best {options.objective[0]} {best.values[0]:.4f}"
        note += f" at {trial.budget_key}" if len(options.budgets) > 1 else ""
        # A resumed study has probes and trials of other budgets, which are not counted above.
        progress.stage("trials", done, max(done, total), note)

    return on_trial


def _print(options: SearchOptions, result: dict[str, Any]) -> None:
    dense, solutions = result["dense"], result["solutions"]
    rows = [
        [
            name.replace("_", " "),
            f"{dense[name]:.4f}",
            *(f"{a['best'][name]:.4f}" for a in solutions),
        ]
        for name in ("accuracy", "test_accuracy")
    ]
    if options.finetune:
        rows += [
            [f"fine-tuned, {name.replace('_', ' ')}", ""]
            + [f"{a['finetuned'][name]:.4f}" for a in solutions]
            for name in ("accuracy", "test_accuracy")
        ]
    costs = ("macs", "params", "weight_bytes", "predicted_latency")
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
    for solution in solutions:
        typer.echo(f"network  {solution['artifact']}")
    typer.echo(f"details  ranknas show {result['study']} --out {options.out}")
