"""Local processes that help this one, joined to it by a process group of gloo."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist

from rankNAS.exceptions import UsageError
from rankNAS.io.files import save_bytes
from rankNAS.plugins import import_files, imported_files

__all__ = ["Helpers"]

PATIENCE = timedelta(days=1)  # of an exchange: the leader may evaluate between two steps
LEAVE = 10.0  # seconds for a helper to end by itself
OTHERS = 0.5  # seconds in which helpers end that have lost another one


@final
class Helpers:
    """Processes 1 to N - 1 of a process group, in which this one is 0.

    Args:
        count: N.
        function: What each of them runs, with the payload; importable.
        payload: Pickled for them.
        checkpoint: The file from which the work goes on if one of them dies.

    Raises:
        UsageError: They cannot start, or there is a process group.
    """

    def __init__(
        self,
        count: int,
        function: Callable[[Any], None],
        payload: object,
        checkpoint: Path | None = None,
    ) -> None:
        if not dist.is_available():
            raise UsageError(
                "this version of torch has no torch.distributed; install one that has it, or take "
                "the recipe 'distil'."
            )
        if dist.is_initialized():
            raise UsageError(
                "this process belongs to a process group of torch.distributed already; register "
                "`greedylore_hook` with its DistributedDataParallel instead of this recipe."
            )
        self.count, self._checkpoint = count, checkpoint
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._threads = torch.get_num_threads()
        self._folder = tempfile.TemporaryDirectory(prefix="ranknas-team-")
        try:
            self._start(function, payload)
        except BaseException:
            self.close()
            raise

    def _start(self, function: Callable[[Any], None], payload: object) -> None:
        folder = Path(self._folder.name)
        try:
            content = pickle.dumps((function, payload))
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise UsageError(
                f"the network, the data or the task cannot be sent to another process ({error}); "
                "define their classes at the top level of a file, without lambdas or open files."
            ) from None
        save_bytes(folder / "payload", content)
        files, digest = imported_files(content), hashlib.sha256(content).hexdigest()
        threads = max(1, self._threads // self.count)
        torch.set_num_threads(threads)
        known = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in known else "spawn"
        )
        for rank in range(1, self.count):
            own, other = context.Pipe()
            arguments = (folder, digest, rank, self.count, threads, files, dict(os.environ))
            process = context.Process(target=_help, args=(*arguments, other), daemon=True)
            process.start()
            other.close()
            self._processes.append(process)
            self._connections.append(own)
        for number, connection in enumerate(self._connections):
            reason: str | None = "a script must begin its work below if __name__ == '__main__'"
            with contextlib.suppress(EOFError, OSError):
                reason = connection.recv()
            if reason is not None:
                raise UsageError(
                    f"process {number + 1} of the {self.count} cannot start ({reason})."
                )
        _join(folder, 0, self.count)

    def failed(self, error: RuntimeError) -> None:
        """Raise a UsageError if an exchange has failed because a helper has ended."""
        found = self._ended(LEAVE)
        if found is not None:
            raise found from error

    def _ended(self, seconds: float) -> UsageError | None:
        """An error about a helper that has ended; None if none ends within so many seconds."""
        if not wait([p.sentinel for p in self._processes], seconds):
            return None
        time.sleep(OTHERS)
        ended: list[tuple[int, int, str]] = []
        for number, process in enumerate(self._processes, 1):
            if wait([process.sentinel], 0):
                process.join()
                reason = _reason(self._connections[number - 1])
                # One was killed or had an error; the others then lose the connection to it.
                order = 0 if reason is None else 1 + ("RuntimeError" in reason)
                ended.append((order, number, reason or f"exit code {process.exitcode}"))
        _, number, reason = min(ended)
        kept = ""
        if self._checkpoint is not None and self._checkpoint.is_file():
            kept = f"; the same command goes on from {str(self._checkpoint)!r}"
        return UsageError(
            f"process {number} of the {self.count} has ended ({reason}), so the training "
            f"stops{kept}."
        )

    def close(self, dismiss: Callable[[], bool] = lambda: False) -> None:
        """End all helpers and the process group.

        Args:
            dismiss: Tells them to stop; they are killed if it returns False.
        """
        patience = 0.0
        with contextlib.suppress(RuntimeError):  # one has gone already
            patience = LEAVE if dismiss() else 0.0
        for process in self._processes:
            process.join(patience)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(self._threads)
        self._folder.cleanup()


def _help(
    folder: Path,
    digest: str,
    rank: int,
    count: int,
    threads: int,
    files: list[Path],
    environment: Mapping[str, str],
    connection: Connection,
) -> None:
    """The life of a helper."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    try:
        import_files(files)
        content = (folder / "payload").read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:  # unpickling runs what it reads
            raise RuntimeError("its task is not what the leading process has written")
        function, payload = pickle.loads(content)
        connection.send(None)
        with _member(folder, rank, count):
            function(payload)
    except BaseException as error:
        text = (str(error) or type(error).__name__).partition("\n")[0]
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {text}")
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _member(folder: Path, rank: int, count: int) -> Iterator[None]:
    _join(folder, rank, count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _join(folder: Path, rank: int, count: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'group'}",
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )


def _reason(connection: Connection) -> str | None:
    """The last words of a helper."""
    found = None
    with contextlib.suppress(EOFError, OSError):
        while connection.poll():
            found = connection.recv()
    return found
