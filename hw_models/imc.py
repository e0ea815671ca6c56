"""In-memory computing (IMC): cycles of a layer mapped onto crossbars of rows x columns.

A crossbar multiplies one input vector (its rows) by the stored weights, for all its columns, in
one cycle. A layer larger than a crossbar takes several tiles, one cycle each. Three mappings:

- im2col: one output position per cycle;
- SDK (shift and duplicate kernel): shifted copies of the kernel fill idle columns, so that one
  cycle computes a square window of a x a positions;
- VW-SDK (variable window): rectangular windows of a x b positions, with the channels tiled to
  suit.

A factorised layer is a K x K stage with few outputs, which leaves most columns idle, and a 1 x 1
stage. Both are shifted together, since SDK(L R) = (I (x) L) SDK(R): the second stage is
block-diagonal.

Notation: A_r rows, A_c columns, O output positions per side, N = a b positions per window, P its
side in input positions, g groups of input channels, k outputs per group of the first stage.

References:
    The cycle models of SDK and VW-SDK: the released code of VW-SDK (Rhe, Moon and Ko, DATE 2022);
    the tests contain its thirty published counts.
    Low rank on such arrays: Jeon, Rhe and Ko, DATE 2025 (arXiv:2502.07820). Their theorem on
    SDK(L R) is used. Their cycle count was not available, so `low_rank_cycles` is a
    reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final, get_args

from rankNAS.allocation import DENSE, Choice
from rankNAS.decompositions import OPERATORS, LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.hw_models.base import HardwareModel, tiles
from rankNAS.search_spaces.base import Layer

__all__ = ["Crossbar", "ImcArray", "Mapping", "cycles", "low_rank_cycles"]

Mapping = Literal["im2col", "sdk", "vw_sdk"]
WINDOW = 8  # largest window side, in positions, tried for a factorised layer


@dataclass(frozen=True)
class Crossbar:
    """One crossbar.

    Args:
        rows: Number of inputs A_r.
        columns: Number of outputs A_c.
    """

    rows: int = 512
    columns: int = 512


@dataclass(frozen=True)
class _Convolution:
    """One group of a convolution; a linear layer counts as a 1 x 1 convolution."""

    outputs_at: tuple[int, int]  # output positions
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def rows(self) -> int:
        return math.prod(self.kernel) * self.inputs

    def window(self, a: int, b: int) -> int:
        """The number of input positions that a window of a x b output positions reads."""
        spans = zip((a, b), self.stride, self.dilation, self.kernel, strict=True)
        return math.prod((n - 1) * s + (k - 1) * d + 1 for n, s, d, k in spans)

    def steps(self, a: int, b: int) -> int:
        """The number of windows of a x b output positions."""
        return tiles(self.outputs_at[0], a) * tiles(self.outputs_at[1], b)

    def windows(self, most: int) -> Iterator[tuple[int, int]]:
        """All window sizes of at most `most` positions per side."""
        height, width = (min(n, most) for n in self.outputs_at)
        return ((a, b) for a in range(1, height + 1) for b in range(1, width + 1))


def cycles(
    outputs_at: tuple[int, int],
    kernel: tuple[int, int],
    inputs: int,
    outputs: int,
    *,
    array: Crossbar,
    mapping: Mapping = "vw_sdk",
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> int:
    """Cycles of a convolution with one group for one input.

    Args:
        outputs_at: Output positions (height, width).
        kernel: (kh, kw).
        inputs: Input channels.
        outputs: Output channels.
        array: The crossbar.
        mapping: ``vw_sdk`` never takes more cycles than ``im2col``.
        stride: (sh, sw).
        dilation: (dh, dw).

    >>> cycles((12, 12), (3, 3), 256, 256, array=Crossbar(512, 512), mapping="im2col")
    720
    >>> cycles((12, 12), (3, 3), 256, 256, array=Crossbar(512, 512))
    504
    """
    layer = _Convolution(outputs_at, inputs, outputs, kernel, stride, dilation)
    return {"im2col": _im2col, "sdk": _sdk, "vw_sdk": _vw_sdk}[mapping](layer, array)


def _im2col(layer: _Convolution, array: Crossbar) -> int:
    held = tiles(layer.rows, array.rows) * tiles(layer.outputs, array.columns)
    return math.prod(layer.outputs_at) * held


def _sdk(layer: _Convolution, array: Crossbar) -> int:
    row_tiles, column_tiles = tiles(layer.rows, array.rows), tiles(layer.outputs, array.columns)
    side = 1
    while (
        side < max(layer.outputs_at)
        and layer.window(side + 1, side + 1) * layer.inputs <= array.rows * row_tiles
        and (side + 1) ** 2 * layer.outputs <= array.columns * column_tiles
    ):
        side += 1
    return layer.steps(side, side) * row_tiles * column_tiles


def _vw_sdk(layer: _Convolution, array: Crossbar) -> int:
    best = _im2col(layer, array)
    height, width = layer.outputs_at
    for a in range(1, min(height, array.columns) + 1):
        for b in range(1, min(width, array.columns // a) + 1):
            channels = min(layer.inputs, array.rows // layer.window(a, b))
            if not channels:  # wider windows do not fit either
                break
            held = tiles(layer.inputs, channels) * tiles(layer.outputs, array.columns // (a * b))
            best = min(best, layer.steps(a, b) * held)
    return best


def low_rank_cycles(
    outputs_at: tuple[int, int],
    kernel: tuple[int, int],
    inputs: int,
    outputs: int,
    rank: int,
    *,
    array: Crossbar,
    groups: int = 1,
    mapping: Mapping = "vw_sdk",
    block_skip: bool = False,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> int:
    """Cycles of a K x K convolution with few outputs and a 1 x 1 convolution; a reconstruction.

    Args:
        outputs_at: Output positions (height, width).
        kernel: Kernel of the first stage.
        inputs: Input channels.
        outputs: Output channels of the second stage.
        rank: Outputs per group of the first stage.
        array: The crossbar.
        groups: Groups of input channels.
        mapping: ``im2col`` uses windows of one position, ``sdk`` square windows.
        block_skip: Skip tiles of the second stage that contain no block; otherwise the
            block-diagonal matrix is stored densely.
        stride: Stride of the first stage.
        dilation: Dilation of the first stage.

    >>> small = {"array": Crossbar(64, 64), "mapping": "im2col"}
    >>> cycles((8, 8), (3, 3), 64, 64, **small)
    576
    >>> low_rank_cycles((8, 8), (3, 3), 64, 64, 8, **small)  # naive: slower than dense
    640
    >>> low_rank_cycles((8, 8), (3, 3), 64, 64, 8, array=Crossbar(64, 64))
    256
    """
    layer = _Convolution(outputs_at, inputs, outputs, kernel, stride, dilation)
    windows = layer.windows(WINDOW if mapping != "im2col" else 1)
    best = math.inf
    for a, b in windows:
        if mapping == "sdk" and a != b:
            continue
        n = a * b
        rows = layer.window(a, b) * inputs
        first = groups * tiles(rows, groups * array.rows) * tiles(n * rank, array.columns)
        second = tiles(n * groups * rank, array.rows) * tiles(n * outputs, array.columns)
        if block_skip:
            second = _touched(n, groups * rank, outputs, array)
        best = min(best, layer.steps(a, b) * (first + second))
    return int(best)


def _touched(blocks: int, rows: int, columns: int, array: Crossbar) -> int:
    """The number of tiles of a block-diagonal matrix that contain part of a block."""
    found = set()
    for i in range(blocks):
        across = range(i * rows // array.rows, tiles((i + 1) * rows, array.rows))
        down = range(i * columns // array.columns, tiles((i + 1) * columns, array.columns))
        found |= {(r, c) for r in across for c in down}
    return len(found)


@final
@dataclass(frozen=True)
class ImcArray(HardwareModel):
    """Latency, and energy if the cost of a cycle is given, on in-memory-computing arrays.

    Tiles are computed sequentially. Layers whose second stage is not 1 x 1 (`spatial_svd`)
    and all stages of `tucker2` are mapped separately.

    Args:
        rows: Number of rows A_r.
        columns: Number of columns A_c.
        mapping: Mapping of kernels onto the crossbar.
        cycle: Seconds per array access; a property of the device.
        cycle_energy: Joules per array access; None if unknown.
        block_skip: As for `low_rank_cycles`.

    Raises:
        UsageError: A size, time or energy is not positive, or the mapping is unknown.
    """

    rows: int = 512
    columns: int = 512
    mapping: Mapping = "vw_sdk"
    cycle: float = 1e-7
    cycle_energy: float | None = None
    block_skip: bool = False
    name: str = "imc"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise UsageError(f"an array needs rows and columns, got {self.rows}x{self.columns}.")
        if not self.cycle > 0 or (self.cycle_energy is not None and not self.cycle_energy > 0):
            raise UsageError(
                f"`cycle` and `cycle_energy` must be positive, got {self.cycle} and "
                f"{self.cycle_energy}."
            )
        if self.mapping not in get_args(Mapping):
            raise UsageError(
                f"`mapping` must be one of {', '.join(get_args(Mapping))}, got {self.mapping!r}."
            )

    def latency(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        return self.cycles(layer, choice) * self.cycle, 0.0

    def energy(self, layer: Layer, choice: Choice) -> float | None:
        return (
            None if self.cycle_energy is None else self.cycles(layer, choice) * self.cycle_energy
        )

    def cycles(self, layer: Layer, choice: Choice) -> int:
        """Array accesses of all calls of a layer in one forward pass."""
        shapes: tuple[LayerShape, ...] = (layer.shape,)
        if choice != DENSE:
            shapes = OPERATORS[choice.operator].stages(layer.shape, choice.rank)
        if len(shapes) == 2 and set(shapes[1].kernel) <= {1} and shapes[1].groups == 1:
            return self._two_stages(shapes[0], shapes[1])
        return sum(self._alone(shape) for shape in shapes)

    def _alone(self, shape: LayerShape) -> int:
        g = shape.groups
        total = 0
        for batch, at in _outputs_at(shape):
            one = cycles(
                at,
                _pair(shape.kernel),
                shape.inputs // g,
                shape.outputs // g,
                array=Crossbar(self.rows, self.columns),
                mapping=self.mapping,
                stride=_pair(shape.stride),
                dilation=_pair(shape.dilation),
            )
            total += batch * g * one
        return total

    def _two_stages(self, first: LayerShape, second: LayerShape) -> int:
        g = first.groups
        return sum(
            batch
            * low_rank_cycles(
                at,
                _pair(first.kernel),
                first.inputs,
                second.outputs,
                first.outputs // g,
                array=Crossbar(self.rows, self.columns),
                groups=g,
                mapping=self.mapping,
                block_skip=self.block_skip,
                stride=_pair(first.stride),
                dilation=_pair(first.dilation),
            )
            for batch, at in _outputs_at(first)
        )


def _outputs_at(shape: LayerShape) -> list[tuple[int, tuple[int, int]]]:
    """(Number of inputs, output positions of one input) for each call."""
    if not shape.kernel:
        return [(math.prod(call), (1, 1)) for call in shape.calls]
    return [(call[0], _pair(call[1:])) for call in shape.output_calls()]


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """A pair of sizes from one, two or no dimensions."""
    height, width = (1,) * (2 - len(sizes)) + tuple(sizes)
    return height, width
