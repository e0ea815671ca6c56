"""File formats of RankNAS, and upgrades from older versions.

Every file contains its format, an integer. `UPGRADES` holds for each kind of file the functions
that convert the content of one format to the next. A file without a format has format 1, that of
version 0.1. Files of a newer format are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from rankNAS.exceptions import StudyError
from rankNAS.renamed import OBJECTIVES, OPTIONS

__all__ = [
    "BEFORE_TASKS",
    "FORMAT",
    "TRIAL_METRICS",
    "Kind",
    "current_format",
    "format_of",
    "upgraded",
]

Content = dict[str, Any]
Kind = Literal["options", "result", "study", "network", "device"]

FORMAT = "format"  # the entry of a file that holds its format
TRIAL_METRICS = "ranknas:metrics"  # the user attribute of an Optuna trial
#: What files say that were written when every model was a classifier.
BEFORE_TASKS: Content = {
    "task": "classification",
    "metrics": ["accuracy", "loss", "kl_divergence", "reverse_kl"],
}


def current_format(kind: Kind) -> int:
    """The format that this version writes."""
    return len(UPGRADES[kind]) + 1


def format_of(kind: Kind, given: object, where: str) -> int:
    """The format of a file, checked.

    Args:
        kind: The kind of file.
        given: The entry `FORMAT` of the file; None if absent; text if from metadata.
        where: The name of the file in messages.

    Raises:
        StudyError: The format is newer than this version, or invalid.

    Example:
        >>> format_of("network", "1", "'small.safetensors'")
        1
    """
    known = current_format(kind)
    text = "1" if given is None else str(given)
    if isinstance(given, bool) or not text.isascii() or not text.isdigit() or int(text) < 1:
        raise StudyError(f"{where} has the format {given!r}; expected a number from 1 to {known}.")
    if int(text) > known:
        raise StudyError(
            f"{where} was written by a newer version of RankNAS: it has format {text}, and this "
            f"version reads formats up to {known}; install the newer version."
        )
    return int(text)


def upgraded(kind: Kind, content: Mapping[str, Any], where: str) -> Content:
    """The content of a file in the current format; a copy.

    Args:
        kind: The kind of file.
        content: The content of the file, including its format.
        where: The name of the file in messages.

    Raises:
        StudyError: The format is newer than this version, or invalid.

    Example:
        >>> upgraded("options", {"metric": "input"}, "'config.json'")
        {'norm': 'input', 'format': 2}
    """
    found = format_of(kind, content.get(FORMAT), where)
    result = dict(content)
    for upgrade in UPGRADES[kind][found - 1 :]:
        result = upgrade(result)
    return {**result, FORMAT: current_format(kind)}


def _renamed(content: Mapping[str, Any], names: Mapping[str, str]) -> Content:
    """The content with renamed entries, in the same order."""
    return {names.get(key, key): value for key, value in content.items()}


def _objectives(names: list[str]) -> list[str]:
    """Objectives by their new names; a direction (``NAME=minimize``) is kept."""
    parts = [name.partition("=") for name in names]
    return [OBJECTIVES.get(name, name) + sign + direction for name, sign, direction in parts]


def _options(content: Content) -> Content:
    """Options of a search or comparison, upgraded from format 1."""
    renamed = _renamed(content, OPTIONS)
    if isinstance(objective := renamed.get("objective"), list):
        names = [name if isinstance(name, str) else repr(name) for name in objective]
        if names == objective:
            renamed["objective"] = _objectives(objective)
    return renamed


def _result(content: Content) -> Content:
    """The result document of a search, from format 1. Missing entries are the reader's matter."""
    parts: dict[str, Callable[[Any], Any]] = {
        "objectives": _objectives,
        "dense": _metrics,
        "solutions": lambda found: [_solution(solution) for solution in found],
        "trials": lambda found: [_trial(trial) for trial in found],
    }
    return _with_parts(_solution(_renamed(content, {"answers": "solutions"})), parts)


def _with_task(content: Content) -> Content:
    """The result document of a search, from format 2."""
    return {**BEFORE_TASKS, **content}


def _solution(content: Content) -> Content:
    return _with_parts(_renamed(content, {"label": "budget_key"}), {"best": _metrics})


def _trial(content: Content) -> Content:
    return _with_parts(_renamed(content, {"target": "budget_key"}), {"metrics": _metrics})


def _metrics(content: Content) -> Content:
    return _renamed(content, OBJECTIVES)


def _with_parts(content: Content, parts: Mapping[str, Callable[[Any], Any]]) -> Content:
    """With some entries upgraded, those of them that exist."""
    return {key: parts[key](v) if key in parts else v for key, v in content.items()}


def _study(content: Content) -> Content:
    """User attributes of an Optuna trial, upgraded from format 1."""
    renamed = _renamed(content, {"target": "budget_key", **OBJECTIVES})
    if TRIAL_METRICS in renamed:
        renamed[TRIAL_METRICS] = _renamed(renamed[TRIAL_METRICS], OBJECTIVES)
    return renamed


def _network(content: Content) -> Content:
    """Measured metrics in the metadata of a compressed network, upgraded from format 1."""
    return content | {"metrics": _renamed(content["metrics"], OBJECTIVES)}


def _device(content: Content) -> Content:
    """A device profile, upgraded from format 1."""
    networks = content["networks"].items()
    return content | {
        "networks": {k: _renamed(v, {"rest": "remainder_cost"}) for k, v in networks}
    }


#: Per kind, the upgrades from format 1 to 2, from 2 to 3, and so on.
UPGRADES: dict[Kind, tuple[Callable[[Content], Content], ...]] = {
    "options": (_options,),
    "result": (_result, _with_task),
    "study": (_study,),
    "network": (_network,),
    "device": (_device,),
}
