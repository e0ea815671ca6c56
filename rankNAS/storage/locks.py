"""One process at a time on a study, for moments; a lock goes with the process that holds it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import filelock
import optuna
import sqlalchemy
from sqlalchemy.engine import Engine

__all__ = ["database_lock", "file_lock", "file_of", "study_lock"]

WAIT = 120.0  # seconds; who holds a lock for so long is suspended
POLL = 0.01  # seconds
_in_memory: WeakKeyDictionary[optuna.storages.BaseStorage, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


def study_lock(storage: optuna.storages.BaseStorage, name: str) -> AbstractContextManager[object]:
    """A lock on a study, between threads and processes; do not take it twice.

    Beside an SQLite file or a journal it is a locked file (``.NAME.lock``), in PostgreSQL and
    MySQL an advisory lock; in memory, and in other storages, it is only between threads.

    Args:
        storage: From `rankNAS.storage.backends.open_storage`.
        name: The study's name.

    Raises:
        OSError, SQLAlchemyError, ConnectionLostError: The lock cannot be had within two minutes.
    """
    path = file_of(storage)
    if path is not None:
        return file_lock(path)
    engine = getattr(storage, "engine", None)
    if isinstance(engine, Engine) and engine.dialect.name != "sqlite":
        return database_lock(engine, f"ranknas study {name}")
    with _making:
        return _in_memory.setdefault(storage, threading.RLock())


def file_of(storage: optuna.storages.BaseStorage) -> Path | None:
    """The file of an SQLite database or a journal; None for other storages."""
    engine = getattr(storage, "engine", None)
    if isinstance(engine, Engine):
        is_file = engine.dialect.name == "sqlite" and engine.url.database not in (
            None,
            "",
            ":memory:",
        )
        return Path(str(engine.url.database)) if is_file else None
    journal = getattr(getattr(storage, "_backend", None), "_file_path", None)
    return None if journal is None else Path(journal)


def file_lock(path: Path) -> filelock.BaseFileLock:
    """The lock beside a file; a thread that has it may take it again."""
    resolved = path.resolve()
    # Hidden, and not NAME.lock, which Optuna makes and removes beside a journal.
    return _file_lock(str(resolved.with_name(f".{resolved.name}.lock")))


@cache
def _file_lock(path: str) -> filelock.BaseFileLock:
    return filelock.FileLock(path, timeout=WAIT, poll_interval=POLL)


@contextmanager
def database_lock(engine: Engine, name: str) -> Iterator[None]:
    """A lock of a database server; for servers other than PostgreSQL and MySQL, none.

    Raises:
        SQLAlchemyError, ConnectionLostError: The lock cannot be had, or was lost meanwhile with
            the connection that held it.
    """
    kind = engine.dialect.name
    digest = hashlib.sha256(name.encode()).digest()
    if kind == "postgresql":
        key = int.from_bytes(digest[:8], "big", signed=True)
        # Held by a transaction, not by a session: so it works behind a pooler too.
        with engine.begin() as connection:
            wait = f"SET LOCAL lock_timeout = {int(1000 * WAIT)}"
            connection.execute(sqlalchemy.text(wait))
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:k)"), {"k": key})
            yield
            connection.execute(sqlalchemy.text("SELECT 1"))
    elif kind in ("mysql", "mariadb"):
        key_text = f"ranknas-{digest.hex()[:32]}"
        with engine.connect() as connection:
            got = connection.execute(
                sqlalchemy.text("SELECT GET_LOCK(:k, :t)"), {"k": key_text, "t": int(WAIT)}
            ).scalar()
            if got != 1:
                raise TimeoutError(f"another process holds the study for more than {WAIT:.0f} s")
            try:
                yield
            finally:
                connection.execute(sqlalchemy.text("SELECT RELEASE_LOCK(:k)"), {"k": key_text})
    else:
        yield
