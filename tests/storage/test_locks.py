"""Mutual exclusion between threads and processes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import optuna
import pytest
import store_worker as worker
from processes import FORKS

from rankNAS.storage import locks
from rankNAS.storage.backends import open_storage
from rankNAS.storage.locks import file_of, study_lock
from rankNAS.storage.retries import ConnectionLostError


@pytest.mark.slow
def test_a_lock_goes_with_the_process_that_holds_it(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WAIT", 0.3)
    locks._file_lock.cache_clear()
    storage = open_storage(shared)
    told = tmp_path / "held"
    process = FORKS.Process(target=worker.hold, args=(shared, str(told)), daemon=True)
    process.start()
    try:
        while not told.exists():
            assert process.is_alive()
            time.sleep(0.001)
        with pytest.raises((OSError, ConnectionLostError)), study_lock(storage, "name"):
            pass
        if shared.startswith("postgresql"):
            with study_lock(storage, "another study"):
                pass
    finally:
        process.kill()
        process.join()
    monkeypatch.setattr(locks, "WAIT", 30.0)
    locks._file_lock.cache_clear()
    with study_lock(storage, "name"):
        pass


@pytest.mark.parametrize("memory", [False, True])
def test_threads_exclude_each_other(shared: str, memory: bool) -> None:
    storage = open_storage(None if memory else shared)
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(5):
            with study_lock(storage, "name"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and inside == [0]


def test_a_lock_that_was_lost_is_noticed(postgres: object) -> None:
    """The server ends the connection that holds the lock: what was done meanwhile may be wrong."""
    import sqlalchemy

    storage = open_storage(postgres.new_database())  # type: ignore[attr-defined]
    query = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
    with pytest.raises(ConnectionLostError), study_lock(storage, "name"):
        with storage.engine.begin() as connection:  # type: ignore[attr-defined]
            connection.execute(sqlalchemy.text(query))
    with study_lock(storage, "name"):
        pass


def test_the_file_of_a_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert file_of(open_storage("sqlite:///study.db")) == tmp_path / "study.db"
    assert file_of(open_storage("journal:study.log")) == tmp_path / "study.log"
    assert file_of(optuna.storages.InMemoryStorage()) is None
    assert file_of(optuna.storages.RDBStorage("sqlite://")) is None
