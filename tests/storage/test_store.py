"""The Optuna record."""

from __future__ import annotations

import time
from pathlib import Path

import optuna
import pytest
import store_worker as worker
from optuna.trial import TrialState

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.exceptions import StudyError
from rankNAS.storage import claims, retries
from rankNAS.storage import store as module
from rankNAS.storage.backends import open_storage
from rankNAS.storage.store import Claim, StudyStore, study_names
from rankNAS.strategies.history import Trial

CHOICES = {"a": ["dense", "svd:2"], "b.conv": ["dense", "tucker2:4x2"]}
ALLOCATION = Allocation.of({"a": Choice("svd", (2,)), "b.conv": DENSE})


def opened(storage: object, resume: bool = False, **change: object) -> StudyStore:
    return StudyStore.open(
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
    store = opened(storage)
    for trial in (done, failed):
        store.add(trial, ("accuracy", "macs"))
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
        Trial(1, worker.ALLOCATIONS[1], "failed", (), {}, 0.0, "because", budget_key="t"),
        Trial(2, worker.ALLOCATIONS[2], "pruned", (), {"x": 0.25}, 0.5, "behind", True, "t"),
    ]
    store = worker.opened(shared)
    assert [store.add(t, ("accuracy",)) for t in trials] == trials
    assert store.history().trials == worker.opened(shared).history().trials == tuple(trials)
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
    store = worker.opened(shared)
    assert store.choices == worker.opened(shared).choices == worker.CHOICES
    assert store.add(worker.evaluated(ONE), ("accuracy",)) is not None


def test_a_claim_is_granted_once(shared: str) -> None:
    store, rival = worker.opened(shared), worker.opened(shared)
    assert store.claim([ONE, ONE], most=9) == [ONE]
    assert rival.claim(PAIR, most=9) == [OTHER]
    assert rival.others() == (ONE,)
    assert store.claim(PAIR, running=[ONE], most=9) == []
    assert store.others() == (OTHER,)
    rival.release([OTHER])
    assert store.claim(PAIR, running=[ONE], most=9) == [OTHER]
    store.close()
    assert rival.claim(PAIR, most=9) == PAIR


def test_what_is_left_out_of_running_is_free(shared: str) -> None:
    store, rival = worker.opened(shared), worker.opened(shared)
    store.claim(PAIR, most=9)
    store.claim([], running=[ONE], most=9)
    assert rival.claim(PAIR, most=9) == [OTHER]


def test_finished_allocations_are_not_granted(shared: str) -> None:
    store, rival = worker.opened(shared), worker.opened(shared)
    store.claim([ONE], most=9)
    store.add(worker.evaluated(ONE), ("accuracy",))
    assert rival.claim(PAIR, most=9) == [OTHER]
    assert rival.others() == ()


def test_no_more_than_the_most_of_each_target(shared: str) -> None:
    def claims(start: int, budget_key: str, probe: bool = False) -> list[Claim]:
        return [Claim(a, budget_key, probe) for a in worker.ALLOCATIONS[start : start + 5]]

    store, rival = worker.opened(shared), worker.opened(shared)
    wanted = [*claims(0, "x"), *claims(10, "y"), *claims(20, "x", probe=True)]
    granted = store.claim(wanted, most={"x": 3, "y": 2})
    assert granted == [*wanted[:3], *wanted[5:7], *wanted[10:]]
    assert rival.claim(claims(30, "x"), most={"x": 3, "y": 2}) == []
    assert rival.claim(claims(30, "z"), most={"x": 3}) == []
    # Failed and pruned ones count; a finished trial that is still claimed counts once.
    failed = Trial(0, granted[0].allocation, "failed", budget_key="x", reason="because")
    store.add(failed, ("accuracy",))
    assert len(rival.claim(claims(30, "x"), most={"x": 4})) == 1
    probe = Trial(
        0, granted[-1].allocation, "failed", probe=True, budget_key="x", reason="because"
    )
    store.add(probe, ("accuracy",))
    assert rival.claim(claims(40, "x"), running=rival._own, most={"x": 4}) == []


def test_claims_of_a_process_that_is_suspended_expire(
    shared: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both evaluate it then, but it is recorded once."""
    store, rival = worker.opened(shared), worker.opened(shared)
    store.claim([ONE], most=9)
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(claims.time, "time", lambda: now + claims.LEASE + 1)
        assert rival.claim([ONE], most=9) == [ONE]
        assert rival.add(worker.evaluated(ONE), ("accuracy",)) is not None
        assert store.add(worker.evaluated(ONE), ("accuracy",)) is None
    assert "recorded by another process" in caplog.text
    assert len(store.history().trials) == len(rival.history().trials) == 1


def test_claims_of_a_killed_process_are_seen_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a claim of one's own: a search waits for the others at its end."""
    monkeypatch.setattr(module, "LOOK", 0.0)
    storage = f"journal:{tmp_path}/study.log"
    store, rival = worker.opened(storage), worker.opened(storage)
    rival.claim([ONE], most=1)
    assert store.claim([OTHER], most=1) == [] and store.others() == (ONE,)
    monkeypatch.setattr(claims, "_born", lambda pid: "later")
    assert store.others() == ()


def test_the_same_process_may_record_an_allocation_twice() -> None:
    """A proposal that fails is put on record as the dense network, each time."""
    store = worker.opened(None)
    for _ in range(2):
        assert store.add(worker.evaluated(ONE), ("accuracy",)) is not None
    assert len(store.history().trials) == 2


def test_a_lease_is_renewed(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE", 0.08)
    monkeypatch.setattr(claims, "LEASE", 3.0)
    store, rival = worker.opened(shared), worker.opened(shared)
    store.claim([ONE], most=9)
    (slot,) = (k for k in store.study.user_attrs if k.startswith("ranknas:claim:"))
    first = store.study.user_attrs[slot]["expires"]
    deadline = time.time() + 30
    while store.study.user_attrs[slot]["expires"] == first and time.time() < deadline:
        time.sleep(0.01)
    assert store.study.user_attrs[slot]["expires"] > first
    assert rival.claim([ONE], most=9) == []
    store.close()
    assert store.study.user_attrs[slot] == {}


def test_a_claim_that_changes_nothing_is_not_written(shared: str) -> None:
    store = worker.opened(shared)
    store.claim([ONE], most=1)
    before = store.study.user_attrs
    for _ in range(3):
        assert store.claim([OTHER], running=[ONE], most=1) == []
    assert store.study.user_attrs == before


@pytest.mark.parametrize("written", [False, True])
def test_a_trial_is_written_once_though_the_connection_breaks(
    shared: str, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is written, or after that and before we hear of it."""
    monkeypatch.setattr(retries, "FIRST", 0.01)
    store = worker.opened(shared)
    add, broken = store.study.add_trial, [2]

    def breaking(trial: object) -> None:
        if broken[0]:
            broken[0] -= 1
            if written and broken[0]:
                add(trial)
            raise retries.ConnectionLostError("gone")
        add(trial)

    monkeypatch.setattr(store.study, "add_trial", breaking)
    assert store.add(worker.evaluated(ONE), ("accuracy",)) is not None
    assert len(worker.opened(shared).study.trials) == 1


def test_trials_of_others_are_left_out_and_late_ones_come_in_their_place() -> None:
    store = worker.opened(None)
    foreign = store.study.ask()
    running = store.study.ask({"layer0": store._format.distributions["layer0"]})
    for claim in PAIR:
        store.add(worker.evaluated(claim), ("accuracy",))
    assert [t.number for t in store.history().trials] == [2, 3]
    store.study.tell(foreign, 1.0)
    store.study.tell(running, 1.0)
    store.study.add_trial(optuna.trial.create_trial(value=2.0))
    store.add(worker.evaluated(Claim(worker.ALLOCATIONS[9], TARGET)), ("accuracy",))
    assert [t.number for t in store.history().trials] == [2, 3, 5]
    assert len(store.history().found) == 3


def test_reading_what_is_new_does_not_depend_on_what_is_known() -> None:
    storage = optuna.storages.InMemoryStorage()
    store = worker.opened(storage)
    template = store._format.finished(worker.evaluated(ONE), "token")
    for _ in range(3000):
        store.study.add_trial(template)
    store.history()
    started = time.perf_counter()
    for _ in range(100):
        store.history()
    assert (time.perf_counter() - started) / 100 < 0.01


def test_what_is_on_lease_is_written_without_a_look_at_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading would make a trial of a long study slower and slower."""
    storage = f"sqlite:///{tmp_path}/study.db"
    store, rival = worker.opened(storage), worker.opened(storage)
    assert store.claim([ONE], most=9) == [ONE]
    rival.claim([OTHER], most=9)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_refresh", lambda: pytest.fail("read"))
        first = store.add(worker.evaluated(ONE), ("accuracy",))
    second = rival.add(worker.evaluated(OTHER), ("accuracy",))
    assert first is not None and second is not None
    assert [t.number for t in rival.known().trials] == [0, 1]
    assert store.history().trials == rival.history().trials == (first, second)


def test_new_trials_are_read_without_a_list_of_all(
    shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rival = worker.opened(shared), worker.opened(shared)
    rival.add(worker.evaluated(ONE), ("accuracy",))
    assert len(store.history().trials) == 1
    rival.add(worker.evaluated(OTHER), ("accuracy",))
    monkeypatch.setattr(store.study, "get_trials", lambda **_: pytest.fail("listed"))
    assert store.history().trials == rival.history().trials
    assert len(store.history().trials) == 2
