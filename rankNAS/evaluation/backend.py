"""The network under evaluation: it takes the weights of one allocation after another.

The factors of a layer are multiplied out into its dense weight. This is the same function at dense
speed, and only the layers that differ from the last allocation are written. If the model can be
traced, a forward pass begins at the first of them (`IncrementalExecutor`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.batch_norm import (
    BatchNormReference,
    cumulative_averaging,
    has_batch_norm,
    in_float32,
    is_tracking,
    reestimate_batch_norm,
    tracking_layers,
    uncorrected_layers,
)
from rankNAS.compression.block_refit import BlockRefit
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.incremental import CachedPass, IncrementalExecutor
from rankNAS.compression.reconstruction import Refitted, SequentialRefit
from rankNAS.compression.surgery import exceeds_memory_limit, shared_copy
from rankNAS.copies import copied
from rankNAS.data.samples import Samples
from rankNAS.evaluation.outputs import (
    KEPT,
    PartwiseOutputs,
    Reference,
    affordable,
    total_sums,
)
from rankNAS.evaluation.pruning import part_ends
from rankNAS.evaluation.verification import SAMPLES, verify_outputs
from rankNAS.tasks.base import Sums, Task, added
from rankNAS.tasks.feeding import InputBatches, input_batches
from rankNAS.trees import Inputs, channels_last, has_images, rows

__all__ = ["Backend", "Timing"]

logger = logging.getLogger(__name__)
# Samples per forward pass for each CPU thread: activations of larger batches exceed its caches. On
# ResNet-20, 256 samples at once take 1.13 times as long as 64 (studies/benchmark).
CPU_SAMPLES = 64
FEWEST_BATCHES = 8  # of streamed calibration samples, of which refits hold every fourth out


@dataclass
class Timing:
    """Evaluation time in seconds: forward passes, and everything else."""

    forward: float = 0.0
    other: float = 0.0


class Backend:
    """The network under evaluation, with its calibration and validation batches on one device.

    Args:
        factorisation: The factors, shared and never changed.
        task: Reads batches and outputs.
        calibration: Samples from which batch-norm statistics are re-estimated.
        validation: Samples on which metrics are measured.
        parts: Increasing shares up to 1 of the validation samples, which are run part by part.
        batch_norm: Whether to correct batch-norm statistics; ignored without batch norms.
        batch_size: Samples per forward pass, at most. A CPU takes fewer, and so does a model whose
            outputs are large.
        device: Where to run.
        low_memory: Keep no activations. On the CPU, also copy no weights of a network that exceeds
            the memory limit.
        known: The dense network's predictions by part, if known.
        timing: Records the time of forward passes.
    """

    def __init__(
        self,
        factorisation: Factorisation,
        task: Task,
        calibration: Samples,
        validation: Samples,
        *,
        parts: Sequence[float],
        batch_norm: bool,
        batch_size: int,
        device: torch.device | str,
        low_memory: bool,
        known: Sequence[Reference] | None,
        timing: Timing,
    ) -> None:
        self.factorisation, self.task = factorisation, task
        self.device, self.timing = device, timing
        self._validation = validation
        cpu = torch.device(device).type == "cpu"
        model = factorisation.model
        # On another device, a copy is needed in any case.
        self._shares = low_memory and cpu and exceeds_memory_limit(model)
        network = shared_copy(model) if self._shares else copied(model)
        self.network = network.to(device).eval()
        self._applied = {name: (layer, DENSE) for name, layer in factorisation.layers.items()}
        self.batch_norm = batch_norm and has_batch_norm(self.network) and _several(calibration)
        if batch_norm and (others := uncorrected_layers(self.network)):
            logger.warning(
                "the running statistics of %d modules, such as %r, are kept as they are: only "
                "those of PyTorch's batch norms are corrected after compression.",
                len(others),
                others[0],
            )
        if self.batch_norm:
            in_float32(self.network)
        self.images = has_images(task.inputs_of(validation.example()))
        if self.images:
            self.network = self.network.to(memory_format=torch.channels_last)
        if cpu:
            batch_size = min(batch_size, CPU_SAMPLES * torch.get_num_threads())
        self.batch_size = affordable(batch_size, self.network, validation, task, device)
        size = self.batch_size
        if factorisation.streamed:  # refits block by block hold some of the batches out
            size = min(size, max(1, len(calibration) // FEWEST_BATCHES))
        self.calibration = input_batches(
            calibration,
            size,
            task=task,
            device=device,
            even=True,
            place=channels_last,
        )
        ends = part_ends(parts, len(validation))
        self.parts = [
            validation.take(torch.arange(start, end)).batched(
                self.batch_size, device=device, place=channels_last
            )
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        self._executor = None if low_memory else self._traced()
        self._outputs = PartwiseOutputs(self.parts, task, self._executor)
        self._norms, self._calibrating = self._calibration_pass()
        self.references = known or [
            Reference(task, model, part, outputs=self._timed_outputs(i), most_bytes=b)
            for i, (part, b) in enumerate(zip(self.parts, self._shares_of(KEPT), strict=True))
        ]
        for reference in self.references:
            reference.model = model
        if self.batch_norm:
            self._reference = BatchNormReference(self.network, self.calibration, keeping=model)
            self._dense_norms = tracking_layers(self.network)
        self.invalidate()

    @property
    def incremental(self) -> bool:
        """Whether a forward pass begins at the first layer that changed."""
        return self._executor is not None

    @cached_property
    def refit(self) -> SequentialRefit | BlockRefit:
        """Refits to the calibration batches, from which batch norms are corrected as well."""
        if self.factorisation.streamed and not self.batch_norm:
            found = BlockRefit.of(self.factorisation, self.calibration)
            if found is not None:
                return found
        return SequentialRefit(self.factorisation, self.calibration)

    @contextmanager
    def applying(
        self, allocation: Mapping[str, Choice], factorisation: Factorisation
    ) -> Iterator[None]:
        """Context in which the network has the weights and batch-norm statistics of an allocation.

        Args:
            allocation: One choice for each layer.
            factorisation: Its factors. Factors other than the shared ones are released after.
        """
        try:
            self._write(allocation, factorisation)
            if self.batch_norm:
                started = time.perf_counter()
                if isinstance(factorisation, Refitted) and factorisation.statistics:
                    self._take(factorisation.statistics)
                else:
                    self._reestimate()
                self.timing.forward += time.perf_counter() - started
            yield
        finally:
            if factorisation is not self.factorisation:
                self._write(self.factorisation.space.dense, self.factorisation)

    def outputs(self) -> Iterator[tuple[Any, Any]]:
        """The network's output for every validation batch, in order, with the batch."""
        for number, part in enumerate(self.parts):
            outputs = self._timed_outputs(number)
            for batch in part:
                yield next(outputs), batch
            next(outputs, None)  # the end of the pass

    def sums(self) -> Iterator[Sums]:
        """The sums over the validation samples of each part."""
        for number, (part, reference) in enumerate(zip(self.parts, self.references, strict=True)):
            outputs = self._timed_outputs(number)
            total: Sums = {}
            for i, batch in enumerate(part):
                output = next(outputs)
                prediction = self.task.predict(output, batch)
                total = added(total, prediction.sums(reference.prediction(i, batch)))
                del output, prediction  # before the next forward pass
            next(outputs, None)  # the end of the pass
            yield total

    def sums_of(self, network: nn.Module) -> Sums:
        """The sums of another network over all validation samples, in evaluation mode."""
        network = network.to(self.device).eval()
        total: Sums = {}
        for part, reference in zip(self.parts, self.references, strict=True):
            total = added(total, total_sums(network, part, self.task, reference))
        return total

    def _timed_outputs(self, number: int) -> Iterator[Any]:
        """The network's outputs on the batches of one part; forward passes are timed."""
        outputs = self._outputs.part(number, self.network)
        for _ in range(len(self.parts[number])):
            started = time.perf_counter()
            output = next(outputs)
            self.timing.forward += time.perf_counter() - started
            yield output
            del output  # before the next forward pass
        next(outputs, None)

    def build(self, allocation: Mapping[str, Choice], factorisation: Factorisation) -> nn.Module:
        """The compressed network of the allocation that is applied now, with its thin layers.

        Raises:
            NetworkError: Its outputs differ from those of the network under evaluation.
        """
        network = factorisation.materialise(allocation).to(self.device).eval()
        for name, module in self.network.named_modules():
            if isinstance(module, _BatchNorm):
                network.get_submodule(name).load_state_dict(module.state_dict())
        verify_outputs(network, self.network, self._few)
        return network

    def invalidate(self, first: int = 0) -> None:
        """Discard cached activations of the operations from number `first` on."""
        self._outputs.invalidate(first)
        if self._calibrating is not None:
            self._calibrating.invalidate(first)

    def placed(self) -> Factorisation:
        """The factorisation with the model's weights in the memory format of the network."""
        model = self.factorisation.model
        if self.images:
            model = copied(model).to(memory_format=torch.channels_last)
        return replace(self.factorisation, model=model)

    @torch.no_grad()
    def _write(self, allocation: Mapping[str, Choice], factorisation: Factorisation) -> None:
        """Set the weights of the layers whose factors or choice changed."""
        if self._shares:
            self.network = factorisation.made_when_called(allocation).eval()
            if self.batch_norm:
                in_float32(self.network)
            return
        changed = []
        for name, choice in allocation.items():
            layer = factorisation.layers[name]
            applied, before = self._applied[name]
            if layer is not applied or choice != before:
                layer.write(self.network, choice)
                self._applied[name] = layer, choice
                changed.append(name)
        if self._executor is not None and changed:
            self.invalidate(min(self._executor.cut_points[name] for name in changed))

    @torch.no_grad()
    def _reestimate(self) -> None:
        """Re-estimate the statistics of all batch norms behind the first change."""
        if self._calibrating is None:
            reestimate_batch_norm(self.network, self.calibration)
            self._reference.correct(tracking_layers(self.network), self._dense_norms)
            return
        after = [i for i, _ in self._norms if i >= self._calibrating.start]
        if after:
            self._outputs.invalidate(min(after))
            changed = [module for i, module in self._norms if i in after]
            with cumulative_averaging(changed):
                self._calibrating.run()
            self._reference.correct(changed)

    @torch.no_grad()
    def _take(self, measured: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Correct all batch norms by the statistics that a refit measured on the same batches."""
        self._outputs.invalidate(0)
        layers = dict(self.network.named_modules())
        norms = [(layers[path], found) for path, found in measured.items()]
        for layer, (mean, variance) in norms:
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
        self._reference.correct(tracking_layers(self.network), self._dense_norms)

    @cached_property
    def _few(self) -> Inputs:
        """The arguments for a few validation samples."""
        batch = self._validation.example(min(SAMPLES, self.batch_size), self.device)
        return self.task.inputs_of(channels_last(batch))

    def _traced(self) -> IncrementalExecutor | None:
        layers = {n: layer.paths for n, layer in self.factorisation.space.layers.items()}
        first = InputBatches(self.parts[0], self.task)
        examples = [rows(first[0], slice(0, n), first.sizes[0]) for n in (2, 3)]
        return IncrementalExecutor.of(self.network, layers, examples)

    def _shares_of(self, total: int) -> list[int]:
        """A number of bytes divided over the parts by their samples."""
        samples = [sum(part.sizes) for part in self.parts]
        return [total * count // sum(samples) for count in samples]

    def _calibration_pass(self) -> tuple[list[tuple[int, _BatchNorm]], CachedPass | None]:
        """The batch norms by operation, and the pass over the calibration inputs up to the last.

        None without batch norms, or if the network could not be traced.
        """
        executor = self._executor
        if executor is None or not self.batch_norm:
            return [], None
        modules = dict(executor.network.named_modules())
        calls = [(i, modules.get(str(n.target))) for i, n in enumerate(executor.nodes)]
        norms = [(i, m) for i, m in calls if is_tracking(m)]
        return norms, CachedPass(executor, self.calibration, stop=norms[-1][0] + 1)


def _several(calibration: Samples) -> bool:
    """Whether there are enough samples for batch-norm statistics; logs if there are not."""
    if len(calibration) > 1:
        return True
    logger.warning(
        "batch-norm statistics are not corrected: a variance needs two calibration samples or "
        "more, and there is one."
    )
    return False
