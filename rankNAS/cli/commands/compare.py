"""``ranknas compare``."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import typer

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
)
from rankNAS.cli.options.compare import CompareControl, CompareOptions
from rankNAS.cli.options.stored import current_options, write_options
from rankNAS.cli.output import print_json, print_table, progress_display
from rankNAS.cli.started import deadline_of
from rankNAS.comparison import compare
from rankNAS.engine import objectives_of
from rankNAS.exceptions import StudyError, UsageError
from rankNAS.io.files import read_json, save_atomically
from rankNAS.io.formats import BEFORE_TASKS
from rankNAS.reporting.comparison import draw, labels_note, markdown, noise_note, tables
from rankNAS.reporting.latex import latex
from rankNAS.reporting.metrics import metric_text
from rankNAS.reporting.rows import COLUMNS, DENSE_MODEL, OK, Row, with_current_columns
from rankNAS.reporting.significance import BlockSums, differences
from rankNAS.strategies import STRATEGIES

__all__ = ["run_compare"]

#: Folder of the sums of metrics over blocks of test items, for the intervals of a later session.
SUMS = "test-sums"
IMAGES = 1024  # samples by default, unless they are text
#: Options that a resumed comparison may change; all others must stay equal.
MAY_CHANGE = ("strategies", "seeds", "out", "device")


def run_compare(options: CompareOptions, control: CompareControl) -> None:
    """Compare strategies; rows already in the folder are kept."""
    deadline = deadline_of(control.time_limit)
    settings = check_options(options)
    strategies = {n: named_strategy(n, options) for n in _names(options.strategies)}
    folder = Path(options.out)
    check_writable(folder)
    earlier = _earlier(folder, options)
    kept: list[Any] = earlier.to_dict("records")
    sums = BlockSums(folder / SUMS)
    with progress_display(control.quiet) as progress:
        data = load_named_data(options)
        recipe = chosen_recipe(options)
        untrained = untrained_model(options, data)
        data = within_context(options, data, untrained)
        task = load_task(options, data, untrained, progress)
        objectives = objectives_of(options.objective or None, task)
        if recipe is not None:
            recipe.check(task)
        space = load_space(options, data, untrained, task, settings)

        def on_row(row: Row) -> None:
            kept.append(asdict(row))
            write_options(folder / "config.json", options)
            _write_csv(folder / "results.csv", pd.DataFrame(kept))
            progress.say(_line(row))

        try:
            rows = compare(
                lambda seed: load_model(options, data, task, settings, space, seed, progress),
                data,
                strategies,
                options.budgets,
                range(options.seeds),
                task=task,
                objectives=objectives,
                n_trials=options.trials,
                recipe=recipe,
                training_samples=options.finetune_samples,
                settings=settings,
                hardware=options.hardware,
                space=space,
                device=options.device,
                time_limit=deadline,
                block_sums=sums,
                earlier=earlier,
                on_row=on_row,
                on_progress=progress.stage,
            )
        except KeyboardInterrupt:
            progress.say("interrupted; finished rows are kept. The same command goes on.")
            sys.exit(130)
    found = differences(rows, sums, task)
    _finish(rows, found, options, as_json=control.json)


def _names(given: str) -> list[str]:
    names = list(STRATEGIES) if given == "all" else [name.strip() for name in given.split(",")]
    if len(set(names)) < len(names):
        raise UsageError(f"`--strategies` must have different names, got {', '.join(names)}.")
    return names


def _earlier(folder: Path, options: CompareOptions) -> pd.DataFrame:
    """The rows of an interrupted comparison with the same options that are ``ok``.

    Raises:
        StudyError: The folder holds a comparison with other options, or is damaged.
    """
    path = folder / "results.csv"
    if not path.exists():
        return pd.DataFrame(columns=list(COLUMNS))
    try:
        file = folder / "config.json"
        found = current_options(read_json(file), file)
        rows = with_current_columns(pd.read_csv(path))
    except StudyError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"the comparison in {str(folder)!r} is damaged ({error}); give another --out."
        ) from None
    given = options.to_json()
    if "task" not in found and not given["objective"]:
        # The file states the default of its time.
        given["objective"] = BEFORE_TASKS["metrics"][:1]
    for name in ("calibration", "validation"):  # files of before text state the default for images
        if given[name] is None and found.get(name) == IMAGES:
            given[name] = IMAGES
    # Options newer than the file had the effect of their defaults.
    stored = CompareOptions().to_json() | found
    for name in sorted({*stored, *given} - set(MAY_CHANGE)):
        if stored.get(name) != given.get(name):
            raise StudyError(
                f"{str(folder)!r} holds a comparison with another configuration: {name} was "
                f"{stored.get(name)!r}, is {given.get(name)!r}. Give the same options, or "
                "another --out."
            )
    return rows[(rows.status == OK) & (rows.note == "")]


def _write_csv(path: Path, rows: pd.DataFrame) -> None:
    save_atomically(path, lambda temporary: rows.to_csv(temporary, index=False))


def _line(row: Row) -> str:
    name = f"seed {row.seed}  {row.strategy}  {row.budget}"
    if row.status != OK:
        return f"{name}  {row.status}"
    tuned = row.finetuned_test
    split, value = ("validation", row.validation) if math.isnan(row.test) else ("test", row.test)
    return (
        f"{name}  {split} {metric_text(value)}"
        + ("" if math.isnan(tuned) else f", fine-tuned {metric_text(tuned)}")
        + f", {row.evaluations} evaluations, {row.search_seconds:.3g} s"
        + (f"; {row.note}" if row.note else "")
    )


def _finish(
    rows: pd.DataFrame, found: pd.DataFrame, options: CompareOptions, *, as_json: bool
) -> None:
    """Write the summary, the differences and the figure of the rows, and print them."""
    folder = Path(options.out)
    about = (
        f"{options.space} on {options.data}, norm {options.norm or 'of each method'}, "
        f"{options.seeds} seeds, "
        f"{options.trials} trials a budget."
    )
    if options.finetune:
        samples = options.finetune_samples or "all training"
        about += f" Fine-tuning: {options.finetune} epochs on {samples} samples."
    if options.recover:
        about += f" Recovery: {chosen_recipe(options)}."
    summary = markdown(rows, shlex.join(["ranknas", *sys.argv[1:]]), about, found)
    save_atomically(folder / "summary.md", lambda path: _write(path, summary))
    tex = latex(rows, found)
    save_atomically(folder / "summary.tex", lambda path: _write(path, tex))
    _write_csv(folder / "differences.csv", found)
    names = ["results.csv", "differences.csv", "summary.md", "summary.tex"]
    if ((rows.status == OK) & (rows.strategy != DENSE_MODEL)).any():
        figure = draw(rows)
        picture = folder / "comparison.png"
        save_atomically(picture, lambda path: figure.savefig(path, format="png"))
        names.append("comparison.png")
    if as_json:
        print_json(_with_differences(rows, found))
        return
    for budget, (columns, body) in tables(rows, found).items():
        print_table(budget, columns, body)
    typer.echo(noise_note(found))
    if note := labels_note(rows):
        typer.echo(note)
    for row in rows[rows.note != ""].itertuples():
        typer.echo(f"seed {row.seed}  {row.strategy}  {row.budget}: {row.note}")
    for row in rows[rows.status != OK].drop_duplicates(["strategy", "status"]).itertuples():
        typer.echo(f"{row.strategy}: {row.status}")
    typer.echo("  ".join(str(folder / name) for name in names))


def _with_differences(rows: pd.DataFrame, found: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON values, each with the differences of its strategy at its budget."""
    by_row: dict[tuple[str, str], dict[str, Any]] = {}
    lines: list[Any] = found.astype(object).where(found.notna(), None).to_dict("records")
    for line in lines:
        key = line.pop("strategy"), line.pop("budget")
        by_row.setdefault(key, {})[line.pop("quantity")] = line
    records: list[Any] = rows.astype(object).where(rows.notna(), None).to_dict("records")
    return [{**r, "to_best": by_row.get((r["strategy"], r["budget"]), {})} for r in records]


def _write(path: Path, text: str) -> Any:
    return path.write_text(text, encoding="utf-8")
