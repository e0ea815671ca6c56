"""The network under evaluation: it takes the weights of one allocation after another.

The factors of a layer are multiplied out into its dense weight. This is the same function at dense
speed, and only the layers that differ from the last allocation are written. If the model can be
traced, a forward pass begins at the first of them (`IncrementalExecutor`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.batch_norm import (
    BatchNormReference,
    cumulative_averaging,
    even_chunks,
    has_batch_norm,
    is_tracking,
    reestimate_batch_norm,
    tracking_layers,
)
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.incremental import CachedPass, IncrementalExecutor
from rankNAS.compression.surgery import exceeds_memory_limit, shared_copy
from rankNAS.data.batches import channels_last
from rankNAS.evaluation.outputs import PartwiseOutputs
from rankNAS.evaluation.pruning import part_ends

__all__ = ["Backend", "Timing"]

# Samples per forward pass for each CPU thread: activations of larger batches exceed its caches. On
# ResNet-20, 256 samples at once take 1.13 times as long as 64 (studies/benchmark).
CPU_SAMPLES = 64


@dataclass
class Timing:
    """Evaluation time in seconds: forward passes, and everything else."""

    forward: float = 0.0
    other: float = 0.0


class Backend:
    """The network under evaluation, with its calibration and validation inputs on one device.

    Args:
        factorisation: The factors, shared and never changed.
        calibration: Inputs (samples, …) from which batch-norm statistics are re-estimated.
        inputs: Validation inputs (samples, …).
        parts: Increasing shares up to 1 of the validation inputs, which are run part by part.
        batch_norm: Whether to correct batch-norm statistics; ignored without batch norms.
        batch_size: Samples per forward pass, at most; a CPU takes fewer.
        device: Where to run.
        low_memory: Keep no activations. On the CPU, also copy no weights of a network that exceeds
            the memory limit.
        known_logits: The dense network's outputs on the validation inputs, if known.
        timing: Records the time of forward passes.
    """

    def __init__(
        self,
        factorisation: Factorisation,
        calibration: Tensor,
        inputs: Tensor,
        *,
        parts: Sequence[float],
        batch_norm: bool,
        batch_size: int,
        device: torch.device | str,
        low_memory: bool,
        known_logits: Tensor | None,
        timing: Timing,
    ) -> None:
        self.factorisation, self.device, self.timing = factorisation, device, timing
        self.batch_size = batch_size
        cpu = torch.device(device).type == "cpu"
        if cpu:
            self.batch_size = min(batch_size, CPU_SAMPLES * torch.get_num_threads())
        model = factorisation.model
        # On another device, a copy is needed in any case.
        self._shares = low_memory and cpu and exceeds_memory_limit(model)
        network = shared_copy(model) if self._shares else copy.deepcopy(model)
        self.network = network.to(device).eval()
        self._applied = {name: (layer, DENSE) for name, layer in factorisation.layers.items()}
        self.batch_norm = batch_norm and has_batch_norm(self.network)
        self.calibration = channels_last(calibration.to(device))
        self.inputs = channels_last(inputs.to(device))
        if self.inputs.dim() == 4:
            self.network = self.network.to(memory_format=torch.channels_last)
        self._executor = None if low_memory else self._traced()
        ends = part_ends(parts, len(inputs))
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self._outputs = PartwiseOutputs(self.inputs, sizes, self.batch_size, self._executor)
        self._norms, self._calibrating = self._calibration_pass()
        self.dense_logits = (
            torch.cat(list(self.outputs())) if known_logits is None else known_logits
        )
        if self.batch_norm:
            self._reference = BatchNormReference(self.network, self.calibration, self.batch_size)
            self._dense_norms = tracking_layers(self.network)
        self.invalidate()

    @property
    def incremental(self) -> bool:
        """Whether a forward pass begins at the first layer that changed."""
        return self._executor is not None

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
                self._reestimate()
                self.timing.forward += time.perf_counter() - started
            yield
        finally:
            if factorisation is not self.factorisation:
                self._write(self.factorisation.space.dense, self.factorisation)

    def outputs(self) -> Iterator[Tensor]:
        """Yield the outputs on the validation inputs, part by part."""
        for number in range(len(self._outputs)):
            started = time.perf_counter()
            logits = self._outputs.part(number, self.network)
            self.timing.forward += time.perf_counter() - started
            yield logits

    @torch.no_grad()
    def outputs_of(self, network: nn.Module) -> Tensor:
        """The outputs of another network on the validation inputs, in evaluation mode."""
        network = network.to(self.device).eval()
        return torch.cat([network(x) for x in self.inputs.split(self.batch_size)])

    def build(self, allocation: Mapping[str, Choice], factorisation: Factorisation) -> nn.Module:
        """The compressed network of the allocation that is applied now, with its thin layers."""
        network = factorisation.materialise(allocation).to(self.device).eval()
        for name, module in self.network.named_modules():
            if isinstance(module, _BatchNorm):
                network.get_submodule(name).load_state_dict(module.state_dict())
        return network

    def invalidate(self, first: int = 0) -> None:
        """Discard cached activations of the operations from number `first` on."""
        self._outputs.invalidate(first)
        if self._calibrating is not None:
            self._calibrating.invalidate(first)

    def placed(self) -> Factorisation:
        """The factorisation with the model's weights in the memory format of the network."""
        model = self.factorisation.model
        if self.inputs.dim() == 4:
            model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        return replace(self.factorisation, model=model)

    @torch.no_grad()
    def _write(self, allocation: Mapping[str, Choice], factorisation: Factorisation) -> None:
        """Set the weights of the layers whose factors or choice changed."""
        if self._shares:
            self.network = factorisation.made_when_called(allocation).eval()
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
            reestimate_batch_norm(self.network, self.calibration, self.batch_size)
            self._reference.correct(tracking_layers(self.network), self._dense_norms)
            return
        after = [i for i, _ in self._norms if i >= self._calibrating.start]
        if after:
            self._outputs.invalidate(min(after))
            changed = [module for i, module in self._norms if i in after]
            with cumulative_averaging(changed):
                self._calibrating.run()
            self._reference.correct(changed)

    def _traced(self) -> IncrementalExecutor | None:
        layers = {n: layer.paths for n, layer in self.factorisation.space.layers.items()}
        examples = [self.inputs[:2], self.inputs[:3]]
        return IncrementalExecutor.of(self.network, layers, examples)

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
        chunks = even_chunks(self.calibration, self.batch_size)
        return norms, CachedPass(executor, chunks, stop=norms[-1][0] + 1)
