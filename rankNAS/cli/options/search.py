"""The options of ``ranknas search`` and ``ranknas resume``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankNAS.cli.options.common import (
    STUDIES,
    ConfigurableOptions,
    LimitOptions,
    OutputOptions,
    StudyOptions,
    TrustOptions,
)
from rankNAS.cli.options.fields import RUNNING, SEARCH, TRAINING, changed, option
from rankNAS.cli.options.model import ModelOptions
from rankNAS.exceptions import UsageError
from rankNAS.storage.redaction import without_password

__all__ = ["ResumeOptions", "SearchControl", "SearchOptions", "check_name", "check_trusted"]

CONFIGURATION = "config.json"
#: Device names reserved by Windows, with any extension.
DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))}


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ModelOptions):
    """The definition of a search; stored in the study's folder."""

    strategy: str = option(
        "auto", "Strategy: a name (see `ranknas strategies`) or file.py:factory.", SEARCH
    )
    seed: int = option(0, "Random seed.", SEARCH, min=0, max=2**32 - 1)
    study: str | None = option(None, "Name of the study. Default: a new one.", SEARCH)
    start: str | None = option(
        None,
        "Evaluate this allocation first: a file such as best.json, or the best of a study.",
        SEARCH,
        hidden=True,
    )
    storage: str | None = option(
        None,
        "sqlite:///FILE, journal:FILE (for network file systems) or a database URL such as "
        "postgresql://USER@HOST/NAME, with its password in RANKNAS_STORAGE_PASSWORD. Default: "
        "study.db in the study's folder.",
        RUNNING,
    )
    out: str = option(STUDIES, "Folder that contains the studies' folders.", SEARCH)
    workers: int = option(
        1, "Number of trials evaluated at the same time, by Ray.", RUNNING, min=1
    )
    ray_address: str | None = option(
        None,
        "Ray cluster to join: auto or HOST:PORT. Default: start Ray here.",
        RUNNING,
        hidden=True,
    )
    gpus_per_trial: float = option(
        0.0, "GPUs per worker; a fraction shares one.", RUNNING, min=0, hidden=True
    )
    trial_timeout: float | None = option(
        None, "Seconds after which a trial fails.", RUNNING, hidden=True
    )
    early_stopping: bool = option(
        False,
        "Prune trials early (asynchronous successive halving), after some of the --trial-epochs "
        "or on a part of the validation data.",
        TRAINING,
        hidden=True,
    )
    trial_epochs: int = option(
        0, "Number of epochs that each trial's network is trained.", TRAINING, min=0, hidden=True
    )
    trial_samples: int = option(
        2048, "Training samples per epoch of --trial-epochs.", TRAINING, min=2, hidden=True
    )

    @property
    def folder(self) -> Path:
        """The study's folder."""
        assert self.study is not None
        return Path(self.out) / self.study

    @property
    def storage_url(self) -> str:
        """The given storage, or the embedded one in the study's folder."""
        return self.storage or f"sqlite:///{(self.folder / 'study.db').absolute()}"

    def to_json(self) -> dict[str, Any]:
        storage = None if self.storage is None else without_password(self.storage)
        return {**super().to_json(), "storage": storage}

    def named(self, resume: bool) -> SearchOptions:
        """Options with the study's name: the given one, else a new one (the latest to resume)."""
        if self.study is not None:
            check_name(self.study)
            return self
        parts = [self.space.rpartition("/")[2], self.strategy.rpartition("/")[2], *self.budget]
        stem = re.sub(r"[^A-Za-z0-9._=-]+", "-", "-".join(parts)).strip(".-")[:100]
        if not _is_safe(stem):
            stem = f"study-{stem}"
        names = [stem, *(f"{stem}-{i}" for i in range(2, 10_000))]
        # Not by `Path`, which takes ten times as long.
        used = [n for n in names if os.path.isfile(os.path.join(self.out, n, CONFIGURATION))]
        fresh = next(n for n in names if n not in used)
        name = used[-1] if resume and used else fresh
        return replace(self, study=name)

    def code(self) -> list[str]:
        """Options that name a Python file, whose code would run."""
        given: Iterable[str | None] = (
            self.space,
            self.strategy,
            self.data,
            self.task,
            self.hardware,
            *self.objective,
        )
        return [text for text in given if text and ".py:" in text]

    def elsewhere(self) -> list[str]:
        """Options that name other machines, which may run code here or receive a password."""
        named = [] if self.ray_address is None else ["ray_address"]
        storage = self.storage or ""
        if "://" in storage and not storage.startswith(("sqlite:", "journal:")):
            named.append("storage")
        return named


@dataclass(frozen=True, kw_only=True)
class SearchControl(ConfigurableOptions, LimitOptions):
    """How a search runs; not part of the study."""

    resume: bool = option(False, "Continue the study if it exists.", SEARCH)


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(OutputOptions, TrustOptions, LimitOptions, StudyOptions):
    """A study to continue, and its changed options."""

    trials: int | None = changed(
        SearchOptions, "trials", None, "Total number of trials per budget. Default: as before."
    )
    budget: list[str] = changed(
        SearchOptions,
        "budget",
        [],
        "Other bounds on the same costs. Default: as before. Repeatable.",
    )
    storage: str | None = changed(
        SearchOptions, "storage", None, "Another storage. Default: as before."
    )
    workers: int | None = changed(SearchOptions, "workers", None)
    recover: str | None = changed(
        SearchOptions, "recover", None, "Another recipe. Default: as before."
    )
    trust_study: bool = changed(
        TrustOptions,
        "trust_study",
        False,
        "Run the Python files, and connect to the machines, that the study's options name.",
    )

    @property
    def changes(self) -> dict[str, Any]:
        """The search options given on the command line."""
        names = ("trials", "budget", "storage", "workers", "recover")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value not in (None, [])}


def check_name(name: str) -> None:
    """Raise a UsageError unless a study's name is safe as the name of a folder."""
    if not _is_safe(name):
        raise UsageError(
            "`--study` must be 1 to 120 letters, digits or any of ._=-, not start with a dot or a "
            f"dash, and be no name of a device such as con, got {name[:130]!r}."
        )


def _is_safe(name: str) -> bool:
    written = re.fullmatch(r"[A-Za-z0-9_=][A-Za-z0-9._=-]{0,119}", name) is not None
    return written and name.partition(".")[0].lower() not in DEVICES


def check_trusted(options: SearchOptions) -> None:
    """Raise a UsageError if options from a file would run code or connect to other machines."""
    if code := options.code():
        raise UsageError(
            f"the study's options name Python files ({', '.join(code)}), whose code would run; "
            "add --trust-study if you trust them."
        )
    if named := options.elsewhere():
        raise UsageError(
            f"the study's options name other machines ({', '.join(named)}), which may run code "
            "here; look at its config.json and add --trust-study if you trust them."
        )
