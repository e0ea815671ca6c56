"""Storage backends of studies: SQLite, a journal file, or the database of any URL.

Files are checked when they are opened. A damaged file is rejected by name. An incomplete last line
of a journal, left by a killed process, is removed. Passwords never appear in messages.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sqlite3
import time
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.pool import NullPool

from rankNAS.exceptions import StudyError
from rankNAS.storage.locks import database_lock, file_lock, file_of
from rankNAS.storage.redaction import redacted, remember
from rankNAS.storage.retries import format_error, watch

__all__ = ["PASSWORD", "open_storage", "storage_name"]

logger = logging.getLogger(__name__)
PASSWORD = "RANKNAS_STORAGE_PASSWORD"  # the environment variable, not a password
FORMS = (
    "sqlite:///FILE.db, journal:FILE.log (for network file systems), "
    "postgresql://USER@HOST/DATABASE or another URL of SQLAlchemy"
)
JOURNAL = "journal:"
BUSY = 60.0  # seconds; SQLite's timeout for transactions of other processes
BEGINNING = b'{"op_code":'  # start of every line of a journal
RACES = (  # database errors when two programs create the same tables
    "already exists",
    "UNIQUE constraint failed: alembic_version",
    "duplicate key value",
)
STALE = 5  # seconds until a journal lock of a killed process is broken
DRIVERS = {  # by dialect: modules for SQLAlchemy, preferred first, and what to install
    "postgresql": (("psycopg", "psycopg2"), "'ranknas[postgresql]'"),
    "mysql": (("pymysql", "MySQLdb"), "pymysql"),
    "mariadb": (("pymysql", "MySQLdb"), "pymysql"),
}
NAMES = {"MySQLdb": "mysqldb"}  # modules with another driver name in SQLAlchemy


def open_storage(spec: str | BaseStorage | None, *, create: bool = True) -> BaseStorage:
    """Open the storage of a study.

    Args:
        spec: ``sqlite:///FILE``, ``journal:FILE``, the URL of a database, or the path of a file
            that ends in ``.db``, ``.sqlite``, ``.journal`` or ``.log``. A URL without a password
            takes it from the environment variable ``RANKNAS_STORAGE_PASSWORD``, if that is set.
            None creates a storage in memory; an Optuna storage is used unchanged.
        create: Whether to create a file that does not exist.

    Raises:
        StudyError: The text is none of these, a driver is missing, the database denies access, or
            the file is damaged.

    Example:
        >>> storage_name(open_storage(None))
        'in memory'
    """
    if spec is None:
        return InMemoryStorage()
    if isinstance(spec, BaseStorage):
        engine = getattr(spec, "engine", None)
        if isinstance(engine, Engine):
            watch(engine)
        return spec
    if spec.startswith(JOURNAL):
        return _open_journal(_file(spec.removeprefix(JOURNAL), create))
    if "://" not in spec and spec.endswith((".journal", ".log")):
        return _open_journal(_file(spec, create))
    if "://" not in spec and spec.endswith((".db", ".sqlite")):
        spec = f"sqlite:///{spec}"
    url = _url(spec)
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            return InMemoryStorage()
        if "uri" in url.query:
            raise StudyError(f"a study in SQLite must be sqlite:///FILE.db, got {_shown(url)}.")
        url = url.set(database=str(_file(str(url.database), create)))
    return _open_database(url)


def storage_name(storage: BaseStorage) -> str:
    """Name of a storage for messages: its file, or its URL without a password."""
    path = file_of(storage)
    if path is not None:
        return repr(str(path))
    engine = getattr(storage, "engine", None)
    if isinstance(engine, Engine):
        return _shown(engine.url)
    return "in memory" if isinstance(storage, InMemoryStorage) else type(storage).__name__


def _shown(url: URL) -> str:
    return redacted(url.render_as_string(hide_password=True))


def _file(text: str, create: bool) -> Path:
    """The path, checked: a file exists there or can be created."""
    path = Path(text).expanduser().absolute()
    if not text or path.is_dir():
        raise StudyError(f"the study storage {text!r} is no file; expected {FORMS}.")
    if not path.exists():
        if not create:
            raise StudyError(f"the study storage {str(path)!r} does not exist.")
        if not path.parent.is_dir():
            raise StudyError(
                f"the study storage {str(path)!r} cannot be used: there is no folder "
                f"{str(path.parent)!r}; make it first."
            )
    elif not create and path.stat().st_size == 0:
        raise StudyError(_damaged(path, "it is empty"))
    return path


def _damaged(path: Path, why: str) -> str:
    return (
        f"the study storage {str(path)!r} cannot be used, it is damaged or no such file: {why}. "
        "Bring it back from a copy, or start a new study in another file."
    )


# ------------------------------------------------------------------------------- databases


def _url(spec: str) -> URL:
    """Parse a URL and add its driver and password."""
    # A password that is not percent-encoded would be parsed as part of the host, and be shown.
    scheme, found, rest = spec.partition("://")
    if not found:
        shown = redacted(spec) if "@" not in spec else "a text with an @, but without ://"
        raise StudyError(f"the study storage must be {FORMS}; got {shown}.")
    _, _, host = rest.partition("@")
    if "@" in host.partition("?")[0]:
        raise StudyError(
            f"the study storage {scheme}://… has more than one @; in a user name or password "
            "write it as %40 (and / : ? # % as %2F %3A %3F %23 %25)."
        )
    if scheme == "postgres":
        spec = f"postgresql://{rest}"
    try:
        url = make_url(spec)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise StudyError(
            f"the study storage {scheme}://… is no URL; expected {FORMS}. Write special "
            "characters of a user name or password percent-encoded, as %2F for a slash."
        ) from None
    kind = url.get_backend_name()
    if url.password is None and url.host and (password := os.environ.get(PASSWORD)):
        url = url.set(password=password)
    remember(None if url.password is None else str(url.password))
    if url.drivername in DRIVERS:  # dialect only: use an installed driver
        modules, package = DRIVERS[kind]
        there = [m for m in modules if importlib.util.find_spec(m) is not None]
        if not there:
            raise StudyError(f"a study in {kind} needs a driver: pip install {package}")
        url = url.set(drivername=f"{kind}+{NAMES.get(there[0], there[0])}")
    return url


def _open_database(url: URL) -> BaseStorage:
    shown = _shown(url)
    path = Path(str(url.database)) if url.get_backend_name() == "sqlite" else None
    options: dict[str, Any] = {"pool_pre_ping": True}
    if path is not None:
        shown, options = repr(str(path)), {"connect_args": {"timeout": BUSY}}
    try:
        # Optuna treats the URL as a template; escape braces in a password.
        text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        first = sqlalchemy.create_engine(url, poolclass=NullPool)
        # Two processes that create the tables at the same time would conflict.
        with file_lock(path) if path is not None else database_lock(first, "ranknas open"):
            if path is not None:
                _check_database(path)
            storage = _made(text, options)
    except ImportError as error:
        raise StudyError(
            f"the study storage {shown} needs a driver: pip install {error.name}"
        ) from None
    except sqlalchemy.exc.NoSuchModuleError:
        raise StudyError(
            f"the study storage {shown} is of an unknown kind; expected {FORMS}."
        ) from None
    except Exception as error:
        raise format_error(error, shown) from None
    watch(storage.engine)
    weakref.finalize(storage, storage.engine.dispose)  # closes its connections
    if path is not None:
        sqlalchemy.event.listen(storage.engine, "connect", _set_up)
        storage.engine.dispose()  # existing connections lack the set-up
    return storage


def _made(text: str, options: dict[str, Any]) -> RDBStorage:
    """Create the storage with its tables; another program may create them at the same time."""
    for _ in range(3):
        try:
            return RDBStorage(text, engine_kwargs=options)
        except Exception as error:
            if not any(text in str(error) for text in RACES):
                raise
        time.sleep(0.5)  # let the other program finish
    return RDBStorage(text, engine_kwargs=options)


def _set_up(connection: Any, store: object) -> None:
    # A finished trial survives a power cut, at the cost of one disk write per trial.
    connection.execute("PRAGMA synchronous=FULL")


def _check_database(path: Path) -> None:
    """Raise a StudyError unless a file is an intact SQLite database; switch it to WAL."""
    if path.exists() and (size := path.stat().st_size):
        with path.open("rb") as file:
            header = file.read(100)
        page = int.from_bytes(header[16:18], "big")
        log = path.with_name(f"{path.name}-wal")
        # SQLite reads the missing part of the last page as zeros. If a log exists, a process may
        # have been killed before it wrote this page.
        if not (log.exists() and log.stat().st_size) and (
            len(header) < 100 or (page and size % (65536 if page == 1 else page))
        ):
            raise StudyError(_damaged(path, "it is cut off, or no database"))
    try:
        with closing(sqlite3.connect(path, timeout=BUSY)) as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != ("ok",):
                raise StudyError(_damaged(path, str(found[0]).replace("\n", " ")))
            # With WAL, readers and a writer do not block each other, and a commit is one write.
            connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.OperationalError:
        raise  # locked, or not readable; the file itself may be intact
    except sqlite3.DatabaseError as error:
        raise StudyError(_damaged(path, str(error))) from None


# -------------------------------------------------------------------------------- journals


class _JournalLock(JournalFileOpenLock):
    """Lock of a journal; acquiring it also removes an incomplete last line.

    A killed Optuna process leaves its lock behind, and others wait 30 s for it. We also hold a
    lock that ends with the process, so a remaining Optuna lock is most likely stale.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=STALE)
        self._path = path
        # The study's lock is not used: it may be held longer, and by another thread.
        self.guard = file_lock(path.with_name(f"{path.name}.append"))

    def acquire(self) -> bool:
        self.guard.acquire()
        try:
            super().acquire()
            _cut(self._path)
        except BaseException:
            self.guard.release()
            raise
        return True

    def release(self) -> None:
        try:
            super().release()
        finally:
            self.guard.release()


def _cut(path: Path) -> None:
    """Remove an incomplete last line of a journal; its writer was killed.

    Optuna would append to it, which corrupts the next line and all later reads.
    """
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        kept, block = size, 1 << 16
        while kept > 0:
            start = max(0, kept - block)
            file.seek(start)
            newline = file.read(kept - start).rfind(b"\n")
            kept = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        file.truncate(kept)
        os.fsync(file.fileno())
    logger.warning(
        "the journal %r ended in the middle of a line; its last %d bytes are taken away",
        str(path),
        size - kept,
    )


def _open_journal(path: Path) -> BaseStorage:
    lock = _JournalLock(path)
    try:
        if path.exists():
            with lock.guard:
                _check_journal(path)
            lock.acquire()
            lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (StudyError, OSError) as error:
        raise format_error(error, repr(str(path))) from None
    except Exception as error:  # lines that are JSON, but inconsistent
        raise StudyError(_damaged(path, f"{type(error).__name__}: {error}")) from None


def _check_journal(path: Path) -> None:
    """Raise a StudyError unless each complete line of a journal has Optuna's format."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                if number == 1 and not BEGINNING.startswith(line[: len(BEGINNING)]):
                    raise StudyError(_damaged(path, "line 1 is no line of a journal"))
                return
            try:
                entry = json.loads(line)
                whole = isinstance(entry["op_code"], int) and isinstance(entry["worker_id"], str)
            except (ValueError, TypeError, KeyError):
                whole = False
            if not whole:
                raise StudyError(_damaged(path, f"line {number} is no line of a journal"))
