"""Ctrl-C during a search, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from safetensors.torch import save_file

from rankNAS.plugins import load_callable

SECONDS = 120.0  # for what should take a few


def begun(model_file: str, tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    """A search whose trials take a while, once it has finished a few of them."""
    objective = tmp_path / "slow.py"
    objective.write_text(
        "import time\n"
        "def slow(network, data):\n"
        "    time.sleep(0.3)\n"
        "    return float(sum(p.numel() for p in network.parameters()))\n"
        "slow.direction = 'minimize'\n"
    )
    weights = tmp_path / "weights.safetensors"
    save_file(load_callable(model_file)(10).state_dict(), weights)
    command = [sys.executable, "-m", "rankNAS", "search", "--space", model_file, "--study", "s"]
    command += ["--weights", str(weights), "--calibration", "64", "--validation", "64"]
    command += ["--out", str(tmp_path), "--strategy", "random", "--budget", "0.5", "--quiet"]
    command += ["--trials", "400", "--objective", f"{objective}:slow", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    until = time.monotonic() + SECONDS
    while len(finished(tmp_path)) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "the search does not begin"
        time.sleep(0.2)
    return process


def trials(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    database = tmp_path / "s" / "study.db"
    if not database.exists():
        return []
    try:
        storage = f"sqlite:///{database}"
        return optuna.load_study(study_name="s", storage=storage).trials
    except Exception:  # it is being made
        return []


def finished(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    return [t for t in trials(tmp_path) if t.state == TrialState.COMPLETE]


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("workers", [1, 2])
def test_once_ends_cleanly(model_file: str, tmp_path: Path, workers: int) -> None:
    process = begun(model_file, tmp_path, "--workers", str(workers))
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert "best so far for macs<=0.5: trial" in told
    assert f"ranknas resume s --out {tmp_path}" in told
    found = trials(tmp_path)
    broken = [t for t in found if t.state != TrialState.COMPLETE]
    assert 1 <= len(broken) <= workers
    assert {t.state for t in broken} == {TrialState.FAIL}
    assert {t.user_attrs["reason"] for t in broken} == {"interrupted"}
    count = len(finished(tmp_path))
    command = [sys.executable, "-m", "rankNAS", "resume", "s", "--out", str(tmp_path)]
    command += ["--trials", str(count + 2), "--workers", "1", "--trust-study", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    # What was broken off is done again, and is no trial of the search.
    assert len(finished(tmp_path)) == count + 2 == len(json.loads(done.stdout)["trials"])


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_twice_stops_at_once(model_file: str, tmp_path: Path) -> None:
    process = begun(model_file, tmp_path)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    process.communicate(timeout=SECONDS)
    assert process.returncode in (-signal.SIGINT, 130)
    assert time.monotonic() - started < 20
    assert len(finished(tmp_path)) >= 3
