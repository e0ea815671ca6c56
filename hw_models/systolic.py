"""A systolic array with on-chip buffers, in closed form: accelerators of the Eyeriss and TPU kind.

A layer is a matrix product of M output positions, N outputs and K summands. The array has R rows
and C columns of processing elements; what stays in them is the dataflow. A pass of the array that
streams T values takes 2 R + C + T - 2 cycles to fill, work and drain, and there are as many passes
as tiles of the two dimensions that are laid out.

References:
    Samajdar et al., ISPASS 2020 (SCALE-Sim), section III: the cycles. Traffic to main memory is
    counted more simply here: an operand that does not fit its buffer is read once for each pass
    over the other one.
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
# Joules at 45 nm by bytes of a number: multiplication and addition (integers for one byte,
# floating point for more), as in Horowitz's figure.
_MULTIPLY_ADD = {1: 0.23e-12, 2: 1.5e-12, 4: 4.6e-12}
_DRAM_BYTE = 1.3e-9 / 8  # the lower end of 1.3 to 2.6 nJ for 64 bits
_SRAM_BYTE = 20e-12 / 8  # 32 KiB, 64 bits


@final
@dataclass(frozen=True)
class Systolic(StageModel):
    """An analytical model of an array of processing elements; nothing of it is measured.

    Args:
        rows: R.
        columns: C.
        dataflow: What stays in the array: ``output``, ``weight`` or ``input``.
        frequency: Cycles a second.
        input_buffer: Bytes on the chip for inputs.
        weight_buffer: Bytes for weights.
        output_buffer: Bytes for outputs.
        bandwidth: Of main memory, bytes a second; transfers overlap with work.

    Raises:
        UsageError: A number that is not positive, or an unknown dataflow.
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
        """Cycles of the array, without waiting for memory."""
        M, N, K = _sizes(shape)
        along_rows, along_columns, streamed = {
            "output": (M, N, K),
            "weight": (K, N, M),
            "input": (K, M, N),
        }[self.dataflow]
        passes = tiles(along_rows, self.rows) * tiles(along_columns, self.columns)
        return shape.groups * passes * (2 * self.rows + self.columns + streamed - 2)

    def traffic(self, shape: LayerShape) -> int:
        """Bytes to and from main memory."""
        M, N, K = _sizes(shape)
        size = shape.itemsize
        inputs = shape.inputs // shape.groups * sum(math.prod(call) for call in shape.calls) * size
        weights, outputs = N * K * size, M * N * size
        again = {  # passes over an operand that is laid out along the other one's tiles
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
        """Multiply-adds, two buffer reads for each, and main memory."""
        if shape.itemsize not in _MULTIPLY_ADD:
            return None
        one = _MULTIPLY_ADD[shape.itemsize] + 2 * shape.itemsize * _SRAM_BYTE
        return shape.cost().macs * one + self.traffic(shape) * _DRAM_BYTE


def _sizes(shape: LayerShape) -> tuple[int, int, int]:
    """M, N and K of one group."""
    positions = sum(math.prod(call) for call in shape.output_calls())
    return positions, shape.outputs // shape.groups, shape.width
