"""Progress on stderr and tables on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rankNAS.cli.notices import flush_notices

__all__ = [
    "ProgressDisplay",
    "number",
    "percent",
    "print_json",
    "print_table",
    "progress_display",
]


class ProgressDisplay:
    """Shows stages as progress bars; silent without a progress display."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def stage(self, name: str, done: int, total: int, note: str = "") -> None:
        """Update the bar of a stage; the first call creates it."""
        if self._progress is None:
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note="")
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)

    def insist(self, *lines: str) -> None:
        """Print lines on stderr, even without a progress display."""
        for line in lines:
            if self._progress is None:
                print(line, file=sys.stderr)
            self.say(line)


@contextmanager
def progress_display(quiet: bool) -> Iterator[ProgressDisplay]:
    """Context with progress on stderr; first prints the warnings queued by the option checks."""
    flush_notices()
    if quiet:
        yield ProgressDisplay(None)
        return
    columns = (
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=_console(stderr=True)) as progress:
        yield ProgressDisplay(progress)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1
) -> None:
    """Print a table on stdout; the first `left` columns are text, the others right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    width = None if Console().is_terminal else 140
    _console(width=width, highlight=False).print(table)


def _console(**options: Any) -> Console:
    """A console that prints text as it is: ``[/red]`` may be the name of a layer."""
    return Console(markup=False, emoji=False, **options)


def number(value: float) -> str:
    """A count with thousands separators, or a real number with five digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.5g}"


def percent(part: Mapping[str, float], whole: Mapping[str, float], name: str) -> str:
    """The amount kept of a cost: ``11,243,520 (30.0 %)``."""
    return f"{number(part[name])} ({100 * part[name] / whole[name]:.1f} %)"
