"""Options that several commands share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rankNAS.cli.options.fields import (
    MODEL,
    OUTPUT,
    RANKS,
    RUNNING,
    SEARCH,
    Options,
    argument,
    option,
)
from rankNAS.exceptions import UsageError

__all__ = [
    "ConfigurableOptions",
    "JsonOptions",
    "LimitOptions",
    "OutputOptions",
    "SpaceOptions",
    "StudyOptions",
    "TrustOptions",
]

STUDIES = "ranknas-studies"


@dataclass(frozen=True, kw_only=True)
class SpaceOptions(Options):
    """A network, and the candidate ranks of its layers."""

    space: str = option(
        "resnet18",
        "Network: a built-in space, torchvision:NAME, timm:NAME, hf:FOLDER or "
        "path/to/file.py:factory.",
        MODEL,
    )
    image_size: int | None = option(None, "Side of the input images in pixels.", MODEL, min=1)
    operators: str | None = option(
        None,
        "Operators, comma-separated: svd,spatial_svd,tucker2,group_svd. Default: all, or those of "
        "the method.",
        RANKS,
    )
    candidates: int = option(
        256, "Maximum number of choices per layer.", RANKS, min=1, hidden=True
    )
    split_fused: bool = option(
        False, "Split layers that hold query, key and value, or gate and up.", RANKS, hidden=True
    )
    multiple_of: int = option(1, "Ranks are multiples of this number.", RANKS, min=1, hidden=True)
    exclude: list[str] = option(
        [],
        "Layers that stay dense: a regular expression, or a role such as role:k. Repeatable.",
        RANKS,
    )


@dataclass(frozen=True, kw_only=True)
class JsonOptions(Options):
    """The form of the output."""

    json: bool = option(False, "Print one JSON document on stdout.", OUTPUT)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(JsonOptions):
    """The form of the output, and progress."""

    quiet: bool = option(False, "Show no progress on stderr.", OUTPUT)


@dataclass(frozen=True, kw_only=True)
class ConfigurableOptions(OutputOptions):
    """Options of a command whose other options may come from a file."""

    config: str | None = option(
        None, "Read options from a TOML file; the command line takes precedence.", OUTPUT
    )
    print_config: bool = option(
        False,
        "Print all options, with those that this help leaves out, as TOML for --config.",
        OUTPUT,
    )


@dataclass(frozen=True, kw_only=True)
class LimitOptions(Options):
    """How long a command may take; not part of a study.

    Raises:
        UsageError: The limit is not a positive number.
    """

    time_limit: float | None = option(
        None,
        "Seconds from the start of the command after which the best answer so far is kept.",
        RUNNING,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise UsageError(
                f"`--time-limit` must be a positive number of seconds, got {self.time_limit:g}."
            )


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """An existing study."""

    study: str = argument("Name of a study in --out, or path of its folder.")
    out: str = option(STUDIES, "Folder that contains the studies' folders.", SEARCH)


@dataclass(frozen=True, kw_only=True)
class TrustOptions(Options):
    """Whether a study's own options may name another machine."""

    trust_study: bool = option(
        False, "Open the storage that the study's options name, on any machine.", RUNNING
    )
