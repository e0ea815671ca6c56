"""Allocation to metrics.

A candidate is evaluated with the decomposed layers multiplied out into the dense layers' weights:
the same function, at dense speed on any device, and moving from one allocation to the next touches
only the layers that differ. The network itself, with its thin layers, is built on demand.
Where the model can be traced, a forward pass begins at the first layer that differs from the last
allocation's (`stages`), so that neighbours are cheap.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from rankNAS.allocation import DENSE, Allocation, Choice
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
from rankNAS.compression.reconstruction import refit_sequentially
from rankNAS.compression.surgery import exceeds_memory_limit, shared_copy
from rankNAS.data.batches import batches, channels_last
from rankNAS.exceptions import ObjectiveError, RankNASError
from rankNAS.objectives.base import EvaluationResult, ObjectiveBase
from rankNAS.objectives.quality import accuracy, kl_divergence, loss, reverse_kl
from rankNAS.recovery.trainer import Recovery

__all__ = ["Evaluator", "PrunedError", "Timing", "predictions", "quality", "test_metrics"]

#: Takes the validation samples seen, or epochs trained, and the metrics then; whether to go on.
PruneCallback = Callable[[int, Mapping[str, float]], bool]

# Of a forward pass, for each CPU thread: activations of more leave its caches. On ResNet-20, 256
# samples at once take 1.13 times as long as 64 (studies/benchmark).
CPU_SAMPLES = 64


class PrunedError(Exception):
    """An evaluation that was stopped early.

    Args:
        step: What was done until then, in words.
        metrics: What was measured then.
    """

    def __init__(self, step: str, metrics: Mapping[str, float]) -> None:
        super().__init__(f"stopped after {step}")
        self.step, self.metrics = step, dict(metrics)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, self.metrics)


@dataclass
class Timing:
    """Where evaluation time went, in seconds: forward passes, and everything else."""

    forward: float = 0.0
    other: float = 0.0


@dataclass
class Evaluator:
    """Turns allocations into metrics; identical allocations are evaluated once.

    Args:
        factorisation: The factors, shared and never changed.
        calibration: Inputs (samples, …) from which batch-norm statistics are re-estimated.
        validation: Inputs and targets that metrics are measured on.
        objectives: What to measure besides the metrics that come for free.
        extra_costs: Further costs of an allocation by name, for example a predicted latency.
        batch_norm: Correct batch-norm statistics by what compression changed, measured on the
            calibration inputs; ignored without batch norms.
        batch_size: Samples a forward pass, at most. A CPU takes fewer at once, which is faster and
            needs less memory.
        device: Where to run.
        sequential: Give the networks that are built factors that suit their own inputs, layer
            after layer (`sequential`). Evaluations are without, for speed, unless asked for.
        low_memory: Keep no activations and, on the CPU, copy no weights of a network that exceeds
            the memory limit (`exceeds_memory_limit`): its thin layers are made whenever they are
            called. Slower. Pickled copies have it on.
        known_logits: The dense network's outputs on the validation inputs, where known.
        recovery: A training of the networks that are built; evaluations are without unless asked
            for.
        parts: Shares, increasing to 1, after which an evaluation may be stopped: of the epochs if
            the network is trained, of the validation samples otherwise.
    """

    factorisation: Factorisation
    calibration: Tensor
    validation: tuple[Tensor, Tensor]
    objectives: Sequence[ObjectiveBase] = ()
    extra_costs: Callable[[Mapping[str, Choice]], Mapping[str, float]] | None = None
    batch_norm: bool = True
    batch_size: int = 256
    device: torch.device | str = "cpu"
    sequential: bool = False
    low_memory: bool = False
    recovery: Recovery | None = None
    parts: Sequence[float] = (1.0,)
    timing: Timing = field(default_factory=Timing)
    known_logits: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.validation[1])
        ends = self._ends(count) if self.recovery is None else [count]
        self._sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self._at_once = self.batch_size
        if torch.device(self.device).type == "cpu":
            self._at_once = min(self.batch_size, CPU_SAMPLES * torch.get_num_threads())
        model = self.factorisation.model
        # On another device, a copy must be made in any case.
        self._shares = (
            self.low_memory
            and torch.device(self.device).type == "cpu"
            and exceeds_memory_limit(model)
        )
        self._scratch = shared_copy(model) if self._shares else copy.deepcopy(model)
        self._scratch = self._scratch.to(self.device).eval()
        self._applied = {n: (layer, DENSE) for n, layer in self.factorisation.layers.items()}
        self._known: dict[tuple[Allocation, bool], dict[str, float]] = {}  # by `_key`
        self.batch_norm = self.batch_norm and has_batch_norm(self._scratch)
        self._calibration = self._place(self.calibration)
        self._inputs = self._place(self.validation[0])
        self._targets = self.validation[1].to(self.device)
        if self._inputs.dim() == 4:
            self._scratch = self._scratch.to(memory_format=torch.channels_last)
        self._stages = None if self.low_memory else self._traced()
        self._passes = self._make_passes()
        known = self.known_logits
        self.dense_logits = torch.cat(list(self._forward())) if known is None else known
        if self.batch_norm:
            self._reference = BatchNormReference(self._scratch, self._calibration, self._at_once)
            self._dense_norms = tracking_layers(self._scratch)
        self._invalidate(0)

    def __getstate__(self) -> dict[str, Any]:
        # What a copy elsewhere is made from; it is lean, as several on a machine would take many
        # times the network's memory otherwise. Data and weights go as they lie in memory here, so
        # that the copy need not rearrange them.
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        model = self.factorisation.model
        if self._inputs.dim() == 4:
            model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        placed = {
            "factorisation": replace(self.factorisation, model=model),
            "calibration": self._calibration,
            "validation": (self._inputs, self._targets),
            "known_logits": self.dense_logits,
        }
        return {**state, **placed, "low_memory": True, "timing": Timing()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _place(self, x: Tensor) -> Tensor:
        return channels_last(x.to(self.device))

    def _ends(self, count: int) -> list[int]:
        """Where the parts of so many things end."""
        return sorted({max(1, round(share * count)) for share in self.parts})

    def _key(self, allocation: Allocation, final: bool) -> tuple[Allocation, bool]:
        return allocation, final and (self.sequential or self.recovery is not None)

    def evaluate(
        self,
        allocation: Allocation,
        *,
        final: bool = False,
        should_continue: PruneCallback | None = None,
    ) -> dict[str, float]:
        """Metrics of an allocation: accuracy and loss, agreement, costs, and the objectives.

        Args:
            allocation: One choice a layer.
            final: As `network` makes it, with refitted factors and trained, if the evaluator does
                that; it takes several times longer.
            should_continue: Asked after each of the evaluator's parts but the last. The metrics
                that it is given lack the objectives that must be measured.

        Raises:
            ObjectiveError: An objective raised or returned something that is not finite, or the
                training diverged.
            PrunedError: The verdict was to stop.
            UsageError: The allocation does not belong to the space.
        """
        key = self._key(allocation, final)
        if key not in self._known:
            started, forward = time.perf_counter(), self.timing.forward
            self._known[key] = self._evaluate(*key, should_continue)
            elapsed = time.perf_counter() - started
            self.timing.other += elapsed - (self.timing.forward - forward)
        return dict(self._known[key])

    def remember(
        self, allocation: Allocation, metrics: Mapping[str, float], *, final: bool = False
    ) -> None:
        """Record metrics measured earlier, so that they are not measured again."""
        self._known[self._key(allocation, final)] = dict(metrics)

    def forget(self) -> None:
        """Evaluate everything anew, from the first layer on, as if nothing had been yet."""
        self._known.clear()
        self._invalidate(0)

    def network(self, allocation: Allocation) -> nn.Module:
        """The compressed network, in evaluation mode, with re-estimated batch norms.

        Raises:
            ObjectiveError: Its training, if there is one, diverged.
        """
        network = self._untrained(allocation)
        return network if self.recovery is None else self._train(network, self.recovery)

    def costs(self, allocation: Allocation) -> dict[str, float]:
        """Exact costs of the whole network, and the extra ones."""
        cost = self.factorisation.space.cost(allocation)
        exact = {"macs": cost.macs, "params": cost.params, "weight_bytes": cost.weight_bytes}
        return {**exact, **(self.extra_costs(allocation) if self.extra_costs else {})}

    def _evaluate(
        self, allocation: Allocation, final: bool, should_continue: PruneCallback | None
    ) -> dict[str, float]:
        costs = self.costs(allocation)
        if final and self.recovery is not None:
            network = self._untrained(allocation)
            logits = self._trained_outputs(network, self.recovery, costs, should_continue)
            return self._measure(allocation, logits, costs, lambda: copy.deepcopy(network))
        with self._applying(allocation, final) as factorisation:
            logits = self._outputs(costs, should_continue)
            return self._measure(
                allocation, logits, costs, lambda: self._build(allocation, factorisation)
            )

    def _measure(
        self,
        allocation: Allocation,
        logits: Tensor,
        costs: Mapping[str, float],
        build: Callable[[], nn.Module],
    ) -> dict[str, float]:
        candidate = EvaluationResult(
            allocation, logits, self.dense_logits, self._targets, self._inputs, costs, build
        )
        # A predicted cost stands in for a measured one; any other objective is measured.
        measured = {o.name: o(candidate) for o in self.objectives if o.name not in costs}
        return {**self._metrics(logits), **costs, **measured}

    def _outputs(
        self, costs: Mapping[str, float], should_continue: PruneCallback | None
    ) -> Tensor:
        """The outputs on all validation samples, as long as the verdict is to go on."""
        found: list[Tensor] = []
        for part in self._forward():
            found.append(part)
            seen = sum(map(len, found))
            if should_continue is not None and seen < len(self._targets):
                words = f"{seen} validation samples"
                self._ask(should_continue, seen, words, torch.cat(found), costs)
        return torch.cat(found)

    def _ask(
        self,
        should_continue: PruneCallback,
        step: int,
        words: str,
        logits: Tensor,
        costs: Mapping[str, float],
    ) -> None:
        """Raise a PrunedError unless the verdict at a step is to go on."""
        metrics = {**self._metrics(logits), **costs}
        if not should_continue(step, metrics):
            raise PrunedError(words, metrics)

    def _trained_outputs(
        self,
        network: nn.Module,
        recovery: Recovery,
        costs: Mapping[str, float],
        should_continue: PruneCallback | None,
    ) -> Tensor:
        """Train a network as long as the verdict is to go on; its outputs in the end."""
        epochs = recovery.config.epochs

        def outputs() -> Tensor:
            samples = self._inputs, self._targets
            size = self._at_once
            return predictions(network, samples, batch_size=size, device=self.device)[0]

        def on_epoch(epoch: int) -> None:
            if should_continue is not None and epoch < epochs and epoch in self._ends(epochs):
                self._ask(should_continue, epoch, f"{epoch} of {epochs} epochs", outputs(), costs)

        self._train(network, recovery, on_epoch)
        return outputs()

    def _train(
        self,
        network: nn.Module,
        recovery: Recovery,
        on_epoch: Callable[[int], object] | None = None,
    ) -> nn.Module:
        dense = self.factorisation.model
        try:
            return recovery.train(network, dense, device=self.device, on_epoch=on_epoch)
        except RankNASError as error:  # it diverged
            raise ObjectiveError(str(error)) from None

    def _metrics(self, logits: Tensor) -> dict[str, float]:
        """What comes for free, on the first validation samples."""
        targets, dense = self._targets[: len(logits)], self.dense_logits[: len(logits)]
        metrics = quality(logits, targets)
        if logits.dim() > 1 and not targets.is_floating_point():
            metrics["kl_divergence"] = kl_divergence(logits, dense)
            metrics["reverse_kl"] = reverse_kl(logits, dense)
        return metrics

    @contextmanager
    def _applying(self, allocation: Allocation, refit: bool) -> Iterator[Factorisation]:
        """The scratch network as an allocation makes it, and the factors that it then has."""
        factors = self._factors(allocation, refit)
        try:
            self._apply(allocation, factors)
            yield factors
        finally:
            if factors is not self.factorisation:  # the refitted ones can go
                self._write(self.factorisation.space.dense, self.factorisation)

    def _factors(self, allocation: Allocation, refit: bool) -> Factorisation:
        """The factors of an allocation, refitted if wanted and the evaluator does that."""
        self.factorisation.space.check(allocation)
        if not (refit and self.sequential):
            return self.factorisation
        return refit_sequentially(
            self.factorisation, allocation, self._calibration, batch_size=self.batch_size
        )

    @torch.no_grad()
    def _apply(self, allocation: Allocation, factorisation: Factorisation) -> None:
        """Give the scratch network the weights and batch-norm statistics of an allocation."""
        self._write(allocation, factorisation)
        if self.batch_norm:
            started = time.perf_counter()
            self._reestimate()
            self.timing.forward += time.perf_counter() - started

    @torch.no_grad()
    def _write(self, allocation: Allocation, factorisation: Factorisation) -> None:
        """Give the scratch network the weights of an allocation, where they are others."""
        if self._shares:
            self._scratch = factorisation.made_when_called(allocation).eval()
            return
        changed = []
        for name, choice in allocation.items():
            layer = factorisation.layers[name]
            applied, before = self._applied[name]
            if layer is not applied or choice != before:
                layer.write(self._scratch, choice)
                self._applied[name] = layer, choice
                changed.append(name)
        if self._stages is not None and changed:
            self._invalidate(min(self._stages.cut_points[name] for name in changed))

    def _reestimate(self) -> None:
        """Batch-norm statistics of everything that has changed."""
        if self._stages is None:
            reestimate_batch_norm(self._scratch, self._calibration, self._at_once)
            self._reference.correct(tracking_layers(self._scratch), self._dense_norms)
            return
        calibration = self._passes[0]
        after = [i for i, _ in self._norms if i >= calibration.start]
        if after:
            for own in self._own_passes():
                if own is not None:
                    own.invalidate(min(after))
            changed = [module for i, module in self._norms if i in after]
            with cumulative_averaging(changed):
                calibration.run()
            self._reference.correct(changed)

    def _forward(self) -> Iterator[Tensor]:
        """The outputs on the validation inputs, part by part."""
        for inputs, own in zip(self._inputs.split(self._sizes), self._own_passes(), strict=True):
            started = time.perf_counter()
            with torch.no_grad():
                if own is None:
                    outputs = [self._scratch(x) for x in inputs.split(self._at_once)]
                else:
                    outputs = own.run()
                logits = torch.cat(outputs)
            self.timing.forward += time.perf_counter() - started
            yield logits

    def _own_passes(self) -> Sequence[CachedPass | None]:
        """Those over the validation inputs, one a part."""
        return self._passes[-len(self._sizes) :] or [None] * len(self._sizes)

    def _traced(self) -> IncrementalExecutor | None:
        layers = {n: layer.paths for n, layer in self.factorisation.space.layers.items()}
        examples = [self._inputs[:2], self._inputs[:3]]
        return IncrementalExecutor.of(self._scratch, layers, examples)

    def _make_passes(self) -> list[CachedPass]:
        """Over the calibration inputs, up to the last batch norm, and the validation inputs."""
        self._norms: list[tuple[int, _BatchNorm]] = []
        if self._stages is None:
            return []
        parts = self._inputs.split(self._sizes)
        passes = [CachedPass(self._stages, part.split(self._at_once)) for part in parts]
        if self.batch_norm:
            modules = dict(self._stages.network.named_modules())
            calls = [(i, modules.get(str(n.target))) for i, n in enumerate(self._stages.nodes)]
            self._norms = [(i, m) for i, m in calls if is_tracking(m)]
            chunks = even_chunks(self._calibration, self._at_once)
            passes.insert(0, CachedPass(self._stages, chunks, stop=self._norms[-1][0] + 1))
        return passes

    def _invalidate(self, first: int) -> None:
        for repeated in self._passes:
            repeated.invalidate(first)

    def _untrained(self, allocation: Allocation) -> nn.Module:
        """The network of an allocation, its factors refitted if the evaluator does that."""
        with self._applying(allocation, refit=True) as factorisation:
            return self._build(allocation, factorisation)

    def _build(self, allocation: Allocation, factorisation: Factorisation) -> nn.Module:
        """The network of the allocation that is applied now."""
        network = factorisation.materialise(allocation).to(self.device).eval()
        for name, module in self._scratch.named_modules():
            if isinstance(module, _BatchNorm):
                network.get_submodule(name).load_state_dict(module.state_dict())
        return network


def quality(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Loss, and accuracy where the targets are classes."""
    metrics = {"loss": loss(logits, targets)}
    if not targets.is_floating_point():
        metrics["accuracy"] = accuracy(logits, targets)
    return metrics


def test_metrics(
    network: nn.Module,
    dataset: Dataset[Any] | tuple[Tensor, Tensor],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Loss and accuracy of a network on a data set, streamed."""
    return quality(*predictions(network, dataset, batch_size=batch_size, device=device))


@torch.no_grad()
def predictions(
    network: nn.Module,
    dataset: Dataset[Any] | tuple[Tensor, Tensor],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Outputs of a network and the targets of a data set, streamed."""
    network = network.to(device).eval()
    logits, targets = [], []
    for x, y in batches(dataset, batch_size, device=device):
        logits.append(network(channels_last(x)))
        targets.append(y)
    return torch.cat(logits), torch.cat(targets)
