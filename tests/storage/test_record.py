"""The Optuna record."""

from __future__ import annotations

import time
from pathlib import Path

import optuna
import pytest
import record_worker as worker
from optuna.trial import TrialState

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.exceptions import StudyError
from rankNAS.storage import claims, retries
from rankNAS.storage import record as module
from rankNAS.storage.backends import open_storage
from rankNAS.storage.record import Claim, Record, study_names
from rankNAS.strategies.base import Trial

CHOICES = {"a": ["dense", "svd:2"], "b.conv": ["dense", "tucker2:4x2"]}
ALLOCATION = Allocation.of({"a": Choice("svd", (2,)), "b.conv": DENSE})


def opened(storage: object, resume: bool = False, **change: object) -> Record:
    return Record.open(
        storage,  # type: ignore[arg-type]
        "name",
        configuration={"seed": 0, **change},
        choices=CHOICES,
        directions=("maximize", "minimize"),
        resume=resume,
    )


def test_trials_survive_the_round_trip(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    done = Trial(0, ALLOCATION, "complete", (0.1 + 0.2, 3.0), {"accuracy": 0.1 + 0.2}, 1.5)
    failed = Trial(1, ALLOCATION, "failed", reason="because")
    record = opened(storage)
    for trial in (done, failed):
        record.add(trial, ("accuracy", "macs"))
    again = opened(storage, resume=True).history().trials
    assert again == (done, failed)


def test_optuna_sees_parameters_values_and_attributes(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    opened(storage).add(
        Trial(0, ALLOCATION, "complete", (0.5, 3.0), {"accuracy": 0.5}, 2.0), ("accuracy", "macs")
    )
    study = optuna.load_study(storage=storage, study_name="name")
    (trial,) = study.trials
    assert trial.params == {"a": "svd:2", "b.conv": "dense"}
    assert trial.values == [0.5, 3.0]
    assert trial.user_attrs["accuracy"] == 0.5
    assert trial.duration is not None and trial.duration.total_seconds() == pytest.approx(2.0)
    assert study.best_trials[0].number == 0
    assert study_names(storage) == ["name"]


@pytest.mark.parametrize("kind", ["memory", "journal"])
def test_other_storages(tmp_path: Path, kind: str) -> None:
    if kind == "memory":
        storage: optuna.storages.BaseStorage = optuna.storages.InMemoryStorage()
    else:
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "j.log"))
        storage = optuna.storages.JournalStorage(backend)
    opened(storage).add(Trial(0, ALLOCATION, "complete", (1.0, 2.0)), ("x", "y"))
    assert len(opened(storage, resume=True).history().complete) == 1


def test_a_study_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(
        storage=storage, study_name="name", directions=["maximize", "minimize"]
    )
    study.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    with pytest.raises(StudyError, match="was not made by RankNAS"):
        opened(storage, resume=True)


def test_differing_configuration_is_named(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    opened(storage)
    with pytest.raises(StudyError, match="seed was 0, is 1"):
        opened(storage, resume=True, seed=1)


# ------------------------------------------------------------------------ any shared storage

TARGET = worker.TARGET
PAIR = [Claim(a, TARGET) for a in worker.ALLOCATIONS[:2]]
ONE, OTHER = PAIR


def test_all_states_survive_the_round_trip(shared: str) -> None:
    trials = [
        Trial(0, worker.ALLOCATIONS[0], "complete", (0.1 + 0.2,), {"x": 1e-300}, 1.5),
        Trial(1, worker.ALLOCATIONS[1], "failed", (), {}, 0.0, "because", target="t"),
        Trial(2, worker.ALLOCATIONS[2], "pruned", (), {"x": 0.25}, 0.5, "behind", True, "t"),
    ]
    record = worker.opened(shared)
    assert [record.add(t, ("accuracy",)) for t in trials] == trials
    assert record.history().trials == worker.opened(shared).history().trials == tuple(trials)
    states = [t.state for t in worker.opened(shared).study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED]


def test_values_of_a_pruned_trial_are_not_kept() -> None:
    trial = worker.opened(None).add(
        Trial(0, worker.ALLOCATIONS[0], "pruned", (0.5,), {"accuracy": 0.5}), ("accuracy",)
    )
    assert trial is not None and trial.values == () and trial.metrics == {"accuracy": 0.5}


def test_another_configuration_is_refused_everywhere(shared: str) -> None:
    worker.opened(shared)
    with pytest.raises(StudyError, match="seed was 0, is 1"):
        worker.opened(shared, seed=1)


@pytest.mark.parametrize("attributes", [{}, {"ranknas:choices": {"a": ["dense"]}}])
def test_a_start_that_was_killed_is_done_again(shared: str, attributes: dict[str, object]) -> None:
    """Between making the study and writing its configuration, or in the middle of that."""
    storage = open_storage(shared)
    study = optuna.create_study(storage=storage, study_name="name", directions=["maximize"])
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    record = worker.opened(shared)
    assert record.choices == worker.opened(shared).choices == worker.CHOICES
    assert record.add(worker.evaluated(ONE), ("accuracy",)) is not None


def test_a_claim_is_granted_once(shared: str) -> None:
    record, rival = worker.opened(shared), worker.opened(shared)
    assert record.claim([ONE, ONE], most=9) == [ONE]
    assert rival.claim(PAIR, most=9) == [OTHER]
    assert rival.others() == (ONE,)
    assert record.claim(PAIR, running=[ONE], most=9) == []
    assert record.others() == (OTHER,)
    rival.release([OTHER])
    assert record.claim(PAIR, running=[ONE], most=9) == [OTHER]
    record.close()
    assert rival.claim(PAIR, most=9) == PAIR


def test_what_is_left_out_of_running_is_free(shared: str) -> None:
    record, rival = worker.opened(shared), worker.opened(shared)
    record.claim(PAIR, most=9)
    record.claim([], running=[ONE], most=9)
    assert rival.claim(PAIR, most=9) == [OTHER]


def test_finished_allocations_are_not_granted(shared: str) -> None:
    record, rival = worker.opened(shared), worker.opened(shared)
    record.claim([ONE], most=9)
    record.add(worker.evaluated(ONE), ("accuracy",))
    assert rival.claim(PAIR, most=9) == [OTHER]
    assert rival.others() == ()


def test_no_more_than_the_most_of_each_target(shared: str) -> None:
    def claims(start: int, target: str, probe: bool = False) -> list[Claim]:
        return [Claim(a, target, probe) for a in worker.ALLOCATIONS[start : start + 5]]

    record, rival = worker.opened(shared), worker.opened(shared)
    wanted = [*claims(0, "x"), *claims(10, "y"), *claims(20, "x", probe=True)]
    granted = record.claim(wanted, most={"x": 3, "y": 2})
    assert granted == [*wanted[:3], *wanted[5:7], *wanted[10:]]
    assert rival.claim(claims(30, "x"), most={"x": 3, "y": 2}) == []
    assert rival.claim(claims(30, "z"), most={"x": 3}) == []
    # Failed and pruned ones count; a finished trial that is still claimed counts once.
    failed = Trial(0, granted[0].allocation, "failed", target="x", reason="because")
    record.add(failed, ("accuracy",))
    assert len(rival.claim(claims(30, "x"), most={"x": 4})) == 1
    probe = Trial(0, granted[-1].allocation, "failed", probe=True, target="x", reason="because")
    record.add(probe, ("accuracy",))
    assert rival.claim(claims(40, "x"), running=rival._own, most={"x": 4}) == []


def test_claims_of_a_process_that_is_suspended_expire(
    shared: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both evaluate it then, but it is recorded once."""
    record, rival = worker.opened(shared), worker.opened(shared)
    record.claim([ONE], most=9)
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(claims.time, "time", lambda: now + claims.LEASE + 1)
        assert rival.claim([ONE], most=9) == [ONE]
        assert rival.add(worker.evaluated(ONE), ("accuracy",)) is not None
        assert record.add(worker.evaluated(ONE), ("accuracy",)) is None
    assert "recorded by another process" in caplog.text
    assert len(record.history().trials) == len(rival.history().trials) == 1


def test_claims_of_a_killed_process_are_seen_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a claim of one's own: a search waits for the others at its end."""
    monkeypatch.setattr(module, "LOOK", 0.0)
    storage = f"journal:{tmp_path}/study.log"
    record, rival = worker.opened(storage), worker.opened(storage)
    rival.claim([ONE], most=1)
    assert record.claim([OTHER], most=1) == [] and record.others() == (ONE,)
    monkeypatch.setattr(claims, "_born", lambda pid: "later")
    assert record.others() == ()


def test_the_same_process_may_record_an_allocation_twice() -> None:
    """A proposal that fails is put on record as the dense network, each time."""
    record = worker.opened(None)
    for _ in range(2):
        assert record.add(worker.evaluated(ONE), ("accuracy",)) is not None
    assert len(record.history().trials) == 2


def test_a_lease_is_renewed(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE", 0.08)
    monkeypatch.setattr(claims, "LEASE", 3.0)
    record, rival = worker.opened(shared), worker.opened(shared)
    record.claim([ONE], most=9)
    (slot,) = (k for k in record.study.user_attrs if k.startswith("ranknas:claim:"))
    first = record.study.user_attrs[slot]["expires"]
    deadline = time.time() + 30
    while record.study.user_attrs[slot]["expires"] == first and time.time() < deadline:
        time.sleep(0.01)
    assert record.study.user_attrs[slot]["expires"] > first
    assert rival.claim([ONE], most=9) == []
    record.close()
    assert record.study.user_attrs[slot] == {}


def test_a_claim_that_changes_nothing_is_not_written(shared: str) -> None:
    record = worker.opened(shared)
    record.claim([ONE], most=1)
    before = record.study.user_attrs
    for _ in range(3):
        assert record.claim([OTHER], running=[ONE], most=1) == []
    assert record.study.user_attrs == before


@pytest.mark.parametrize("written", [False, True])
def test_a_trial_is_written_once_though_the_connection_breaks(
    shared: str, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is written, or after that and before we hear of it."""
    monkeypatch.setattr(retries, "FIRST", 0.01)
    record = worker.opened(shared)
    add, broken = record.study.add_trial, [2]

    def breaking(trial: object) -> None:
        if broken[0]:
            broken[0] -= 1
            if written and broken[0]:
                add(trial)
            raise retries.ConnectionLostError("gone")
        add(trial)

    monkeypatch.setattr(record.study, "add_trial", breaking)
    assert record.add(worker.evaluated(ONE), ("accuracy",)) is not None
    assert len(worker.opened(shared).study.trials) == 1


def test_trials_of_others_are_left_out_and_late_ones_come_in_their_place() -> None:
    record = worker.opened(None)
    foreign = record.study.ask()
    running = record.study.ask({"layer0": record._format.distributions["layer0"]})
    for claim in PAIR:
        record.add(worker.evaluated(claim), ("accuracy",))
    assert [t.number for t in record.history().trials] == [2, 3]
    record.study.tell(foreign, 1.0)
    record.study.tell(running, 1.0)
    record.study.add_trial(optuna.trial.create_trial(value=2.0))
    record.add(worker.evaluated(Claim(worker.ALLOCATIONS[9], TARGET)), ("accuracy",))
    assert [t.number for t in record.history().trials] == [2, 3, 5]
    assert len(record.history().found) == 3


def test_reading_what_is_new_does_not_depend_on_what_is_known() -> None:
    storage = optuna.storages.InMemoryStorage()
    record = worker.opened(storage)
    template = record._format.finished(worker.evaluated(ONE), "token")
    for _ in range(3000):
        record.study.add_trial(template)
    record.history()
    started = time.perf_counter()
    for _ in range(100):
        record.history()
    assert (time.perf_counter() - started) / 100 < 0.01


def test_what_is_on_lease_is_written_without_a_look_at_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading would make a trial of a long study slower and slower."""
    storage = f"sqlite:///{tmp_path}/study.db"
    record, rival = worker.opened(storage), worker.opened(storage)
    assert record.claim([ONE], most=9) == [ONE]
    rival.claim([OTHER], most=9)
    with monkeypatch.context() as patch:
        patch.setattr(record, "_refresh", lambda: pytest.fail("read"))
        first = record.add(worker.evaluated(ONE), ("accuracy",))
    second = rival.add(worker.evaluated(OTHER), ("accuracy",))
    assert first is not None and second is not None
    assert [t.number for t in rival.known().trials] == [0, 1]
    assert record.history().trials == rival.history().trials == (first, second)


def test_new_trials_are_read_without_a_list_of_all(
    shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, rival = worker.opened(shared), worker.opened(shared)
    rival.add(worker.evaluated(ONE), ("accuracy",))
    assert len(record.history().trials) == 1
    rival.add(worker.evaluated(OTHER), ("accuracy",))
    monkeypatch.setattr(record.study, "get_trials", lambda **_: pytest.fail("listed"))
    assert record.history().trials == rival.history().trials
    assert len(record.history().trials) == 2
