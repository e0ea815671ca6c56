"""The validation samples that tell allocations apart best.

References:
    Ji et al., EMNLP Findings 2024, arXiv 2405.10616 (Bolaco), section 3.3: the samples whose
    perplexity varies most over a few random allocations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankNAS.allocation import Allocation
from rankNAS.deadline import check_time
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.tasks.base import Task
from rankNAS.trees import rows, size_of

__all__ = ["most_sensitive"]


def most_sensitive(evaluator: Evaluator, allocations: Sequence[Allocation]) -> Tensor | None:
    """Positions (samples,) of the validation samples, those of the largest deviation first.

    The deviation is that of a sample's perplexity, or loss where the task has none, over the
    allocations. None if samples have no loss, or are not run in their order.

    Args:
        evaluator: Applies the allocations, with its shared factors.
        allocations: Two or more.

    Raises:
        TimeLimitError: The active deadline has passed.
    """
    if len(allocations) < 2 or not evaluator.validation.uniform:
        return None
    found = []
    for allocation in allocations:
        check_time()
        with evaluator.backend.applying(allocation, evaluator.factorisation):
            values = _values(evaluator)
        if values is None:
            return None
        found.append(values)
    deviation = torch.stack(found).std(0)
    return torch.argsort(deviation, descending=True, stable=True)


def _values(evaluator: Evaluator) -> Tensor | None:
    """The perplexity or loss of each validation sample, (samples,)."""
    values: list[float] = []
    for output, batch in evaluator.backend.outputs():
        size = size_of(batch)
        for i in range(size):
            one = slice(i, i + 1)
            value = _value(evaluator.task, rows(output, one, size), rows(batch, one, size))
            if value is None:
                return None
            values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def _value(task: Task, output: object, batch: object) -> float | None:
    found = task.finish(task.predict(output, batch).sums(None))
    return found.get("perplexity", found.get("loss"))
