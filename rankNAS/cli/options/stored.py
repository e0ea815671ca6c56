"""The options in a study's folder, and the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankNAS.cli.options.fields import checked, with_current_names
from rankNAS.cli.options.search import CONFIGURATION, SearchOptions
from rankNAS.exceptions import RankNASError, StudyError
from rankNAS.io.files import read_json

__all__ = ["parsing_context", "read_options", "study_folder", "upgraded"]


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
        options = SearchOptions(**checked(SearchOptions, upgraded(SearchOptions, read_json(path))))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"the study's configuration {str(path)!r} is damaged: {error}. Restore it, or search "
            "again under another name."
        ) from None
    return replace(options, study=folder.name, out=str(folder.parent))


def upgraded(cls: type, content: Any) -> Any:
    """The content of an options file as the current version would write it.

    Every options file goes through here before it becomes a dataclass. Wrong content is returned
    as it is; `checked` finds what is wrong.

    Args:
        cls: The dataclass of the options.
        content: The parsed file.
    """
    return with_current_names(cls, content, None) if isinstance(content, dict) else content


@contextmanager
def parsing_context(path: Path) -> Iterator[None]:
    """Within, gaps and wrong types in a parsed file are reported as a StudyError."""
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
