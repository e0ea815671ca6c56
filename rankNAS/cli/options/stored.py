"""The options in a study's folder, and the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankNAS.cli.options.fields import checked
from rankNAS.cli.options.model import ModelOptions
from rankNAS.cli.options.search import CONFIGURATION, SearchOptions
from rankNAS.exceptions import RankNASError, StudyError
from rankNAS.io.files import read_json, write_json
from rankNAS.io.formats import FORMAT, current_format, format_of, upgraded

__all__ = [
    "current_options",
    "options_format",
    "parsing_context",
    "read_options",
    "study_folder",
    "write_options",
]


def study_folder(study: str, out: str) -> Path:
    """The folder of a study given by name or path.

    Raises:
        StudyError: There is no such study.
    """
    for folder in (Path(out) / study, Path(study)):
        if os.path.isfile(folder / CONFIGURATION):  # unlike Path.is_file, accepts any string
            return folder
    known = []
    if os.path.isdir(out):
        known = sorted(p.parent.name for p in Path(out).glob(f"*/{CONFIGURATION}"))
    listed = f"; it has {', '.join(known[-5:])}" if known else ""
    raise StudyError(f"there is no study {_short(study)} in {_short(out)}{listed}.")


def read_options(folder: Path) -> SearchOptions:
    """The options of a study from its folder.

    All content of the file is checked: values of wrong types could otherwise bypass later checks.

    Raises:
        StudyError: The file is damaged.
    """
    path = folder / CONFIGURATION
    try:
        options = SearchOptions(**checked(SearchOptions, current_options(read_json(path), path)))
    except StudyError:
        raise
    except (OSError, ValueError) as error:
        raise StudyError(
            f"the study's configuration {str(path)!r} is damaged: {error}. Restore it, or search "
            "again under another name."
        ) from None
    return replace(options, study=folder.name, out=str(folder.parent))


def current_options(content: Any, path: Path) -> Any:
    """The content of an options file in the current format, without the format.

    Every options file passes through this function before it becomes a dataclass. Wrong content is
    returned unchanged; `checked` reports it.

    Args:
        content: The parsed file.
        path: The file.

    Raises:
        StudyError: The format is newer than this version.
    """
    if not isinstance(content, dict):
        return content
    found = upgraded("options", content, f"the configuration {str(path)!r}")
    return {name: value for name, value in found.items() if name != FORMAT}


def write_options(path: Path, options: ModelOptions) -> None:
    """Write an options file, with its format."""
    write_json(path, {**options.to_json(), FORMAT: current_format("options")})


def options_format(folder: Path) -> int:
    """The format of a study's options file.

    Raises:
        StudyError: The format is newer than this version.
    """
    path = folder / CONFIGURATION
    return format_of("options", read_json(path).get(FORMAT), f"the configuration {str(path)!r}")


@contextmanager
def parsing_context(path: Path) -> Iterator[None]:
    """Context that reports missing entries and wrong types in a parsed file as a StudyError."""
    try:
        yield
    except RankNASError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(
            f"{str(path)!r} is damaged or incomplete: {error!r}. Make it again with: ranknas "
            "resume STUDY."
        ) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 130 else f"{text[:130]}…"
