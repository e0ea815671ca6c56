"""Allocation to metrics: every allocation is evaluated once.

The `Backend` applies an allocation to the network under evaluation; `Evaluator.network` builds the
compressed network itself, with its thin layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.block_refit import BlockRefit
from rankNAS.compression.factorisation import Factorisation
from rankNAS.copies import copied
from rankNAS.data.samples import Samples
from rankNAS.evaluation.backend import Backend, Timing
from rankNAS.evaluation.outputs import Reference
from rankNAS.evaluation.pruning import PruneCallback, check_pruning, part_ends
from rankNAS.evaluation.verification import verify_costs
from rankNAS.exceptions import ObjectiveError, RankNASError, WeightsError
from rankNAS.io.tensors import read_tensors
from rankNAS.objectives.base import EvaluationResult, ObjectiveBase
from rankNAS.phases import Phases
from rankNAS.recovery.refinement import Refiner
from rankNAS.recovery.trainer import Recovery
from rankNAS.tasks.base import Sums, Task, added
from rankNAS.trees import channels_last

__all__ = ["Evaluator"]


@dataclass
class Evaluator:
    """Turns allocations into metrics; equal allocations are evaluated once.

    Args:
        factorisation: The factors, shared and never changed.
        task: Reads batches and outputs, and names the metrics.
        calibration: Samples from which batch-norm statistics are re-estimated.
        validation: Samples on which metrics are measured.
        objectives: Objectives to measure besides the task's metrics and the costs.
        extra_costs: Further costs of an allocation by name, for example a predicted latency.
        batch_norm: Correct batch-norm statistics by the change that compression causes on the
            calibration inputs; ignored without batch norms.
        batch_size: Samples per forward pass, at most. A CPU takes fewer at once, which is faster
            and needs less memory.
        device: Where to run.
        sequential: Refit the factors of returned networks sequentially to the inputs of the
            compressed network (`refit_sequentially`). Evaluations skip this for speed, unless
            they are final.
        low_memory: Keep no activations and, on the CPU, copy no weights of a network that exceeds
            the memory limit (`exceeds_memory_limit`): its thin layers are built at each call.
            Slower. Always on in pickled copies.
        known: The dense network's predictions for the validation samples, if known.
        recovery: A training of returned networks. Evaluations skip it, unless they are final.
        screened: Samples of either kind that screening uses; 0 for all.
        refiner: A block-wise refinement of returned networks, before any training. Evaluations
            always skip it; pickled copies do not have it.
        sensitive: The first so many validation samples, whose metrics are named ``NAME@sensitive``
            beside those of all; 0 for none.
        parts: Increasing shares up to 1, after which an evaluation may be pruned: of the epochs if
            the network is trained, of the validation samples otherwise.
        phases: Takes the CPU seconds of refinements.
        report: Called with the stage ``refit``, the layers done and all layers; pickled copies do
            not have it.
    """

    factorisation: Factorisation
    task: Task
    calibration: Samples
    validation: Samples
    objectives: Sequence[ObjectiveBase] = ()
    extra_costs: Callable[[Mapping[str, Choice]], Mapping[str, float]] | None = None
    batch_norm: bool = True
    batch_size: int = 256
    device: torch.device | str = "cpu"
    sequential: bool = False
    low_memory: bool = False
    recovery: Recovery | None = None
    screened: int = 0
    refiner: Refiner | None = None
    sensitive: int = 0
    parts: Sequence[float] = (1.0,)
    timing: Timing = field(default_factory=Timing)
    known: Sequence[Reference] | None = None
    phases: Phases = field(default_factory=Phases)
    report: Callable[[str, int, int], None] | None = None

    def __post_init__(self) -> None:
        self.backend = Backend(
            self.factorisation,
            self.task,
            self.calibration,
            self.validation,
            parts=self._validation_parts(),
            batch_norm=self.batch_norm,
            batch_size=self.batch_size,
            device=self.device,
            low_memory=self.low_memory,
            known=self.known,
            timing=self.timing,
        )
        self._known: dict[tuple[Allocation, bool, str], dict[str, float]] = {}  # by `_key`

    def __getstate__(self) -> dict[str, Any]:
        # A pickled copy needs little memory, as several on a machine would otherwise take many
        # times the network's memory. Data and weights keep their memory format, so that the copy
        # need not rearrange them.
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        placed = {
            "factorisation": self.backend.placed(),
            "calibration": self.calibration.placed(channels_last),
            "validation": self.validation.placed(channels_last),
            "known": [reference.detached() for reference in self.backend.references],
        }
        return {
            **state,
            **placed,
            "refiner": None,
            "low_memory": True,
            "timing": Timing(),
            "phases": Phases(),
            "report": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def evaluate(
        self,
        allocation: Allocation,
        *,
        final: bool = False,
        screening: bool = False,
        weights: str = "",
        should_continue: PruneCallback | None = None,
    ) -> dict[str, float]:
        """Metrics of an allocation: the task's metrics, costs, and the objectives.

        Args:
            allocation: One choice a layer.
            final: Evaluate the network that `network` returns, refitted and trained if the
                evaluator is set so. This takes several times longer.
            screening: Evaluate on a part of the samples, `screened` of either kind; not final.
            weights: The file of the network's trained weights; empty for truncated ones.
            should_continue: Called after each of the evaluator's parts but the last, with metrics
                that lack the measured objectives.

        Raises:
            ObjectiveError: An objective raised or returned a value that is not finite, or the
                training diverged.
            PrunedError: ``should_continue`` returned false.
            UsageError: The allocation does not belong to the space.
            WeightsError: The file of the weights is missing or damaged.
        """
        if screening and (few := self._few) is not None:
            return few.evaluate(allocation)
        key = self._key(allocation, final, weights)
        if key not in self._known:
            started, forward = time.perf_counter(), self.timing.forward
            self._known[key] = self._evaluate(*key, should_continue)
            elapsed = time.perf_counter() - started
            self.timing.other += elapsed - (self.timing.forward - forward)
        return dict(self._known[key])

    def remember(
        self,
        allocation: Allocation,
        metrics: Mapping[str, float],
        *,
        final: bool = False,
        screening: bool = False,
        weights: str = "",
    ) -> None:
        """Record metrics measured earlier, so that they are not measured again."""
        if screening and self._screens:
            return
        self._known[self._key(allocation, final, weights)] = dict(metrics)

    def forget(self) -> None:
        """Discard all cached metrics and activations."""
        self._known.clear()
        self.backend.invalidate()
        self.__dict__.pop("_few", None)

    def focused(self, order: Tensor, count: int) -> Evaluator:
        """The evaluator with its validation samples in an order; the first few are `sensitive`."""
        return replace(self, validation=self.validation.take(order), sensitive=count, known=None)

    def _validation_parts(self) -> tuple[float, ...]:
        parts = tuple(self.parts) if self.recovery is None else (1.0,)
        share = self.sensitive / len(self.validation)
        return tuple(sorted({*parts, share})) if 0 < share < 1 else parts

    @property
    def _screens(self) -> bool:
        return 0 < self.screened < max(len(self.calibration), len(self.validation))

    @cached_property
    def _few(self) -> Evaluator | None:
        """The evaluator on a part of the samples; None if they are few already."""
        if not self._screens:
            return None
        calibration, validation = (
            samples.take(torch.arange(min(self.screened, len(samples))))
            for samples in (self.calibration, self.validation)
        )
        return replace(
            self,
            calibration=calibration,
            validation=validation,
            known=None,
            sequential=False,
            recovery=None,
            refiner=None,
            parts=(1.0,),
            screened=0,
            sensitive=0,
        )

    def network(
        self, allocation: Allocation, *, trained: bool = True, weights: str = ""
    ) -> nn.Module:
        """The compressed network, in evaluation mode, with re-estimated batch norms.

        It is compared with what is measured before it is refined or trained: its outputs on a few
        validation samples, its parameters and its MACs.

        Args:
            allocation: One choice for each layer.
            trained: Whether to refine and train it, if the evaluator does so.
            weights: As for `evaluate`.

        Raises:
            NetworkError: It differs from what is measured.
            ObjectiveError: Its training diverged.
            WeightsError: The file of the weights is missing or damaged.
        """
        network = self._untrained(allocation, weights)
        if self.refiner is not None and trained:
            with self.phases.timed("refine"):
                network = self._refined(network, allocation, self.refiner)
        if self.recovery is None or not trained:
            return network
        return self._train(network, self.recovery)

    def _refined(self, network: nn.Module, allocation: Allocation, refiner: Refiner) -> nn.Module:
        refit = self.backend.refit if self.factorisation.streamed else None
        if isinstance(refit, BlockRefit):
            return refiner.refine_streamed(
                network, refit, allocation, self.device, fit=self.sequential
            )
        return refiner.refine(network, self.factorisation, self.device)

    def metrics_of(self, allocation: Allocation, network: nn.Module) -> dict[str, float]:
        """The metrics of `evaluate` for a network that was refined or trained further."""
        costs = self.costs(allocation)
        sums = self.backend.sums_of(network)
        return self._measure(allocation, sums, costs, lambda: copied(network))

    def dense(self) -> dict[str, float]:
        """The task's metrics of the dense network on the validation samples."""
        total: Sums = {}
        for reference in self.backend.references:
            total = added(total, reference.sums)
        return self.task.finish(total)

    def costs(self, allocation: Allocation) -> dict[str, float]:
        """Exact costs of the whole network and of its layers, and the extra ones."""
        exact = self.factorisation.space.costs(allocation)
        return {**exact, **(self.extra_costs(allocation) if self.extra_costs else {})}

    def _key(
        self, allocation: Allocation, final: bool, weights: str
    ) -> tuple[Allocation, bool, str]:
        refits = self.sequential and not weights
        return allocation, final and (refits or self.recovery is not None), weights

    def _evaluate(
        self,
        allocation: Allocation,
        final: bool,
        weights: str,
        should_continue: PruneCallback | None,
    ) -> dict[str, float]:
        costs = self.costs(allocation)
        if weights or (final and self.recovery is not None):
            network = self._untrained(allocation, weights)
            if final and self.recovery is not None:
                sums = self._trained_sums(network, self.recovery, costs, should_continue)
            else:
                sums = self.backend.sums_of(network)
            return self._measure(allocation, sums, costs, lambda: copied(network))
        factors = self._factors(allocation, final)
        with self.backend.applying(allocation, factors):
            sums, few = self._sums(costs, should_continue)
            found = self._measure(
                allocation, sums, costs, lambda: self.backend.build(allocation, factors)
            )
            return {**found, **{f"{name}@sensitive": value for name, value in few.items()}}

    def _measure(
        self,
        allocation: Allocation,
        sums: Sums,
        costs: dict[str, float],
        build: Callable[[], nn.Module],
    ) -> dict[str, float]:
        metrics = self.task.finish(sums)
        samples, device = self.validation, self.device
        candidate = EvaluationResult(allocation, metrics, costs, self.task, samples, build, device)
        # A predicted cost replaces a measured one; any other objective is measured.
        measured = {o.name: o(candidate) for o in self.objectives if o.name not in costs}
        return {**metrics, **costs, **measured}

    def _sums(
        self, costs: dict[str, float], should_continue: PruneCallback | None
    ) -> tuple[Sums, dict[str, float]]:
        """The sums over all validation samples, unless the evaluation is pruned.

        Also the metrics of the sensitive ones.
        """
        total: Sums = {}
        few: dict[str, float] = {}
        seen, asked = 0, part_ends(self.parts, len(self.validation))
        for part, sums in zip(self.backend.parts, self.backend.sums(), strict=True):
            total = added(total, sums)
            seen += sum(part.sizes)
            if seen == self.sensitive:
                few = self.task.finish(total)
            if should_continue is not None and seen < len(self.validation) and seen in asked:
                words = f"{seen} validation samples"
                check_pruning(should_continue, seen, words, self.task.finish(total) | costs)
        return total, few

    def _trained_sums(
        self,
        network: nn.Module,
        recovery: Recovery,
        costs: dict[str, float],
        should_continue: PruneCallback | None,
    ) -> Sums:
        """Train a network, unless the evaluation is pruned; return its final sums."""
        epochs = recovery.config.epochs

        def on_epoch(epoch: int) -> None:
            if should_continue is not None and epoch in part_ends(self.parts, epochs)[:-1]:
                words = f"{epoch} of {epochs} epochs"
                metrics = self.task.finish(self.backend.sums_of(network))
                check_pruning(should_continue, epoch, words, metrics | costs)

        self._train(network, recovery, on_epoch)
        return self.backend.sums_of(network)

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

    def _factors(self, allocation: Allocation, refit: bool) -> Factorisation:
        """The factors of an allocation, refitted if `refit` and the evaluator is set so."""
        self.factorisation.space.check(allocation)
        if not (refit and self.sequential):
            return self.factorisation
        on_layer = None if self.report is None else partial(self.report, "refit")
        return self.backend.refit.factors(allocation, on_layer)

    def _untrained(self, allocation: Allocation, weights: str = "") -> nn.Module:
        """The network of an allocation, with weights of a file if there are any.

        Otherwise its factors are refitted if the evaluator is set so.
        """
        factors = self._factors(allocation, refit=not weights)
        with self.backend.applying(allocation, factors):
            network = self.backend.build(allocation, factors)
        if weights:
            _load(network, weights)
        space = self.factorisation.space
        batch = channels_last(self.calibration.example(space.batch_size, self.device))
        inputs = self.task.inputs_of(batch)
        verify_costs(network, space, allocation, self.factorisation.model, inputs)
        return network


def _load(network: nn.Module, weights: str) -> None:
    """Fill a network with the weights that a strategy has trained for it."""
    if not Path(weights).is_file():
        raise WeightsError(
            f"the weights that the search has trained are no longer at {weights!r}; search again "
            "under another name."
        )
    state, _ = read_tensors(Path(weights))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"{weights!r} has weights of another network: {error}") from None
