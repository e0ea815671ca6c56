"""Storages that go away and come back."""

from __future__ import annotations

import errno
import logging
import sqlite3

import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from rankNAS.exceptions import StudyError
from rankNAS.storage import retries
from rankNAS.storage.retries import ConnectionLostError, format_error, reason, retrying


def locked() -> OperationalError:
    return OperationalError("INSERT", {"a": 1}, sqlite3.OperationalError("database is locked"))


def wrapped() -> StorageInternalError:
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = locked()
    return error


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", found.append)
    return found


@pytest.mark.parametrize(
    "error", [ConnectionLostError("gone"), locked(), wrapped(), OSError(errno.ESTALE, "stale")]
)
def test_an_outage_is_waited_for_with_one_warning(
    error: Exception, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    left = [error] * 12

    def action() -> int:
        if left:
            raise left.pop()
        return 7

    assert retrying(action, "'study.db'") == 7
    longest = [min(0.2 * 2**i, 30) for i in range(12)]
    assert all(high / 2 <= p <= high for p, high in zip(pauses, longest, strict=True))
    gone, back = caplog.records
    assert "does not answer" in gone.message and "answers again" in back.message


def test_an_outage_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(retries.time, "monotonic", lambda: next(now))
    with pytest.raises(StudyError, match="has not answered for 600 s: gone.*resume the study"):
        retrying(lambda: (_ for _ in ()).throw(ConnectionLostError("gone")), "x")


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT", {}, sqlite3.OperationalError("no such table: studies")),
        PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        ValueError("Expecting value: line 1"),
        KeyError("Record does not exist."),
    ],
)
def test_other_errors_are_told_at_once(error: Exception, pauses: list[float]) -> None:
    def action() -> None:
        raise error

    with pytest.raises(StudyError, match="storage 'study.db' cannot be used: ") as caught:
        retrying(action, "'study.db'")
    assert not pauses and caught.value.__cause__ is None


def test_errors_of_the_program_and_of_the_user_pass() -> None:
    for error in (TypeError("a bug"), StudyError("told already"), KeyboardInterrupt()):

        def action(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            retrying(action, "x")
        assert caught.value is error


def test_a_reason_has_neither_statement_nor_password() -> None:
    orig = Exception("connection to postgresql://me:secret@host failed\nIs the server running?")
    error = OperationalError("INSERT INTO trials", {"value": 1}, orig)
    assert reason(error) == "connection to postgresql://me:***@host failed"
    assert reason(ValueError()) == "ValueError"
    assert "Record does not exist" in reason(KeyError("Record does not exist"))


def test_the_traceback_is_in_the_debug_log_without_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="rankNAS"):
        format_error(ValueError("postgresql://me:secret@host"), "x")
    assert "postgresql://me:***@host" in caplog.text and "secret" not in caplog.text
