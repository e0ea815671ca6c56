"""Real processes that work on one study: nothing is lost, nothing is there twice."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import store_worker as worker
from postgres import PASSWORD, USER, Cluster
from processes import FORKS

from rankNAS.allocation import Allocation
from rankNAS.storage.store import Claim


class Process:
    """A worker, and what it has printed."""

    def __init__(self, folder: Path, storage: str, seed: int, most: int, seconds: float) -> None:
        self.log, self.go = folder / f"log{seed}", folder / "go"
        self.log.touch()
        self.process = FORKS.Process(
            target=worker.begin,
            args=(storage, str(self.log), str(self.go), seed, most, seconds),
            daemon=True,
        )
        self.process.start()

    @property
    def lines(self) -> list[str]:
        """Its lines, but for one that is being written."""
        return self.log.read_text().split("\n")[:-1]

    @property
    def recorded(self) -> list[Allocation]:
        """What it said it had recorded."""
        return [Allocation.from_json(line) for line in self.lines if line.startswith("{")]

    def wait_for(self, found: Callable[[], bool]) -> None:
        deadline = time.time() + 60
        while not found() and time.time() < deadline and self.process.is_alive():
            time.sleep(0.005)
        assert found(), self.lines

    def finish(self) -> None:
        self.process.join(120)
        assert self.process.exitcode == 0, self.lines

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def workers(storage: str, most: int, *seconds: float) -> Iterator[list[Process]]:
    """Processes that begin at the same moment, each with the longest time of its trials."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [Process(folder, storage, i, most, each) for i, each in enumerate(seconds)]
        try:
            for process in processes:
                process.wait_for(lambda p=process: "ready" in p.lines)  # type: ignore[misc]
            (folder / "go").touch()
            yield processes
        finally:
            for process in processes:
                process.kill()


def check(storage: str, most: int, *processes: Process) -> None:
    """The study has its trials, once each, with their values, and all that anybody told of."""
    trials = worker.opened(storage).history().trials
    assert len(trials) == most
    assert len({t.allocation for t in trials}) == most
    assert [t.number for t in trials] == list(range(most))
    for trial in trials:
        assert trial.values == (worker.accuracy(trial.allocation),)
    told = [a for p in processes for a in p.recorded]
    assert len(told) == len(set(told))
    assert set(told) <= {t.allocation for t in trials}
    for process in processes:
        assert not any("Traceback" in line for line in process.lines), process.lines


def test_two_processes_share_a_new_study(shared: str) -> None:
    with workers(shared, 40, 0.01, 0.01) as processes:
        for process in processes:
            process.finish()
        check(shared, 40, *processes)
        # Without a kill, each trial has been told of, and both have worked.
        assert sum(len(p.recorded) for p in processes) == 40
        assert all(p.recorded for p in processes)


def test_a_killed_process_loses_no_trial_and_others_finish(shared: str) -> None:
    with workers(shared, 60, 0.05, 0.01) as (survivor, victim):
        victim.wait_for(lambda: bool(victim.recorded))
        time.sleep(random.uniform(0, 0.2))
        victim.kill()
        survivor.finish()
        check(shared, 60, survivor, victim)
    # What it was evaluating is not waited for.
    with worker.opened(shared) as store:
        assert store.claim([Claim(a, "another") for a in worker.ALLOCATIONS], most=999)
        assert store.others() == ()


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back(postgres: Cluster) -> None:
    storage = postgres.new_database()
    with workers(storage, 60, 0.05, 0.05) as processes:
        for mode in ("immediate", "fast"):
            counts = [len(p.recorded) for p in processes]
            for process, count in zip(processes, counts, strict=True):
                process.wait_for(lambda p=process, c=count: len(p.recorded) > c + 3)  # type: ignore[misc]
            postgres.stop(mode)
            time.sleep(0.5)
            postgres.start()
        for process in processes:
            process.finish()
        check(storage, 60, *processes)
        told = "\n".join(line for p in processes for line in p.lines)
    assert "does not answer" in told and "answers again" in told
    assert PASSWORD not in told and quote(PASSWORD, safe="") not in told


def test_connections_that_the_server_ends_at_any_moment(postgres: Cluster) -> None:
    """Optuna by itself would repeat a transaction that may have been carried out."""
    import psycopg

    storage = postgres.new_database()
    query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
    login = {"host": "127.0.0.1", "port": postgres.port, "user": USER, "password": PASSWORD}
    with (
        workers(storage, 60, 0.005) as (process,),
        psycopg.connect(**login, dbname="postgres", autocommit=True) as connection,
    ):
        for _ in range(8):
            time.sleep(random.uniform(0, 0.1))
            connection.execute(query, [storage.rpartition("/")[2]])
        process.finish()
        check(storage, 60, process)
