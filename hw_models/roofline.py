"""Roofline model: a kernel takes the longer of its arithmetic time and its memory time.

Reference: Williams, Waterman and Patterson, Communications of the ACM 2009. Extensions: an
overhead per kernel, and sizes rounded up to the tiles of the compute units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from rankNAS.decompositions import LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.hw_models.base import StageModel, dtype_of, round_up
from rankNAS.hw_models.devices import Device
from rankNAS.hw_models.regression import traffic
from rankNAS.search_spaces.base import SearchSpace

__all__ = ["Roofline"]


@final
@dataclass(frozen=True)
class Roofline(StageModel):
    """Roofline latency of a device from its figures: a lower bound, not a measurement.

    Args:
        device: The device, from `Device.of`.
        uncertainty: Assumed relative standard deviation of a kernel's time.
        name: The name given by the user.
    """

    device: Device
    uncertainty: float = 0.3
    name: str = "roofline"

    def stage(self, shape: LayerShape) -> tuple[float, float]:
        dtype = self._dtype(shape)
        rows, columns = self.device.tile[dtype]
        g, positions = shape.groups, sum(math.prod(call) for call in shape.output_calls())
        padded = g * round_up(shape.outputs // g, rows) * round_up(shape.width, columns)
        arithmetic = 2 * positions * padded / self.device.peak[dtype]
        seconds = self.device.launch + max(arithmetic, traffic(shape) / self.device.bandwidth)
        return seconds, self.uncertainty * seconds

    def stage_energy(self, shape: LayerShape) -> float | None:
        energy, dtype = self.device.energy, self._dtype(shape)
        if dtype not in energy or "byte" not in energy:
            return None
        return shape.cost().macs * energy[dtype] + traffic(shape) * energy["byte"]

    def remainder_cost(self, space: SearchSpace) -> tuple[float, float]:
        """Arithmetic and overhead of skipped layers; all other operations count as fused."""
        shapes = [layer.shape for layer in space.layers.values()]
        peak = self.device.peak[self._dtype(shapes[0])] if shapes else math.inf
        launched = [s for s in space.skipped if s.cost.macs and s.cost.params]
        seconds = 2 * space.remainder_cost.macs / peak + self.device.launch * len(launched)
        return seconds, self.uncertainty * seconds

    def _dtype(self, shape: LayerShape) -> str:
        dtype = dtype_of(shape)
        if dtype not in self.device.peak:
            raise UsageError(
                f"{self.device.name} has no figures for {dtype} weights, only for "
                f"{', '.join(self.device.peak)}; convert the model, or add them to a device file."
            )
        return dtype
