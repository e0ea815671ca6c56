"""The command line. Each command imports what it needs when it runs: ``--help`` loads no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Annotated

import typer
from typer.main import get_command

from rankNAS.cli.commands import COMMANDS
from rankNAS.cli.generate import make_command
from rankNAS.cli.notices import plain_notices, taken_notices
from rankNAS.cli.started import begin

__all__ = ["app", "main"]

app = typer.Typer(
    name="ranknas",
    help="Search the ranks of low-rank compressed networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, (_target, _summary, _groups) in COMMANDS.items():
    _command = make_command(_summary, f"rankNAS.cli.commands.{_target}", *_groups)
    app.command(_name, add_help_option=False)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        from rankNAS import __version__

        typer.echo(f"ranknas {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Search the ranks of low-rank compressed networks."""


@cache
def _parser(commands: typer.Typer) -> Callable[[], object]:
    """The command line; made once where a process runs several commands."""
    return get_command(commands)


def main() -> None:
    """Run the command line; user errors exit with 2 and one line, without a traceback."""
    begin()
    from rankNAS.exceptions import RankNASError, UsageError
    from rankNAS.io.files import is_full

    _own_stdout()
    with plain_notices():
        try:
            _parser(app)()
        except UsageError as error:
            _fail(error, 2)
        except RankNASError as error:
            _fail(error, 1)
        except BrokenPipeError:  # the reader of a pipe, such as `head`, has exited
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:  # from a folder, or from a file not written atomically by us
            if not is_full(error):
                raise
            name = "" if error.filename is None else f" for {error.filename!r}"
            _fail(f"no room{name}: {error.strerror}. Make some, and run the same again.", 2)


def _own_stdout() -> None:
    """Reserve stdout for our output; redirect output of C libraries, such as HiGHS, to stderr."""
    before = sys.__stdout__
    if before is None or sys.stdout is not before:  # already replaced by other code
        return
    try:
        own = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # closed, or not a file
        return
    buffering = 1 if os.isatty(own) else -1
    encoding, errors = before.encoding, before.errors
    sys.stdout = open(own, "w", buffering, encoding=encoding, errors=errors)  # noqa: SIM115


def _fail(error: Exception | str, code: int) -> None:
    from rankNAS.exceptions import shortened

    notes = taken_notices()  # on the same line
    said = f" ({' '.join(notes)})" if notes else ""
    typer.echo(f"ranknas: error: {shortened(str(error), 3000)}{said}", err=True)
    sys.exit(code)
