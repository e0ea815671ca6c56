"""The options of a search or a comparison, as given on the command line and kept beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rankNAS.budget import parse_budgets
from rankNAS.exceptions import StudyError, UsageError

__all__ = [
    "CompareOptions",
    "ModelOptions",
    "SearchOptions",
    "check_name",
    "read_options",
    "study_folder",
]

CONFIGURATION = "config.json"


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
    metric: str = "fisher"
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
    latency_steps: float | None = None
    only_faster: bool = False
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

    @property
    def folder(self) -> Path:
        """The study's folder."""
        assert self.study is not None
        return Path(self.out) / self.study

    @property
    def storage_url(self) -> str:
        """The given storage, or the embedded one in the study's folder."""
        return self.storage or f"sqlite:///{(self.folder / 'study.db').absolute()}"

    def named(self, resume: bool) -> SearchOptions:
        """With the study's name: the given one, else a new one (or, to resume, the latest)."""
        if self.study is not None:
            check_name(self.study)
            return self
        parts = [self.space.rpartition("/")[2], self.strategy.rpartition("/")[2], *self.budget]
        stem = re.sub(r"[^A-Za-z0-9._=-]+", "-", "-".join(parts)).strip(".-")[:100]
        names = [stem, *(f"{stem}-{i}" for i in range(2, 10_000))]
        used = [n for n in names if (Path(self.out) / n / CONFIGURATION).exists()]
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


def check_name(name: str) -> None:
    """Raise a UsageError unless a study's name is safe as the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_=][A-Za-z0-9._=-]{0,119}", name):
        raise UsageError(
            f"`--study` must be 1 to 120 letters, digits or any of ._=- and not start with a dot "
            f"or a dash, got {name[:130]!r}."
        )


def study_folder(study: str, out: str) -> Path:
    """The folder of a study given by name or path.

    Raises:
        StudyError: There is no such study.
    """
    for folder in (Path(out) / study, Path(study)):
        if (folder / CONFIGURATION).is_file():
            return folder
    known = sorted(p.parent.name for p in Path(out).glob(f"*/{CONFIGURATION}"))
    listed = f"; it has {', '.join(known[-5:])}" if known else ""
    raise StudyError(f"there is no study {study!r} in {out!r}{listed}.")


def read_options(folder: Path) -> SearchOptions:
    """The options a study was started with.

    Raises:
        StudyError: The file is damaged.
    """
    path = folder / CONFIGURATION
    try:
        stored = json.loads(path.read_text())
        options = SearchOptions(**stored)
    except (OSError, ValueError, TypeError) as error:
        raise StudyError(f"the study's configuration {str(path)!r} is damaged: {error}.") from None
    return replace(options, study=folder.name, out=str(folder.parent))
