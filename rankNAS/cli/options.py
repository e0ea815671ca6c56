"""The options of a search or a comparison, as given on the command line and kept beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from rankNAS.budget import parse_budgets
from rankNAS.exceptions import RankNASError, StudyError, UsageError
from rankNAS.io.files import read_json
from rankNAS.storage.redaction import without_password

__all__ = [
    "CompareOptions",
    "ModelOptions",
    "SearchOptions",
    "check_name",
    "check_trusted",
    "read_options",
    "study_folder",
    "parsing_context",
]

CONFIGURATION = "config.json"
#: Names that Windows keeps for devices, with any ending.
DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options that ``ranknas search`` and ``ranknas compare`` share; see their help."""

    space: str = "resnet18"
    budget: list[str] = field(default_factory=list)
    cost: str = "macs"
    objective: list[str] = field(default_factory=lambda: ["accuracy"])
    data: str = "digits"
    normalize: str | None = None
    image_size: int | None = None
    weights: str | None = None
    trials: int = 40
    finetune: int = 0
    distill: float = 0.5
    learning_rate: float = 0.01
    norm: str = "fisher"
    operators: str | None = None
    candidates: int = 256
    multiple_of: int = 1
    exclude: list[str] = field(default_factory=list)
    calibration: int = 1024
    validation: int = 1024
    batch_norm: bool = True
    sequential: bool = True
    hardware: str = "host"
    latency_batch: int = 1
    strict_hw: bool = False
    latency_tolerance: float | None = None
    require_speedup: bool = False
    device: str = "cpu"

    @property
    def budgets(self) -> list[dict[str, float]]:
        """The budgets, each cost name to fraction kept.

        Raises:
            BudgetError: They are malformed.
        """
        return parse_budgets(self.budget, self.cost)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ModelOptions):
    """One field an option of ``ranknas compare``; see its help."""

    strategies: str = "all"
    seeds: int = 3
    finetune_samples: int | None = None
    out: str = "ranknas-comparison"


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ModelOptions):
    """One field an option of ``ranknas search``; see its help."""

    strategy: str = "auto"
    seed: int = 0
    study: str | None = None
    storage: str | None = None
    out: str = "ranknas-studies"
    workers: int = 1
    ray_address: str | None = None
    gpus_per_trial: float = 0.0
    trial_timeout: float | None = None
    early_stopping: bool = False
    trial_epochs: int = 0
    trial_samples: int = 2048

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
        """With the study's name: the given one, else a new one (or, to resume, the latest)."""
        if self.study is not None:
            check_name(self.study)
            return self
        parts = [self.space.rpartition("/")[2], self.strategy.rpartition("/")[2], *self.budget]
        stem = re.sub(r"[^A-Za-z0-9._=-]+", "-", "-".join(parts)).strip(".-")[:100]
        if not _is_safe(stem):
            stem = f"study-{stem}"
        names = [stem, *(f"{stem}-{i}" for i in range(2, 10_000))]
        used = [n for n in names if os.path.isfile(Path(self.out) / n / CONFIGURATION)]
        fresh = next(n for n in names if n not in used)
        name = used[-1] if resume and used else fresh
        return replace(self, study=name)

    def code(self) -> list[str]:
        """The options that name a Python file, whose code would run."""
        given: Iterable[str | None] = (
            self.space,
            self.strategy,
            self.data,
            self.hardware,
            *self.objective,
        )
        return [text for text in given if text and ".py:" in text]

    def elsewhere(self) -> list[str]:
        """The options that name other machines, which may run code here or be sent a password."""
        named = [] if self.ray_address is None else ["ray_address"]
        storage = self.storage or ""
        if "://" in storage and not storage.startswith(("sqlite:", "journal:")):
            named.append("storage")
        return named


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


def study_folder(study: str, out: str) -> Path:
    """The folder of a study given by name or path.

    Raises:
        StudyError: There is no such study.
    """
    for folder in (Path(out) / study, Path(study)):
        if os.path.isfile(folder / CONFIGURATION):  # unlike Path's, it takes any text
            return folder
    known = []
    if os.path.isdir(out):
        known = sorted(p.parent.name for p in Path(out).glob(f"*/{CONFIGURATION}"))
    listed = f"; it has {', '.join(known[-5:])}" if known else ""
    raise StudyError(f"there is no study {_short(study)} in {_short(out)}{listed}.")


def read_options(folder: Path) -> SearchOptions:
    """The options a study was started with.

    Nothing in the file is trusted: other types could get past a check and be used all the same.

    Raises:
        StudyError: The file is damaged.
    """
    path = folder / CONFIGURATION
    try:
        stored = read_json(path)
        _check_types(stored)
        options = SearchOptions(**stored)
    except (OSError, ValueError) as error:
        raise StudyError(
            f"the study's configuration {str(path)!r} is damaged: {error}. Restore it, or search "
            "again under another name."
        ) from None
    return replace(options, study=folder.name, out=str(folder.parent))


@contextmanager
def parsing_context(path: Path) -> Iterator[None]:
    """While a parsed file is made sense of, its gaps and wrong types are a StudyError."""
    try:
        yield
    except RankNASError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(
            f"{str(path)!r} is damaged or incomplete: {error!r}. Make it again with: ranknas "
            "resume STUDY."
        ) from None


def _check_types(stored: object) -> None:
    """Raise a ValueError unless this is a mapping of options to values of their types."""
    if not isinstance(stored, dict):
        raise ValueError(f"expected an object of options, got {_short(stored)}")
    hints = get_type_hints(SearchOptions)
    for name, value in stored.items():
        if name not in hints:
            raise ValueError(f"there is no option {_short(name)}")
        if not _is(value, hints[name]):
            kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise ValueError(f"{name} is {_short(value)}, expected {kind}")


def _is(value: object, kind: Any) -> bool:
    """Whether a JSON value is of the type of an option: plain, a union, or a list of texts."""
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 130 else f"{text[:130]}…"
