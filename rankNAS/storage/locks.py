"""Short-term mutual exclusion on a study; a lock ends with the process that holds it."""

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

WAIT = 120.0  # seconds; a process that holds a lock longer is suspended
POLL = 0.01  # seconds
_in_memory: WeakKeyDictionary[optuna.storages.BaseStorage, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


def study_lock(storage: optuna.storages.BaseStorage, name: str) -> AbstractContextManager[object]:
    """Lock on a study, between threads and processes; not reentrant.

    SQLite files and journals use a lock file beside them (``.NAME.lock``). PostgreSQL and MySQL
    use an advisory lock. Storages in memory, and all others, lock between threads only.

    Args:
        storage: From `rankNAS.storage.backends.open_storage`.
        name: The study's name.

    Raises:
        OSError, SQLAlchemyError, ConnectionLostError: The lock is not free within two minutes.
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
    """Lock beside a file; reentrant within a thread."""
    resolved = path.resolve()
    # Hidden, and not NAME.lock: Optuna creates and removes that file beside a journal.
    return _file_lock(str(resolved.with_name(f".{resolved.name}.lock")))


@cache
def _file_lock(path: str) -> filelock.BaseFileLock:
    return filelock.FileLock(path, timeout=WAIT, poll_interval=POLL)


@contextmanager
def database_lock(engine: Engine, name: str) -> Iterator[None]:
    """Advisory lock of a PostgreSQL or MySQL server; no lock on other servers.

    Raises:
        SQLAlchemyError, ConnectionLostError: The lock is not available, or was lost with the
            connection that held it.
    """
    kind = engine.dialect.name
    digest = hashlib.sha256(name.encode()).digest()
    if kind == "postgresql":
        key = int.from_bytes(digest[:8], "big", signed=True)
        # Bound to a transaction, not to a session, so that it also works behind a pooler.
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
