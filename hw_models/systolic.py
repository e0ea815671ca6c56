"""Systolic array with on-chip buffers, in closed form: accelerators like Eyeriss and the TPU.

A layer is a matrix product of M output positions, N outputs and K summands. The array has R rows
and C columns of processing elements. The dataflow names the operand that stays in the array. A
pass that streams T values takes 2 R + C + T - 2 cycles to fill, compute and drain. The number of
passes is the number of tiles of the two dimensions that are laid out on the array.

References:
    Samajdar et al., ISPASS 2020 (SCALE-Sim), section III: the cycles. The count of main-memory
    traffic is simpler here: an operand that does not fit its buffer is read once per pass over
    the other operand.
    Horowitz, ISSCC 2014, figure 1.1.9: energies of operations at 45 nm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, final, get_args

from rankNAS.decompositions import LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.hw_models.base import StageModel, tiles

__all__ = ["Dataflow", "Systolic"]

Dataflow = Literal["output", "weight", "input"]
# Joules at 45 nm by bytes per number, multiplication plus addition (integer for one byte,
# floating point for more), from Horowitz's figure.
_MULTIPLY_ADD = {1: 0.23e-12, 2: 1.5e-12, 4: 4.6e-12}
_DRAM_BYTE = 1.3e-9 / 8  # lower end of 1.3 to 2.6 nJ for 64 bits
_SRAM_BYTE = 20e-12 / 8  # 32 KiB, 64 bits


@final
@dataclass(frozen=True)
class Systolic(StageModel):
    """An analytical model of an array of processing elements; nothing of it is measured.

    Args:
        rows: Number of rows R.
        columns: Number of columns C.
        dataflow: The stationary operand: ``output``, ``weight`` or ``input``.
        frequency: Cycles per second.
        input_buffer: Bytes of the on-chip buffer for inputs.
        weight_buffer: Bytes of the buffer for weights.
        output_buffer: Bytes of the buffer for outputs.
        bandwidth: Bandwidth of main memory, bytes per second; transfers overlap with computation.

    Raises:
        UsageError: A number is not positive, or the dataflow is unknown.
    """

    rows: int = 32
    columns: int = 32
    dataflow: Dataflow = "output"
    frequency: float = 200e6
    input_buffer: int = 64 * 1024
    weight_buffer: int = 64 * 1024
    output_buffer: int = 64 * 1024
    bandwidth: float = 12.8e9
    name: str = "systolic"

    def __post_init__(self) -> None:
        if self.dataflow not in get_args(Dataflow):
            raise UsageError(
                f"`dataflow` must be one of {', '.join(get_args(Dataflow))}, got "
                f"{self.dataflow!r}."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"`{field.name}` must be a positive number, got {value}.")

    def cycles(self, shape: LayerShape) -> int:
        """Compute cycles of the array, without memory stalls."""
        M, N, K = _sizes(shape)
        along_rows, along_columns, streamed = {
            "output": (M, N, K),
            "weight": (K, N, M),
            "input": (K, M, N),
        }[self.dataflow]
        passes = tiles(along_rows, self.rows) * tiles(along_columns, self.columns)
        return shape.groups * passes * (2 * self.rows + self.columns + streamed - 2)

    def traffic(self, shape: LayerShape) -> int:
        """Bytes read from and written to main memory."""
        M, N, K = _sizes(shape)
        size = shape.itemsize
        inputs = shape.inputs // shape.groups * sum(math.prod(call) for call in shape.calls) * size
        weights, outputs = N * K * size, M * N * size
        again = {  # passes over an operand, one per tile of the other operand
            "output": (tiles(N, self.columns), tiles(M, self.rows), 1),
            "weight": (tiles(N, self.columns), 1, tiles(K, self.rows)),
            "input": (1, tiles(M, self.columns), tiles(K, self.rows)),
        }[self.dataflow]
        buffers = self.input_buffer, self.weight_buffer, self.output_buffer
        triples = zip((inputs, weights, outputs), again, buffers, strict=True)
        return shape.groups * sum(b * (1 if b <= room else n) for b, n, room in triples)

    def stage(self, shape: LayerShape) -> tuple[float, float]:
        work = self.cycles(shape) / self.frequency
        return max(work, self.traffic(shape) / self.bandwidth), 0.0

    def stage_energy(self, shape: LayerShape) -> float | None:
        """Energy of multiply-adds, two buffer reads for each, and main-memory traffic."""
        if shape.itemsize not in _MULTIPLY_ADD:
            return None
        one = _MULTIPLY_ADD[shape.itemsize] + 2 * shape.itemsize * _SRAM_BYTE
        return shape.cost().macs * one + self.traffic(shape) * _DRAM_BYTE


def _sizes(shape: LayerShape) -> tuple[int, int, int]:
    """M, N and K of one channel group."""
    positions = sum(math.prod(call) for call in shape.output_calls())
    return positions, shape.outputs // shape.groups, shape.width
