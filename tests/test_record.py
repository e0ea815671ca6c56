"""The Optuna record."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.exceptions import StudyError
from rankNAS.record import Record, study_names
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


def test_a_garbage_database_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StudyError, match="storage cannot be used"):
        opened(f"sqlite:///{tmp_path}/s.db")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="storage cannot be used"):
        opened(f"sqlite:///{tmp_path}/none/s.db")
