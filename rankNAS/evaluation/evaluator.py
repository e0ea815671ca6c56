"""Allocation to metrics: every allocation is evaluated once.

The `Backend` applies an allocation to the network under evaluation; `Evaluator.network` builds the
compressed network itself, with its thin layers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.reconstruction import refit_sequentially
from rankNAS.evaluation.backend import Backend, Timing
from rankNAS.evaluation.outputs import output_metrics
from rankNAS.evaluation.pruning import PruneCallback, check_pruning, part_ends
from rankNAS.exceptions import ObjectiveError, RankNASError
from rankNAS.objectives.base import EvaluationResult, ObjectiveBase
from rankNAS.recovery.trainer import Recovery

__all__ = ["Evaluator"]


@dataclass
class Evaluator:
    """Turns allocations into metrics; equal allocations are evaluated once.

    Args:
        factorisation: The factors, shared and never changed.
        calibration: Inputs (samples, …) from which batch-norm statistics are re-estimated.
        validation: Inputs and targets on which metrics are measured.
        objectives: Objectives to measure besides loss, accuracy, divergences and costs.
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
        known_logits: The dense network's outputs on the validation inputs, if known.
        recovery: A training of returned networks. Evaluations skip it, unless they are final.
        parts: Increasing shares up to 1, after which an evaluation may be pruned: of the epochs if
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
        self.backend = Backend(
            self.factorisation,
            self.calibration,
            self.validation[0],
            parts=self.parts if self.recovery is None else (1.0,),
            batch_norm=self.batch_norm,
            batch_size=self.batch_size,
            device=self.device,
            low_memory=self.low_memory,
            known_logits=self.known_logits,
            timing=self.timing,
        )
        self.dense_logits = self.backend.dense_logits
        self._targets = self.validation[1].to(self.device)
        self._known: dict[tuple[Allocation, bool], dict[str, float]] = {}  # by `_key`

    def __getstate__(self) -> dict[str, Any]:
        # A pickled copy needs little memory, as several on a machine would otherwise take many
        # times the network's memory. Data and weights keep their memory format, so that the copy
        # need not rearrange them.
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        placed = {
            "factorisation": self.backend.placed(),
            "calibration": self.backend.calibration,
            "validation": (self.backend.inputs, self._targets),
            "known_logits": self.dense_logits,
        }
        return {**state, **placed, "low_memory": True, "timing": Timing()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def evaluate(
        self,
        allocation: Allocation,
        *,
        final: bool = False,
        should_continue: PruneCallback | None = None,
    ) -> dict[str, float]:
        """Metrics of an allocation: accuracy, loss, divergences, costs, and the objectives.

        Args:
            allocation: One choice a layer.
            final: Evaluate the network that `network` returns, refitted and trained if the
                evaluator is set so. This takes several times longer.
            should_continue: Called after each of the evaluator's parts but the last, with metrics
                that lack the measured objectives.

        Raises:
            ObjectiveError: An objective raised or returned a value that is not finite, or the
                training diverged.
            PrunedError: ``should_continue`` returned false.
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
        """Discard all cached metrics and activations."""
        self._known.clear()
        self.backend.invalidate()

    def network(self, allocation: Allocation) -> nn.Module:
        """The compressed network, in evaluation mode, with re-estimated batch norms.

        Raises:
            ObjectiveError: Its training diverged.
        """
        network = self._untrained(allocation)
        return network if self.recovery is None else self._train(network, self.recovery)

    def costs(self, allocation: Allocation) -> dict[str, float]:
        """Exact costs of the whole network, and the extra ones."""
        cost = self.factorisation.space.cost(allocation)
        exact = {"macs": cost.macs, "params": cost.params, "weight_bytes": cost.weight_bytes}
        return {**exact, **(self.extra_costs(allocation) if self.extra_costs else {})}

    def _key(self, allocation: Allocation, final: bool) -> tuple[Allocation, bool]:
        return allocation, final and (self.sequential or self.recovery is not None)

    def _evaluate(
        self, allocation: Allocation, final: bool, should_continue: PruneCallback | None
    ) -> dict[str, float]:
        costs = self.costs(allocation)
        if final and self.recovery is not None:
            network = self._untrained(allocation)
            logits = self._trained_outputs(network, self.recovery, costs, should_continue)
            return self._measure(allocation, logits, costs, lambda: copy.deepcopy(network))
        factors = self._factors(allocation, final)
        with self.backend.applying(allocation, factors):
            logits = self._outputs(costs, should_continue)
            return self._measure(
                allocation, logits, costs, lambda: self.backend.build(allocation, factors)
            )

    def _measure(
        self,
        allocation: Allocation,
        logits: Tensor,
        costs: dict[str, float],
        build: Callable[[], nn.Module],
    ) -> dict[str, float]:
        x, y, dense = self.backend.inputs, self._targets, self.dense_logits
        candidate = EvaluationResult(allocation, logits, dense, y, x, costs, build)
        # A predicted cost replaces a measured one; any other objective is measured.
        measured = {o.name: o(candidate) for o in self.objectives if o.name not in costs}
        return {**self._metrics(logits), **costs, **measured}

    def _outputs(self, costs: dict[str, float], should_continue: PruneCallback | None) -> Tensor:
        """The outputs on all validation samples, unless the evaluation is pruned."""
        found: list[Tensor] = []
        for part in self.backend.outputs():
            found.append(part)
            seen = sum(map(len, found))
            if should_continue is not None and seen < len(self._targets):
                words = f"{seen} validation samples"
                check_pruning(
                    should_continue, seen, words, self._metrics(torch.cat(found)) | costs
                )
        return torch.cat(found)

    def _trained_outputs(
        self,
        network: nn.Module,
        recovery: Recovery,
        costs: dict[str, float],
        should_continue: PruneCallback | None,
    ) -> Tensor:
        """Train a network, unless the evaluation is pruned; return its final outputs."""
        epochs = recovery.config.epochs

        def on_epoch(epoch: int) -> None:
            if should_continue is not None and epoch in part_ends(self.parts, epochs)[:-1]:
                words = f"{epoch} of {epochs} epochs"
                check_pruning(
                    should_continue,
                    epoch,
                    words,
                    self._metrics(self.backend.outputs_of(network)) | costs,
                )

        self._train(network, recovery, on_epoch)
        return self.backend.outputs_of(network)

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
        return output_metrics(logits, self._targets, self.dense_logits)

    def _factors(self, allocation: Allocation, refit: bool) -> Factorisation:
        """The factors of an allocation, refitted if `refit` and the evaluator is set so."""
        self.factorisation.space.check(allocation)
        if not (refit and self.sequential):
            return self.factorisation
        return refit_sequentially(
            self.factorisation, allocation, self.backend.calibration, batch_size=self.batch_size
        )

    def _untrained(self, allocation: Allocation) -> nn.Module:
        """The network of an allocation, with refitted factors if the evaluator is set so."""
        factors = self._factors(allocation, refit=True)
        with self.backend.applying(allocation, factors):
            return self.backend.build(allocation, factors)
