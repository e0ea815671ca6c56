"""Cost objectives: exact counts, and wall-clock latency on this device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from rankNAS.objectives.base import Direction, EvaluationResult, ObjectiveBase
from rankNAS.trees import Inputs, device_of

__all__ = ["CostObjective", "Latency", "median_seconds"]


@final
@dataclass(frozen=True)
class CostObjective(ObjectiveBase):
    """An exact cost of the whole network: ``macs``, ``params`` or ``weight_bytes``.

    ``layer_macs`` and ``layer_params`` count the decomposable layers alone.
    """

    name: str
    direction: Direction = "minimize"

    def measure(self, candidate: EvaluationResult) -> float:
        return candidate.costs[self.name]


@final
@dataclass(frozen=True)
class Latency(ObjectiveBase):
    """Median seconds of one forward pass of the compressed network, measured on its device.

    Args:
        batch_size: Samples per pass.
        repeats: Timed passes, after two warm-up passes.
    """

    batch_size: int = 1
    repeats: int = 15
    name: str = "latency"
    direction: Direction = "minimize"

    def measure(self, candidate: EvaluationResult) -> float:
        return median_seconds(candidate.build(), candidate.example(self.batch_size), self.repeats)


@torch.no_grad()
def median_seconds(network: nn.Module, inputs: Inputs | Tensor, repeats: int) -> float:
    """Median seconds of a forward pass."""
    given, device = Inputs.of(inputs), device_of(network)
    seconds = []
    for repeat in range(repeats + 2):
        started = time.perf_counter()
        given.run(network)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
