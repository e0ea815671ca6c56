"""The model inputs of batches: what a forward pass takes, without targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rankNAS.data.samples import BatchSequence, Samples
from rankNAS.data.sizes import affordable_samples
from rankNAS.tasks.base import Task
from rankNAS.trees import Inputs, size_of

__all__ = ["InputBatches", "InputSource", "input_batches"]

#: Samples, a tensor with one sample along axis 0, or batches of inputs.
InputSource: TypeAlias = "Samples | Tensor | InputBatches"


class InputBatches(Sequence[Inputs]):
    """The model inputs of a sequence of batches.

    Args:
        batches: The batches.
        task: Reads the inputs of a batch; None takes a copy of the batch itself as the inputs,
            as it is not known whether the model changes them.
    """

    def __init__(self, batches: Sequence[Any], task: Task | None = None) -> None:
        self._batches, self._task = batches, task
        sizes = batches.sizes if isinstance(batches, BatchSequence) else map(size_of, batches)
        self.sizes = list(sizes)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        batch = self._batches[index]
        return Inputs.of(batch).copied() if self._task is None else self._task.inputs_of(batch)

    def batch(self, index: int) -> Any:
        """A whole batch."""
        return self._batches[index]

    def mask(self, index: int) -> Tensor | None:
        """The positions (n, T) of a batch that count in statistics; None if all do."""
        return None if self._task is None else self._task.mask_of(self._batches[index])

    @property
    def samples(self) -> int:
        """The number of samples of all batches."""
        return sum(self.sizes)


def input_batches(
    source: InputSource,
    batch_size: int,
    *,
    task: Task | None = None,
    device: str | torch.device = "cpu",
    even: bool = False,
    count: int | None = None,
    place: Callable[[Any], Any] | None = None,
) -> InputBatches:
    """The model inputs of samples; batches that are given are returned unchanged.

    Args:
        source: The samples.
        batch_size: Samples per batch, at most; fewer if they are sequences of many tokens, whose
            logits would fill the memory.
        task: Reads the inputs of a batch.
        device: Where batches are moved to.
        even: Make batches whose sizes differ by 1 at most; see `Samples.batches`.
        count: Make this many batches instead.
        place: Applied to each batch on the device, for example `channels_last`.
    """
    if isinstance(source, InputBatches):
        return source
    samples = Samples.of(source)
    batch_size = affordable_samples(batch_size, samples)
    batches = samples.batched(batch_size, device=device, even=even, count=count, place=place)
    return InputBatches(batches, task)
