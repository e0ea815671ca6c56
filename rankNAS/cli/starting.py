"""Initial allocations of a search: from a file, or the best ones of an earlier study."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankNAS.allocation import Allocation
from rankNAS.cli.documents import study_document
from rankNAS.cli.options.search import SearchOptions
from rankNAS.cli.options.stored import parsing_context, read_options, study_folder
from rankNAS.exceptions import UsageError
from rankNAS.io.files import read_json, write_json

__all__ = ["keep_start", "start_allocations"]

KEPT = "start.json"


def start_allocations(options: SearchOptions) -> list[Allocation]:
    """The allocations to evaluate first; none without ``--start``.

    A resumed study reads its original ones from its own folder.

    Raises:
        UsageError: The file or the study of ``--start`` cannot be read, or has no allocation yet.
    """
    if options.start is None:
        return []
    kept = options.folder / KEPT
    if kept.is_file():
        with parsing_context(kept):
            return [_allocation(labels) for labels in read_json(kept)]
    path = Path(options.start)
    if not path.is_file():
        return _of_study(study_folder(options.start, options.out))
    try:
        return [Allocation.from_json(path.read_text())]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"`--start` must be a file with an allocation, such as best.json, or a study; "
            f"{options.start!r} cannot be read: {error}"
        ) from None


def keep_start(options: SearchOptions, start: Iterable[Allocation]) -> None:
    """Write the allocations into the study's folder, for a later resume."""
    if found := [allocation.labels() for allocation in start]:
        write_json(options.folder / KEPT, found)


def _of_study(folder: Path) -> list[Allocation]:
    """The best allocation of a study for each of its budgets, finished or not."""
    document = study_document(read_options(folder))
    with parsing_context(folder / "result.json"):
        found = [solution["best"]["allocation"] for solution in document["solutions"]]
        labels = found or _best_trials(document)
    if not labels:
        raise UsageError(
            f"study {folder.name!r} has no finished trial to start from; leave out --start."
        )
    return [_allocation(one) for one in labels]


def _best_trials(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """For each budget, the allocation of the best trial in the first objective."""
    sign = 1 if document["directions"][0] == "maximize" else -1
    best: dict[str, Mapping[str, Any]] = {}
    for trial in document["trials"]:
        if trial["state"] == "complete" and not trial["probe"]:
            leader = best.setdefault(trial["budget_key"], trial)
            if sign * trial["values"][0] > sign * leader["values"][0]:
                best[trial["budget_key"]] = trial
    return [trial["allocation"] for trial in best.values()]


def _allocation(labels: object) -> Allocation:
    return Allocation.from_json(json.dumps(labels))
