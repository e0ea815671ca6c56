"""Ctrl-C during a search, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from processes import Command
from safetensors.torch import save_file

from rankNAS.cli import main
from rankNAS.plugins import load_callable

SECONDS = 600.0  # for what should take a few; other tests run beside it

CALLS = 8  # of the objective that take no time


def begun(model_file: str, tmp_path: Path, *options: str, fresh: bool = False) -> Command:
    """A search that has finished a few trials and is in the midst of one."""
    objective, calls = tmp_path / "slow.py", tmp_path / "calls"
    objective.write_text(
        "import pathlib, time\n"
        "def slow(network, data):\n"
        f"    calls = pathlib.Path({str(calls)!r})\n"
        "    with calls.open('a') as file:\n"
        "        file.write('.')\n"
        f"    if calls.stat().st_size > {CALLS}:\n"
        "        time.sleep(3600)\n"
        "    return float(sum(p.numel() for p in network.parameters()))\n"
        "slow.direction = 'minimize'\n"
    )
    weights = tmp_path / "weights.safetensors"
    save_file(load_callable(model_file)(10).state_dict(), weights)
    arguments = ["search", "--space", model_file, "--study", "s"]
    arguments += ["--weights", str(weights), "--calibration", "64", "--validation", "64"]
    arguments += ["--out", str(tmp_path), "--strategy", "random", "--budget", "0.5", "--quiet"]
    arguments += ["--trials", "400", "--objective", f"{objective}:slow", *options]
    command = Command(arguments, tmp_path, fresh=fresh)
    until = time.monotonic() + SECONDS
    while finished(tmp_path) < 3 or calls.stat().st_size <= CALLS:
        assert command.ended() is None, command.errors.read_text()
        assert time.monotonic() < until, "the search does not begin"
        time.sleep(0.1)
    return command


def finished(tmp_path: Path) -> int:
    """Trials that have finished. Optuna would make tables, which the search is making."""
    database = tmp_path / "s" / "study.db"
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            query = "select count(*) from trials where state = 'COMPLETE'"
            return int(connection.execute(query).fetchone()[0])
    except sqlite3.Error:  # it is being made
        return 0


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize(
    ("workers", "fresh"),
    [(1, True), pytest.param(2, False, marks=pytest.mark.xdist_group("ray"))],
    ids=["1", "2"],
)
def test_once_ends_cleanly(
    model_file: str,
    tmp_path: Path,
    workers: int,
    fresh: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two workers need Ray, which the command starts by itself."""
    command = begun(model_file, tmp_path, "--workers", str(workers), fresh=fresh)
    command.send(signal.SIGINT)
    assert command.ended(SECONDS) == 130
    told = command.errors.read_text()
    assert "Traceback" not in told
    assert "best so far for macs<=0.5: trial" in told
    assert f"ranknas resume s --out {tmp_path}" in told
    storage = f"sqlite:///{tmp_path / 's' / 'study.db'}"
    found = optuna.load_study(study_name="s", storage=storage).trials
    broken = [t for t in found if t.state != TrialState.COMPLETE]
    assert 1 <= len(broken) <= workers
    assert {t.state for t in broken} == {TrialState.FAIL}
    assert {t.user_attrs["reason"] for t in broken} == {"interrupted"}
    count = finished(tmp_path)
    (tmp_path / "calls").unlink()
    arguments = ["resume", "s", "--out", str(tmp_path), "--trials", str(count + 2)]
    arguments += ["--workers", "1", "--trust-study", "--json"]
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["ranknas", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    done = capfd.readouterr()
    assert not stopped.value.code, done.err
    # What was broken off is done again, and is no trial of the search.
    assert finished(tmp_path) == count + 2 == len(json.loads(done.out)["trials"])


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_twice_stops_at_once(model_file: str, tmp_path: Path) -> None:
    command = begun(model_file, tmp_path)
    command.send(signal.SIGINT)
    command.send(signal.SIGINT)
    started = time.monotonic()
    assert command.ended(SECONDS) in (-signal.SIGINT, 130)
    assert time.monotonic() - started < 20
    assert finished(tmp_path) >= 3
