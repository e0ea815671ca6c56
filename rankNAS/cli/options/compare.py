"""The options of ``ranknas compare``."""

from __future__ import annotations

from dataclasses import dataclass

from rankNAS.cli.options.common import ConfigurableOptions, LimitOptions
from rankNAS.cli.options.fields import SEARCH, TRAINING, changed, option
from rankNAS.cli.options.model import ModelOptions

__all__ = ["CompareControl", "CompareOptions"]


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ModelOptions):
    """The definition of a comparison."""

    budget: list[str] = changed(ModelOptions, "budget", ["0.5"])
    strategies: str = option(
        "all", "Comma-separated names (see `ranknas strategies`), or 'all'.", SEARCH
    )
    seeds: int = option(3, "Number of repetitions; the seeds are 0, 1, …", SEARCH, min=1)
    finetune_samples: int | None = option(
        None, "Training samples of --finetune. Default: all.", TRAINING, min=1, hidden=True
    )
    out: str = option(
        "ranknas-comparison",
        "Folder of the result. Rows that it contains are not searched again.",
        SEARCH,
    )


@dataclass(frozen=True, kw_only=True)
class CompareControl(ConfigurableOptions, LimitOptions):
    """How a comparison runs; not part of its definition."""
