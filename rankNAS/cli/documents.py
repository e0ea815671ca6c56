"""The document that describes a study: its result, or its trials while the search runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage

from rankNAS.cli.options.search import SearchOptions
from rankNAS.cli.results import describe_trial, load_result
from rankNAS.exceptions import StudyError, UsageError
from rankNAS.renamed import OBJECTIVES
from rankNAS.storage.backends import open_storage, storage_name
from rankNAS.storage.redaction import redacted
from rankNAS.storage.store import CHOICES, CONFIGURATION, StudyStore

__all__ = ["load_study", "open_recorded", "study_document", "without_passwords"]


def study_document(options: SearchOptions, *, trust: bool = False) -> dict[str, Any]:
    """The result document of a study; without solutions if the search has not ended.

    Args:
        options: The options in the study's folder.
        trust: As for `open_recorded`.

    Raises:
        StudyError: There is neither a result nor a readable storage.
    """
    if (options.folder / "result.json").is_file():
        return load_result(options.folder)
    storage = open_recorded(options, trust=trust)
    study = load_study(options, storage)
    attributes = study.user_attrs
    store = StudyStore(study, storage, attributes[CHOICES])
    given = [o.rpartition("=") for o in attributes[CONFIGURATION]["objectives"]]
    objectives = [(OBJECTIVES.get(name, name), direction) for name, _, direction in given]
    return {
        "study": options.study,
        "strategy": options.strategy,
        "space": options.space,
        "task": options.task,
        "metrics": [],  # known with the result
        "cost": options.cost,
        "objectives": [name for name, _ in objectives],
        "directions": [direction for _, direction in objectives],
        "dense": {},
        "solutions": [],
        "trials": [describe_trial(t) for t in store.history().trials],
    }


def open_recorded(options: SearchOptions, *, trust: bool) -> BaseStorage:
    """The storage named by a study's options.

    Args:
        options: The options in the study's folder.
        trust: Whether to open a storage other than an SQLite file; such a storage can be on
            another machine and load a driver.

    Raises:
        UsageError: The storage is not trusted.
        StudyError: The storage cannot be read.
    """
    if "storage" in options.elsewhere() and not trust:
        raise UsageError(
            "the study's options name a storage that may be on another machine, "
            f"{redacted(options.storage)}; add --trust-study if you trust it."
        )
    return open_storage(options.storage_url, create=False)


def load_study(options: SearchOptions, storage: BaseStorage) -> optuna.Study:
    """The Optuna study of a search.

    Raises:
        StudyError: The storage has no such study.
    """
    try:
        study = optuna.load_study(study_name=options.study, storage=storage)
        ours = CONFIGURATION in study.user_attrs
    except KeyError:
        ours = False
    if not ours:
        raise StudyError(
            f"the storage {storage_name(storage)} has no study {options.study!r} of RankNAS; "
            f"begin it with: ranknas search --study {options.study}."
        )
    return study


def without_passwords(value: Any) -> Any:
    """A copy of JSON values with passwords removed from all texts."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {redacted(key): without_passwords(item) for key, item in value.items()}
    return [without_passwords(v) for v in value] if isinstance(value, list | tuple) else value
