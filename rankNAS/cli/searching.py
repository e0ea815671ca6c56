"""``ranknas search`` and ``ranknas resume``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import typer
from torch import nn

from rankNAS.cli.loading import (
    check_options,
    check_writable,
    load_model,
    load_named_data,
    load_space,
)
from rankNAS.cli.options import SearchOptions, read_options, study_folder
from rankNAS.cli.output import Reporter, percent, print_json, print_table, reporting
from rankNAS.cli.results import keep
from rankNAS.data import Data
from rankNAS.engine import Settings, requests, search
from rankNAS.exceptions import UsageError
from rankNAS.files import write_json
from rankNAS.objectives import make_objective
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.strategies import make_strategy
from rankNAS.strategies.base import Trial
from rankNAS.study import Study

__all__ = ["run_resume", "run_search"]


def run_resume(
    study: str,
    out: str,
    trials: int | None,
    budget: Sequence[str],
    *,
    trust_study: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Go on with a study from the options in its folder; other budgets bound the same costs."""
    options = read_options(study_folder(study, out))
    if (code := options.code()) and not trust_study:
        raise UsageError(
            f"the study's options name Python files ({', '.join(code)}), whose code would run; "
            "add --trust-study if you trust them."
        )
    if trials is not None:
        options = replace(options, trials=trials)
    if budget:
        options = replace(options, budget=list(budget))
    run_search(options, resume=True, as_json=as_json, quiet=quiet)


def run_search(options: SearchOptions, *, resume: bool, as_json: bool, quiet: bool) -> None:
    """Search, test, fine-tune, keep and print."""
    started = time.perf_counter()
    options = options.named(resume)
    settings = check_options(options)
    strategy = make_strategy(options.strategy)
    check_writable(options.folder)
    with reporting(quiet) as reporter:
        data = load_named_data(options)
        measured = [make_objective(o) for o in options.objective]
        for request in requests(data, options.budgets, measured, settings):
            strategy.check(request)
        space = load_space(options, data, settings)
        model = load_model(options, data, settings, space, options.seed, reporter)
        study = _search(options, settings, data, model, space, reporter, resume)
        reporter.say("testing the dense network and the compressed ones")
        result = keep(options, study, model, reporter)
    result["seconds"] = round(time.perf_counter() - started, 2)
    write_json(options.folder / "result.json", result)
    if as_json:
        print_json(result)
    else:
        _print(options, result)


def _search(
    options: SearchOptions,
    settings: Settings,
    data: Data,
    model: nn.Module,
    space: SearchSpace,
    reporter: Reporter,
    resume: bool,
) -> Study:
    folder = options.folder
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
            settings=settings,
            hardware=options.hardware,
            space=space,
            device=options.device,
            on_progress=reporter.stage,
            on_record=lambda: write_json(folder / "config.json", options.to_json()),
            on_trial=_counting(options, reporter),
        )
    except KeyboardInterrupt:
        resume_with = f"ranknas resume {options.study} --out {options.out}"
        reporter.say(f"interrupted; finished trials are kept. Go on with: {resume_with}")
        sys.exit(130)
    finally:
        with suppress(OSError):  # nothing is left of a search that never began
            for path in fresh:
                path.rmdir()
    count = len(study.trials)  # a strategy may have proposed fewer than were asked for
    reporter.stage("trials", count, count)
    study.model = {
        "space": options.space,
        "num_classes": data.num_classes,
        "input_shape": list(data.input_shape),
    }
    return study


def _counting(options: SearchOptions, reporter: Reporter) -> Callable[[Trial, Trial | None], None]:
    """Shows the trials of all budgets in one bar, which grows by every probe."""
    total = options.trials * len(options.budgets)

    def on_trial(trial: Trial, best: Trial | None) -> None:
        nonlocal total
        total += trial.probe
        done = trial.number + 1
        note = "" if best is None else f"best {options.objective[0]} {best.values[0]:.4f}"
        note += f" at {trial.target}" if len(options.budgets) > 1 else ""
        # A resumed study has probes and trials of other budgets that were not counted above.
        reporter.stage("trials", done, max(done, total), note)

    return on_trial


def _print(options: SearchOptions, result: dict[str, Any]) -> None:
    dense, answers = result["dense"], result["answers"]
    rows = [
        [
            name.replace("_", " "),
            f"{dense[name]:.4f}",
            *(f"{a['best'][name]:.4f}" for a in answers),
        ]
        for name in ("accuracy", "test_accuracy")
    ]
    if options.finetune:
        rows += [
            [f"fine-tuned, {name.replace('_', ' ')}", ""]
            + [f"{a['finetuned'][name]:.4f}" for a in answers]
            for name in ("accuracy", "test_accuracy")
        ]
    costs = ("macs", "params", "weight_bytes", "predicted_latency")
    rows += [
        [name, percent(dense, dense, name), *(percent(a["best"], dense, name) for a in answers)]
        for name in costs
        if name in dense
    ]
    columns = ["", "dense", *(a["label"] if a["budget"] else "no budget" for a in answers)]
    print_table(str(result["study"]), columns, rows)
    probes = sum(t["probe"] for t in result["trials"])
    trials = f"{len(result['trials']) - probes} trials" + f" and {probes} probes" * bool(probes)
    typer.echo(f"{trials}, {result['seconds']:.0f} s")
    for answer in answers:
        typer.echo(f"network  {answer['artifact']}")
    typer.echo(f"details  ranknas show {result['study']} --out {options.out}")
