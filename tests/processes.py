"""Processes of their own, which need not import torch each time."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# Not the modules of the tests: the server has no path to them.
FORKS.set_forkserver_preload(
    [
        *("rankNAS.storage.store", "optuna", "sqlalchemy", "alembic", "psycopg"),
        *("rankNAS.engine", "rankNAS.cli", "rankNAS.cli.commands.search", "sklearn.datasets"),
        "torch._dynamo",  # which counting MACs imports
    ]
)


class Command:
    """``ranknas`` in a process of its own.

    Args:
        arguments: Of the command.
        folder: Where it runs, and where what it prints is written.
        fresh: Start ``python -m rankNAS`` as a user does, not a process that has its imports.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, *, fresh: bool = False) -> None:
        self.errors = folder / "stderr"
        self.process = FORKS.Process(
            target=_fresh if fresh else _command,
            args=([*arguments], folder, dict(os.environ)),
            daemon=True,  # a test that fails leaves nothing behind
        )
        self.process.start()

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ended(self, seconds: float = 0) -> int | None:
        """Its exit code if it ends within so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode


def _fresh(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    _into(folder)
    os.execve(sys.executable, [sys.executable, "-m", "rankNAS", *arguments], dict(environment))


def _command(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    from rankNAS.cli import main

    _into(folder)
    os.environ.clear()  # the server's is that of the test that has started it
    os.environ.update(environment)
    sys.argv = ["ranknas", *arguments]
    main()


def _into(folder: Path) -> None:
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
