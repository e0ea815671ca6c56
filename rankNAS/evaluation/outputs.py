"""Outputs and metrics of networks on data, streamed; and the dense model's predictions."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rankNAS.compression.activations import ActivationCache
from rankNAS.compression.incremental import CachedPass, IncrementalExecutor
from rankNAS.copies import copied, unchanged
from rankNAS.data.samples import BatchSequence, Samples
from rankNAS.exceptions import WriteError
from rankNAS.io.files import cache_folder
from rankNAS.tasks.base import Prediction, Sums, Task, added, summed
from rankNAS.tasks.feeding import InputBatches
from rankNAS.tasks.headed import Headed, output_head
from rankNAS.trees import channels_last, device_of

__all__ = [
    "KEPT",
    "PartwiseOutputs",
    "Reference",
    "affordable",
    "dense_reference",
    "network_metrics",
    "network_sums",
    "total_sums",
]

logger = logging.getLogger(__name__)
#: Bytes of the dense model's predictions that are kept, over all batches.
KEPT = 128 << 20
OUTPUT_BYTES = 256 << 20  # of one batch, at most


class PartwiseOutputs:
    """The outputs of one changing network on fixed batches, part by part.

    Args:
        parts: The batches of each part.
        task: Reads their inputs.
        executor: The network's executor, if it could be traced. A forward pass then begins at the
            first operation that changed since the last one.
    """

    def __init__(
        self, parts: Sequence[BatchSequence], task: Task, executor: IncrementalExecutor | None
    ) -> None:
        self._task = task
        self._inputs = [InputBatches(part, task) for part in parts]
        self._passes: list[CachedPass] | None = None
        if executor is not None:
            self._passes = [CachedPass(executor, inputs) for inputs in self._inputs]

    def invalidate(self, first: int) -> None:
        """Mark the executor's operations from number `first` on as changed."""
        for cached in self._passes or ():
            cached.invalidate(first)

    def part(self, number: int, network: nn.Module) -> Iterator[Any]:
        """The outputs of the network on the batches of one part."""
        if self._passes is not None:
            yield from self._passes[number].outputs()
            return
        for i in range(len(self._inputs[number])):
            with torch.no_grad(), unchanged(network), self._task.compact(network):
                output = self._inputs[number][i].run(network)
            yield output
            del output  # before the next forward pass


class Reference:
    """The dense model's predictions of some batches, kept in a bounded memory or recomputed.

    Predictions are kept whole if all of them need at most `most_bytes`; else in a compact form, if
    the task has one (`Prediction.kept`); else they are computed again when they are needed. Hidden
    states beyond the memory lie in files.

    Args:
        task: Reads outputs.
        model: The dense model.
        batches: The batches.
        outputs: Their outputs, if they are known; each is read once.
        most_bytes: The memory.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        outputs: Iterator[Any] | None = None,
        most_bytes: int = KEPT,
    ) -> None:
        self.task = task
        self.model: nn.Module | None = model
        self._kept: list[Prediction | None] = []
        self.sums: Sums = {}
        self._states = ActivationCache(cache_folder() / "activations", most_bytes)
        for batch in batches:
            output = self._run(batch) if outputs is None else next(outputs)
            prediction = task.predict(output, batch)
            if isinstance(prediction, Headed):
                kept: Prediction | None = self._filed(prediction, len(self._kept))
            else:
                kept = prediction.kept(most_bytes // len(batches))
            self.sums = added(self.sums, prediction.sums(prediction if kept is None else kept))
            self._kept.append(kept)
            del output, prediction  # before the next forward pass
        if outputs is not None:
            next(outputs, None)  # the end of the pass, which keeps its activations

    def __len__(self) -> int:
        return len(self._kept)

    def prediction(self, number: int, batch: Any) -> Prediction:
        """The dense model's prediction for one of the batches."""
        kept = self._kept[number]
        return self.task.predict(self._run(batch), batch) if kept is None else kept

    def detached(self) -> Reference:
        """The reference without the dense model, for another process."""
        found = copy.copy(self)
        found.model = None
        del found._states  # their tensors are in the predictions
        found.sums = {name: value.cpu() for name, value in self.sums.items()}
        return found

    @torch.no_grad()
    def _run(self, batch: Any) -> Any:
        inputs = self.task.inputs_of(batch)
        model = self._placed(getattr(inputs.first, "device", None)).eval()
        with self.task.compact(model):
            return inputs.run(model)

    def _placed(self, device: torch.device | None) -> nn.Module:
        """The dense model on a device."""
        assert self.model is not None
        if device is not None and device_of(self.model) != device:
            self.model = copied(self.model).to(device)
        return self.model

    def _filed(self, prediction: Headed, number: int) -> Headed | None:
        """The prediction with the head of the dense model, and hidden states that are kept.

        None if the disk is full: they are computed again when they are needed.
        """
        kept = prediction.kept(prediction.nbytes)
        assert isinstance(kept, Headed)
        try:
            self._states.put(number, kept.hidden)
        except WriteError as error:
            logger.info("the dense model runs again for each evaluation: %s", error)
            return None
        head = output_head(self._placed(kept.hidden.device))
        return replace(kept, hidden=self._states.get(number), head=head or kept.head)


def network_metrics(
    network: nn.Module,
    samples: Samples,
    task: Task,
    *,
    reference: Reference | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The metrics of a network on samples, streamed.

    Args:
        network: The network; it is moved to the device and ends in evaluation mode.
        samples: The samples.
        task: Reads them and computes the metrics.
        reference: The dense model's predictions, from `dense_reference` with the same batch size,
            for the divergences.
        batch_size: Samples per forward pass, at most.
        device: Where to run.
    """
    found = network_sums(
        network, samples, task, reference=reference, batch_size=batch_size, device=device
    )
    return task.finish(summed(found))


def network_sums(
    network: nn.Module,
    samples: Samples,
    task: Task,
    *,
    reference: Reference | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> list[Sums]:
    """The sums of the metrics over each batch of samples; the arguments of `network_metrics`."""
    network = network.to(device).eval()
    size = affordable(batch_size, network, samples, task, device)
    batches = map(channels_last, samples.batches(size, device=device))
    return list(_batch_sums(network, batches, task, reference))


def dense_reference(
    model: nn.Module,
    samples: Samples,
    task: Task,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Reference:
    """The dense model's predictions for samples, as `network_metrics` compares with them.

    Args:
        model: The dense model.
        samples: The samples.
        task: Reads them.
        batch_size: Samples per forward pass, at most.
        device: Where to run.
    """
    if device_of(model) != torch.device(device):
        model = copied(model).to(device)
    size = affordable(batch_size, model, samples, task, device)
    batches = samples.batched(size, device=device, place=channels_last)
    return Reference(task, model, batches)


@torch.no_grad()
def affordable(
    batch_size: int,
    network: nn.Module,
    samples: Samples,
    task: Task,
    device: torch.device | str = "cpu",
) -> int:
    """The number of samples per forward pass, so that outputs need at most `OUTPUT_BYTES`.

    Args:
        batch_size: The largest number.
        network: A network on the device, in evaluation mode.
        samples: The samples.
        task: Reads them.
        device: Where to run.
    """
    one = channels_last(samples.example(device=device))
    with task.compact(network):
        needed = task.run(network, one).nbytes
    return max(1, min(batch_size, OUTPUT_BYTES // max(1, needed)))


def total_sums(
    network: nn.Module,
    batches: Iterable[Any],
    task: Task,
    reference: Reference | None = None,
) -> Sums:
    """The sums of a network's predictions over all batches, without keeping an output."""
    return summed(_batch_sums(network, batches, task, reference))


def _batch_sums(
    network: nn.Module, batches: Iterable[Any], task: Task, reference: Reference | None
) -> Iterator[Sums]:
    """The sums of each batch."""
    network.eval()
    for number, batch in enumerate(batches):
        with torch.no_grad(), task.compact(network):
            prediction = task.run(network, batch)
        dense = None if reference is None else reference.prediction(number, batch)
        yield prediction.sums(dense)
        del prediction, dense  # before the next forward pass
