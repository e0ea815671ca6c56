"""Trials that are written at once are those that Optuna writes."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import optuna
import pytest
import sqlalchemy
import store_worker as worker
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from store_worker import ALLOCATIONS, TARGET, evaluated

from rankNAS.storage import writing
from rankNAS.storage.store import Claim, StudyStore
from rankNAS.storage.writing import TrialWriter
from rankNAS.strategies.history import Trial

FIRST = evaluated(Claim(ALLOCATIONS[7], TARGET))
TRIALS = [
    FIRST,
    replace(FIRST, values=(0.1 + 0.2,), metrics={"accuracy": 0.1 + 0.2, "x": 1e-300}, seconds=1.5),
    Trial(-1, ALLOCATIONS[1], "failed", reason="because of \N{LATIN SMALL LETTER O WITH STROKE}"),
    Trial(-1, ALLOCATIONS[2], "pruned", (), {"loss@4": 0.25}, 0.5, "behind", True, TARGET),
]


def templates(store: StudyStore) -> list[FrozenTrial]:
    return [store._format.finished(trial, f"token{i}") for i, trial in enumerate(TRIALS)]


def essence(trial: FrozenTrial) -> dict[str, Any]:
    """All that is stored of a trial but its place."""
    return {k: v for k, v in vars(trial).items() if k not in ("_trial_id", "_number")}


def rows(storage: RDBStorage, trial_id: int) -> dict[str, list[tuple[Any, ...]]]:
    """What the tables hold of a trial, without the rows' own numbers."""
    tables = sqlalchemy.MetaData()
    tables.reflect(storage.engine)
    found = {}
    with storage.engine.connect() as connection:
        for name, table in tables.tables.items():
            if "trial_id" not in table.columns:
                continue
            (key,) = table.primary_key.columns
            columns = [c for c in table.columns if c.name not in (key.name, "trial_id", "number")]
            query = sqlalchemy.select(*columns).where(table.c.trial_id == trial_id)
            lines = connection.execute(query).all()
            found[name] = sorted((tuple(line) for line in lines), key=repr)
    return found


def test_the_rows_are_those_of_optuna(shared: str) -> None:
    store = worker.opened(shared)
    storage = store._storage
    for number, template in enumerate(templates(store)):
        written = store._writer.write(template)
        assert written == 2 * number
        own = storage.get_trial_id_from_study_id_trial_number(store._id, written)
        other = storage.create_new_trial(store._id, template_trial=template)
        one, two = storage.get_trial(own), storage.get_trial(other)
        assert essence(one) == essence(two) and two.number == written + 1
        if isinstance(storage, RDBStorage):
            found = rows(storage, own)
            assert found == rows(storage, other)
            assert len(found["trial_params"]) == 4 and len(found["trial_user_attributes"]) >= 3


def test_infinite_values_are_stored_as_optuna_does(tmp_path: Any) -> None:
    store = worker.opened(f"sqlite:///{tmp_path}/study.db")
    template = templates(store)[0]
    for value in (float("inf"), float("-inf")):
        template.values = [value]
        number = store._writer.write(template)
        assert store.study.trials[number].values == [value]


def test_another_optuna_writes_by_itself(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna.storages._rdb import models

    monkeypatch.setattr(models, "SCHEMA_VERSION", writing.SCHEMA + 1)
    assert writing._models() is None
    monkeypatch.undo()
    monkeypatch.delattr(models, "TrialParamModel")
    assert writing._models() is None
    monkeypatch.undo()
    assert writing._models() is models

    monkeypatch.setattr(writing, "_models", lambda: None)
    store = worker.opened(shared)
    assert store._writer._models is None
    first, second = (store.add(evaluated(Claim(a, TARGET)), ("x",)) for a in ALLOCATIONS[:2])
    assert first is not None and second is not None and (first.number, second.number) == (0, 1)
    assert worker.opened(shared).history().trials == (first, second)


def test_nothing_is_left_of_a_trial_that_cannot_be_written(tmp_path: Any) -> None:
    store = worker.opened(f"sqlite:///{tmp_path}/study.db")
    template = templates(store)[0]
    template.user_attrs = {"x": object()}
    with pytest.raises(TypeError):
        store._writer.write(template)
    assert optuna.load_study(study_name="name", storage=store._storage).trials == []
    template.user_attrs = {"x": 1}
    assert store._writer.write(template) == 0


def test_dates_are_read_as_they_were_written(shared: str) -> None:
    store = worker.opened(shared)
    template = templates(store)[0]
    ended = datetime(2026, 3, 29, 12, 0, 0, 123456)
    template.datetime_start, template.datetime_complete = ended - timedelta(days=1), ended
    number = store._writer.write(template)
    found = worker.opened(shared).study.trials[number]
    assert (found.datetime_start, found.datetime_complete) == (ended - timedelta(days=1), ended)


def test_writers_are_of_one_study() -> None:
    store = worker.opened(None)
    writer = TrialWriter(store._storage, store._id, store._format.distributions)
    assert [writer.write(t) for t in templates(store)] == [0, 1, 2, 3]
