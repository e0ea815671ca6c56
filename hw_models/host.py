"""This machine, measured: every distinct shape is built and timed once.

Timings of one process are kept, so that equal layers and later searches cost nothing. The layers
are timed alone; what a fused neighbour would save is not seen.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.decompositions import OPERATORS, LayerShape
from rankNAS.hw_models.base import HardwareModel
from rankNAS.search_spaces.base import Layer

__all__ = ["Host"]


@final
@dataclass(frozen=True)
class Host(HardwareModel):
    """Median time of a layer on a device of this machine, random weights and inputs.

    Args:
        device: Where to measure.
        repeats: Timed passes of each shape.
        seconds: Most time spent on one shape; at least three passes are timed.
    """

    device: str = "cpu"
    repeats: int = 15
    seconds: float = 0.2
    name: str = "host"
    measured: dict[tuple[LayerShape, ...], tuple[float, float]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def latency(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        total, variance = 0.0, 0.0
        for call in layer.shape.calls:
            shape = replace(layer.shape, calls=(call,))
            stages = (
                (shape,)
                if choice == DENSE
                else OPERATORS[choice.operator].stages(shape, choice.rank)
            )
            if stages not in self.measured:
                self.measured[stages] = self._measure(stages)
            seconds, sigma = self.measured[stages]
            total, variance = total + seconds, variance + sigma**2
        return total, variance**0.5

    @torch.no_grad()
    def _measure(self, stages: tuple[LayerShape, ...]) -> tuple[float, float]:
        network = nn.Sequential(*(s.build(self.device) for s in stages)).eval()
        x = _example(stages[0]).to(self.device)
        if x.dim() == 4:
            network = network.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
        times: list[float] = []
        network(x)
        begun = time.perf_counter()
        while len(times) < 3 or (
            len(times) < self.repeats and time.perf_counter() - begun < self.seconds
        ):
            started = time.perf_counter()
            network(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times), statistics.stdev(times)


def _example(shape: LayerShape) -> torch.Tensor:
    call = shape.calls[0]
    if not shape.kernel:
        return torch.randn(*call, shape.inputs)
    return torch.randn(call[0], shape.inputs, *call[1:])
