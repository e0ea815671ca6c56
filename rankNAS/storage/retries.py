"""Retries with exponential backoff for storages that are temporarily unavailable."""

from __future__ import annotations

import errno
import logging
import random
import sqlite3
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy
from optuna.exceptions import OptunaError, StorageInternalError
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)

from rankNAS.exceptions import RankNASError, StudyError
from rankNAS.storage.redaction import redacted

__all__ = ["ConnectionLostError", "format_error", "reason", "retrying", "watch"]

logger = logging.getLogger(__name__)
PATIENCE = 600.0  # seconds; longest outage
FIRST, LONGEST = 0.2, 30.0  # seconds between two attempts
FINAL = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
PASSING = ("locked", "busy", "disk i/o error", "is full", "unable to open")  # in SQLite's words
T = TypeVar("T")


class ConnectionLostError(Exception):
    """The database does not respond; the outcome of the request is unknown."""


def watch(engine: Engine) -> None:
    """Make an engine raise `ConnectionLostError` when its server is unreachable.

    Optuna treats SQLAlchemy's own error as a conflict. It repeats the transaction without a check
    whether it was committed before the connection broke, which could store a trial twice.
    """
    if engine.dialect.name != "sqlite" and not sqlalchemy.event.contains(
        engine, "handle_error", _lost
    ):
        sqlalchemy.event.listen(engine, "handle_error", _lost)


def _lost(context: ExceptionContext) -> ConnectionLostError | None:
    error = context.sqlalchemy_exception
    if context.is_disconnect or isinstance(error, OperationalError | InterfaceError):
        return ConnectionLostError(reason(error or context.original_exception))
    return None


def retrying(action: Callable[[], T], name: str) -> T:
    """The result of an action on a storage, repeated while the storage does not respond.

    The pauses double from 0.2 s to 30 s, for up to ten minutes. The action must be idempotent:
    after a lost connection, its outcome is unknown.

    Args:
        action: A function without arguments.
        name: The storage, for messages.

    Raises:
        StudyError: The storage reported an error, or did not respond for ten minutes.

    Example:
        >>> solutions = iter([True])
        >>> retrying(lambda: next(solutions), "study.db")
        True
    """
    began, delay = None, FIRST
    while True:
        try:
            result = action()
        except Exception as error:
            if not _passes(error):
                raise format_error(error, name) from None
            now = time.monotonic()
            if began is None:
                began = now
                logger.warning(
                    "the study storage %s does not answer (%s); trying again for up to %.0f s",
                    name,
                    reason(error),
                    PATIENCE,
                )
            elif now - began > PATIENCE:
                raise StudyError(
                    f"the study storage {name} has not answered for {PATIENCE:.0f} s: "
                    f"{reason(error)}. What was finished before is kept: resume the study when "
                    "the storage is there again."
                ) from None
        else:
            if began is not None:
                seconds = time.monotonic() - began
                logger.warning("the study storage %s answers again, after %.1f s", name, seconds)
            return result
        # Jitter: waiting processes should not retry at the same time.
        time.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(2 * delay, LONGEST)


def format_error(error: Exception, name: str) -> Exception:
    """Convert a storage error to a StudyError without passwords; return other errors unchanged."""
    if isinstance(error, RankNASError):
        return error
    known = (ConnectionLostError, SQLAlchemyError, OptunaError, OSError, ValueError, RuntimeError)
    if not isinstance(error, (*known, KeyError)):
        return error
    logger.debug("%s", redacted("".join(traceback.format_exception(error))))
    return StudyError(f"the study storage {name} cannot be used: {reason(error)}")


def reason(error: BaseException) -> str:
    """One-line description of an error, without statements, parameters and passwords."""
    while isinstance(error, StorageInternalError | DBAPIError):
        deeper = error.orig if isinstance(error, DBAPIError) else error.__cause__
        if deeper is None:
            break
        error = deeper
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return redacted(f"{type(error).__name__} {text}" if isinstance(error, KeyError) else text)


def _passes(error: BaseException | None) -> bool:
    """Whether an error may be transient."""
    if isinstance(error, StorageInternalError):
        return _passes(error.__cause__)
    if isinstance(error, ConnectionLostError | DisconnectionError | sqlalchemy.exc.TimeoutError):
        return True
    if isinstance(error, OperationalError | InterfaceError):
        if isinstance(error.orig, sqlite3.Error):
            return any(word in str(error.orig).lower() for word in PASSING)
        return True
    return isinstance(error, OSError) and error.errno not in FINAL
