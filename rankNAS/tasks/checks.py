"""Checks of targets and outputs, with messages that name the task and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankNAS.data.labels import IGNORED
from rankNAS.exceptions import DataError, UsageError

__all__ = [
    "IGNORED",
    "check_classes",
    "check_finite",
    "check_length",
    "check_some",
    "check_unit",
    "class_weights",
    "whole_numbers",
]


def check_length(output: Tensor, targets: Any, task: str) -> None:
    """Raise a DataError unless output and targets have the same number of samples."""
    if not isinstance(targets, Tensor):
        raise DataError(
            f"the task {task!r} takes targets that are one tensor, but a batch has a "
            f"{type(targets).__name__}; give Custom(loss, metrics) for other targets."
        )
    if not output.dim() or not targets.dim() or len(output) != len(targets):
        raise DataError(
            f"the model returns {tuple(output.shape)} for targets {tuple(targets.shape)}; the "
            f"task {task!r} needs one prediction for each target along axis 0."
        )


def check_some(sums: Mapping[str, Tensor], task: str) -> None:
    """Raise a DataError if no prediction counts."""
    if not float(sums["count"]):
        raise DataError(
            f"no target counts for the task {task!r}: all of them are marked by -100 or masked; "
            "give data with at least one target."
        )


def check_finite(targets: Tensor, where: str = "of a batch", row: int = 0) -> None:
    """Raise a DataError for a target that is NaN or infinite.

    Args:
        targets: Targets of consecutive items.
        where: Their name in messages, such as ``of the train split``.
        row: The number of the first item.
    """
    if not targets.is_floating_point():
        return
    bad = ~targets.isfinite()
    if bool(bad.any()):
        place = tuple(bad.nonzero()[0].tolist())
        item = f"item {row + place[0]}" if place else "an item"
        raise DataError(
            f"{item} {where} has the target {float(targets[place])}; remove such items, or "
            "replace the value."
        )


def check_classes(targets: Tensor, classes: int, where: str, row: int) -> None:
    """Raise a DataError for a class number that the model has no output for.

    Args:
        targets: Class numbers of consecutive items; `IGNORED` does not count.
        classes: The number of classes.
        where: Their name in messages, such as ``of the train split``.
        row: The number of the first item.
    """
    bad = (targets != IGNORED) & ((targets < 0) | (targets >= classes))
    if bool(bad.any()):
        place = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"item {row + place[0]} {where} has the target {int(targets[place])}, but the model "
            f"has {classes} classes; number the classes from 0, and mark what does not count by "
            f"{IGNORED}."
        )


def class_weights(weights: tuple[float, ...] | None, classes: int, task: str) -> Tensor | None:
    """The weights (classes,) as a tensor; None without any.

    Raises:
        UsageError: There is not one weight for each class.
    """
    if weights is None:
        return None
    if len(weights) != classes:
        raise UsageError(
            f"the task {task!r} has {len(weights)} weights, but the model has {classes} classes; "
            "give one weight for each."
        )
    return torch.tensor(weights)


def check_unit(targets: Tensor, task: str) -> None:
    """Raise a DataError for targets outside [0, 1]."""
    check_finite(targets)
    if targets.numel() and (float(targets.min()) < 0 or float(targets.max()) > 1):
        worst = targets.min() if float(targets.min()) < 0 else targets.max()
        raise DataError(
            f"a target of the task {task!r} is {float(worst):g}; targets must be in [0, 1]."
        )


def whole_numbers(targets: Any, task: str) -> Any:
    """Class numbers as int64.

    Raises:
        DataError: They are not whole numbers.
    """
    if not isinstance(targets, Tensor) or not (
        targets.is_floating_point() or targets.is_complex()
    ):
        return targets.long() if isinstance(targets, Tensor) else targets
    check_finite(targets)
    whole = targets.long()
    if bool((whole != targets).any()):
        bad = targets[whole != targets].flatten()[0]
        raise DataError(
            f"a target is {float(bad):g}, but the task {task!r} takes class numbers; use the task "
            "'regression' for real numbers, or 'multilabel' for probabilities."
        )
    return whole
