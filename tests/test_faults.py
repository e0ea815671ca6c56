"""A search that is killed, again and again."""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
from searches import linear_search, opened
from torch import Tensor, nn

import rankNAS
from rankNAS.engine import run
from rankNAS.io.formats import TRIAL_METRICS
from rankNAS.objectives import Objective

KILLS, TRIALS = 50, 120
SECONDS = 0.03  # of an evaluation, beyond what it takes


def slow(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    time.sleep(SECONDS)
    return float(sum(p.numel() for p in network.parameters()))


def prepared() -> rankNAS.Study:
    """A search whose state is made once; processes that are forked from this one go on with it."""
    return linear_search(objectives=[Objective(slow, direction="minimize")])


def go_on(study: rankNAS.Study, storage: str, told: int) -> None:
    """What a process that resumes the search does; it tells of each trial that it recorded."""
    with opened(study, storage) as store:
        study.store = store
        study.evaluator.forget()
        run(study, TRIALS, lambda trial, best: _tell(told, trial.number))


def _tell(told: int, number: int) -> None:
    os.write(told, f"{number}\n".encode())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.parametrize(("kind", "most"), [("sqlite", KILLS), ("journal", 15)])
def test_nothing_is_lost_or_doubled_by_kills_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: int
) -> None:
    storage = f"sqlite:///{tmp_path}/s.db" if kind == "sqlite" else f"journal:{tmp_path}/s.log"
    study = prepared()
    moments = random.Random(0)
    read, told = os.pipe()
    text, kills, whole = b"", 0, False
    while kills < most and not whole:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                go_on(study, storage, told)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        if kills % 3:  # after it has begun to record trials; else perhaps before
            while not select.select([read], [], [], 0.0)[0]:
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break
                time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        while select.select([read], [], [], 0.0)[0]:
            text += os.read(read, 65536)
        kills += os.WIFSIGNALED(status)
        whole = not os.WIFSIGNALED(status)
        assert not whole or os.waitstatus_to_exitcode(status) == 0
    monkeypatch.setitem(globals(), "SECONDS", 0.0)  # nobody is killed from here on
    numbers = [int(line) for line in text.split()]
    assert len(set(numbers)) == len(numbers)
    survived = optuna_trials(storage)
    assert set(numbers) <= set(survived)  # whatever was called recorded is there
    store = opened(study, storage)
    own = [t.allocation for t in store.history().trials]
    assert len(set(own)) == len(own) == len(survived)
    again = opened(study, None)
    study.store = store
    run(study, TRIALS)
    store.close()
    finished = store.history().trials
    assert len(finished) == TRIALS
    # The same search without a kill proposes the same.
    study.store = again
    study.evaluator.forget()
    run(study, TRIALS)
    assert [t.allocation for t in finished] == [t.allocation for t in again.history().trials]
    assert kills == most


def optuna_trials(storage: str) -> list[int]:
    """Numbers of the finished trials, by Optuna itself; each one whole."""
    if storage.startswith("journal:"):
        backend = optuna.storages.journal.JournalFileBackend(storage.removeprefix("journal:"))
        opened: str | optuna.storages.BaseStorage = optuna.storages.JournalStorage(backend)
    else:
        opened = storage
    trials = optuna.load_study(study_name="study", storage=opened).trials
    assert all(t.state == optuna.trial.TrialState.COMPLETE for t in trials)
    assert all(len(t.params) == 5 and TRIAL_METRICS in t.user_attrs and t.values for t in trials)
    return [t.number for t in trials]
