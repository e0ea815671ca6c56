"""Who evaluates what: outcomes of tasks, and several loops on one study."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from searches import linear_search, opened

import rankNAS
from rankNAS.allocation import Allocation
from rankNAS.evaluation.pruning import PrunedError
from rankNAS.exceptions import ObjectiveError
from rankNAS.execution.scheduler import Evaluation, Outcome, Serial, execute, schedule
from rankNAS.storage.store import Claim

TRIALS = 30


@pytest.fixture(scope="module")
def study() -> rankNAS.Study:
    return linear_search()


class Raising:
    """Stands in for an evaluator."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def costs(self, allocation: Allocation) -> Mapping[str, float]:
        return {"macs": 7.0}

    def evaluate(self, allocation: Allocation, **_: object) -> Mapping[str, float]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (ObjectiveError("no"), "failed", "no"),
        (MemoryError(), "failed", "out of memory"),
        (RuntimeError("[enforce fail] not enough memory: 9"), "failed", "out of memory"),
        (PrunedError("16 validation samples", {"loss": 1.0}), "pruned", "after 16 validation"),
    ],
)
def test_what_goes_wrong_with_a_trial_is_its_outcome(
    study: rankNAS.Study, error: Exception, state: str, reason: str
) -> None:
    evaluation = Evaluation(Claim(study.best.allocation, "t"))
    outcome = execute(Raising(error), evaluation)  # type: ignore[arg-type]
    assert (outcome.state, outcome.evaluation) == (state, evaluation)
    assert reason in outcome.reason
    assert outcome.metrics == ({"macs": 7.0} if state == "pruned" else {})


def test_mistakes_of_ours_are_not_hidden(study: rankNAS.Study) -> None:
    evaluation = Evaluation(Claim(study.best.allocation, "t"))
    with pytest.raises(RuntimeError, match="shapes"):
        execute(Raising(RuntimeError("shapes do not match")), evaluation)  # type: ignore[arg-type]


class Slow(Serial):
    """Evaluates nothing, for a while."""

    count = 0

    def wait(self) -> Sequence[Outcome]:
        time.sleep(0.05)
        self.count += 1
        metrics = {"accuracy": 0.5, "loss": 1.0, "macs": 1.0}
        return [Outcome(self._waiting.pop(0), "complete", metrics)]


@pytest.mark.parametrize("form", ["sqlite:///{}/s.db", "journal:{}/s.log"])
def test_two_loops_share_the_work(study: rankNAS.Study, tmp_path: Path, form: str) -> None:
    executors = [Slow(study.evaluator), Slow(study.evaluator)]

    storage = form.format(tmp_path)

    def work(executor: Slow) -> None:
        with opened(study, storage) as record:
            schedule(replace(study, store=record), TRIALS, executor)

    threads = [threading.Thread(target=work, args=(e,)) for e in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trials = opened(study, storage).history().trials
    assert len(trials) == TRIALS == len({t.allocation for t in trials})
    assert sum(e.count for e in executors) == TRIALS
    assert min(e.count for e in executors) >= TRIALS // 4
