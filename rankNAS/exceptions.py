"""Exceptions of RankNAS.

::

    RankNASError
    +-- UsageError (ValueError)          invalid input of the user; the command line exits with 2
        +-- UnknownNameError (KeyError)  a space, strategy, objective, … that does not exist
        +-- BudgetError                  a budget that is malformed or that nothing can meet
        +-- DataError                    a data set that is missing or malformed
        +-- WeightsError                 an unreadable weights file, or one of another model
        +-- StudyError                   a study that is missing, corrupt or configured otherwise
        +-- ObjectiveError               an objective that raised or returned no finite number
            +-- NetworkError             a network that differs from the one that was measured
        +-- WriteError (OSError)         a file that cannot be written; the earlier one is intact
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "DataError",
    "NetworkError",
    "ObjectiveError",
    "RankNASError",
    "StudyError",
    "UnknownNameError",
    "UsageError",
    "WeightsError",
    "WriteError",
    "shortened",
]


class RankNASError(Exception):
    """Base class of all errors that RankNAS raises on purpose.

    >>> try:
    ...     raise BudgetError("too small")
    ... except RankNASError as error:
    ...     print(error)
    too small
    """


class UsageError(RankNASError, ValueError):
    """Invalid input of the user; the message states valid input.

    >>> from rankNAS.budget import parse_budget
    >>> try:
    ...     parse_budget(["1.5"])
    ... except UsageError as error:
    ...     print(str(error).partition(",")[0])
    the budget for 'macs' must be in (0
    """


class UnknownNameError(UsageError, KeyError):
    """An unknown name in a lookup.

    Args:
        kind: The kind of name, for example ``"strategy"``.
        name: The given name.
        known: The existing names; the nearest one is suggested.
        hint: A final sentence, for example about other accepted forms.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        listed = f" Known: {', '.join(known)}."
        super().__init__(f"unknown {kind} {name!r}.{guess}{listed} {hint}".rstrip())

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class BudgetError(UsageError):
    """A budget that is malformed or that no allocation can meet."""


class DataError(UsageError):
    """A data set that is missing, malformed or does not fit the model."""


class WeightsError(UsageError):
    """A weights file that is unreadable or belongs to another model."""


class StudyError(UsageError):
    """A study that is missing, corrupt or was made with another configuration."""


class ObjectiveError(UsageError):
    """An objective that raised an error, or returned no finite number."""


class NetworkError(ObjectiveError):
    """A compressed network that is not the function, or not of the size, that was measured."""


class WriteError(UsageError, OSError):
    """A file that cannot be written, for example on a full disk; the earlier one is intact.

    ``errno`` and ``strerror`` are those of the original error.
    """

    __str__ = Exception.__str__  # OSError would print errno and strerror instead


def shortened(text: str, length: int = 500) -> str:
    """A text as one line, without its middle if it is too long.

    >>> shortened("no   room")
    'no room'
    >>> len(shortened(5000 * "x"))
    500
    """
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    end = length // 4
    return f"{line[: length - end - 3]} … {line[-end:]}"
