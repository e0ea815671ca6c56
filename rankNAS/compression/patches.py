"""Input patches of a layer: the rows that its folded weight multiplies (im2col).

The outputs at the same positions are the products. Equal generators draw equal positions, from
the inputs and from the outputs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from rankNAS.decompositions.shapes import LayerShape

__all__ = ["MAX_POSITIONS", "folded", "outputs_at", "patches", "same_patches"]

MAX_POSITIONS = 256  # patches per input that enter C; neighbouring patches are correlated


def patches(
    shape: LayerShape,
    x: Tensor,
    generator: torch.Generator | None = None,
    most: int = MAX_POSITIONS,
) -> Tensor:  # -> (g, N, n)
    """The input patches that the folded weight multiplies, with reordered elements.

    Args:
        shape: The layer's shape.
        x: Its input: (*, features), (batch, channels, length) or (batch, channels, height, width).
        generator: Samples positions of each input; None takes all positions.
        most: Largest number of sampled positions.

    Returns:
        One patch per row. Elements are ordered by kernel element, then by channel; this order is
        many times faster to read. `folded` maps it to the order of the folded weight.
    """
    g, channels = shape.groups, shape.inputs // shape.groups
    if not shape.kernel:
        return x.reshape(-1, g, channels).transpose(0, 1)
    x = x.reshape(-1, *x.shape[-len(shape.kernel) - 1 :])
    x = _pad(shape, x)
    reading = _positions(shape, x.shape[2:], generator, most).to(x.device)  # (kernel, positions)
    rows = x.movedim(1, -1).flatten(1, -2)  # (batch, pixels, g c)
    rows = rows.index_select(1, reading.T.flatten()).reshape(
        -1, len(reading), g, shape.inputs // g
    )
    return rows.permute(2, 0, 1, 3).flatten(2)


def outputs_at(
    shape: LayerShape,
    y: Tensor,
    generator: torch.Generator | None = None,
    most: int = MAX_POSITIONS,
) -> Tensor:  # -> (g, N, o)
    """The layer's outputs for the patches that `patches` returns with an equal generator.

    Args:
        shape: The layer's shape.
        y: Its output: (*, features), (batch, channels, length) or (batch, channels, height,
            width).
        generator: Samples positions of each input; None takes all positions.
        most: Largest number of sampled positions.
    """
    if shape.kernel:
        y = y.reshape(-1, *y.shape[-len(shape.kernel) - 1 :]).flatten(2)
        drawn = _drawn(y.shape[2], generator, most)
        y = (y if drawn is None else y[:, :, drawn.to(y.device)]).movedim(1, -1)
    return y.reshape(-1, shape.groups, shape.outputs // shape.groups).transpose(0, 1).contiguous()


def folded(shape: LayerShape) -> Tensor:  # -> (n,)
    """Position in a row of `patches` of each column of the folded weight."""
    kernel = math.prod(shape.kernel)
    return torch.arange(shape.width).reshape(kernel, -1).T.flatten()


def same_patches(first: LayerShape, other: LayerShape) -> bool:
    """Whether two layers, both called once, take the same patches of equal inputs."""

    def geometry(shape: LayerShape) -> LayerShape:
        return replace(shape, outputs=0, bias=False, itemsize=0)

    return len(first.calls) == 1 and geometry(first) == geometry(other)


def _positions(
    shape: LayerShape, size: tuple[int, ...], generator: torch.Generator | None, most: int
) -> Tensor:  # -> (kernel, positions)
    """Indices into the flattened padded input, by kernel element and sampled position."""
    starts, offsets = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for length, k, d, s in zip(size, shape.kernel, shape.dilation, shape.stride, strict=True):
        along = torch.arange(0, length - d * (k - 1), s)
        starts = (starts[:, None] * length + along).flatten()
        offsets = (offsets[:, None] * length + d * torch.arange(k)).flatten()
    drawn = _drawn(len(starts), generator, most)
    return offsets[:, None] + (starts if drawn is None else starts[drawn])


def _drawn(count: int, generator: torch.Generator | None, most: int) -> Tensor | None:
    """Random positions out of a number of them; None takes all in order."""
    if generator is None or count <= most:
        return None
    return torch.randperm(count, generator=generator)[:most]


def _pad(shape: LayerShape, x: Tensor) -> Tensor:
    sides = [side for pair in reversed(shape.explicit_padding) for side in pair]
    if not any(sides):
        return x
    mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
    return functional.pad(x, sides, mode=mode)
