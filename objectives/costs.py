"""Cost objectives: exact counts, and wall-clock latency on this device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from rankNAS.objectives.base import Direction, EvaluationResult, ObjectiveBase

__all__ = ["CostObjective", "Latency", "median_seconds"]


@final
@dataclass(frozen=True)
class CostObjective(ObjectiveBase):
    """An exact cost of the whole network: ``macs``, ``params`` or ``weight_bytes``."""

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
        return median_seconds(candidate.build(), candidate.inputs[: self.batch_size], self.repeats)


@torch.no_grad()
def median_seconds(network: nn.Module, inputs: Tensor, repeats: int) -> float:
    """Median seconds of a forward pass."""
    seconds = []
    for repeat in range(repeats + 2):
        started = time.perf_counter()
        network(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        if repeat >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
