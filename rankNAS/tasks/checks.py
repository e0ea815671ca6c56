"""Checks of targets and outputs, with messages that name the task and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankNAS.exceptions import DataError

__all__ = ["check_finite", "check_length", "check_some", "check_unit", "whole_numbers"]


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


def check_finite(targets: Tensor, task: str) -> None:
    """Raise a DataError for targets that are NaN or infinite."""
    if not bool(targets.isfinite().all()):
        bad = targets[~targets.isfinite()].flatten()[0]
        raise DataError(
            f"a target of the task {task!r} is {float(bad)}; remove such samples, or replace the "
            "value."
        )


def check_unit(targets: Tensor, task: str) -> None:
    """Raise a DataError for targets outside [0, 1]."""
    check_finite(targets, task)
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
    check_finite(targets, task)
    whole = targets.long()
    if bool((whole != targets).any()):
        bad = targets[whole != targets].flatten()[0]
        raise DataError(
            f"a target is {float(bad):g}, but the task {task!r} takes class numbers; use the task "
            "'regression' for real numbers, or 'multilabel' for probabilities."
        )
    return whole
