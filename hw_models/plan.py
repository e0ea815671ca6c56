"""Stages to profile: a representative part of a space, and common shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from rankNAS.decompositions import LayerShape
from rankNAS.hw_models.base import stages
from rankNAS.search_spaces.base import SearchSpace

__all__ = ["general_shapes", "network_key", "stage_key", "stages_of", "thinned"]


def stages_of(space: SearchSpace) -> Iterable[LayerShape]:
    """The stages of all choices of all layers, with repetitions."""
    return (s for layer in space.layers.values() for c in layer for s in stages(layer, c))


def stage_key(shape: LayerShape) -> LayerShape:
    """The shape reduced to what affects its latency: without bias and padding mode."""
    return replace(shape, bias=False, padding_mode="zeros")


def network_key(space: SearchSpace) -> str:
    """A digest of layers and inputs; it is equal for networks of equal latency."""
    shapes = [f"{name} {layer.shape}" for name, layer in space.layers.items()]
    text = "\n".join([*shapes, str(space.remainder_cost), str(space.input_shape)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def general_shapes(batch: int, itemsize: int = 4) -> list[LayerShape]:
    """Common square and low-rank convolutions and linear layers."""
    shapes = []
    for size in (7, 14, 28, 56):
        for inputs, outputs in ((32, 32), (64, 64), (128, 32), (32, 128), (256, 256), (512, 64)):
            for k in (1, 3):
                pads = (k // 2, k // 2)
                calls = ((batch, size, size),)
                shapes.append(
                    LayerShape(
                        inputs,
                        outputs,
                        (k, k),
                        (1, 1),
                        pads,
                        (1, 1),
                        calls=calls,
                        itemsize=itemsize,
                    )
                )
    for inputs, outputs in ((64, 64), (256, 64), (64, 256), (768, 768), (768, 96), (96, 768)):
        shapes += [LayerShape(inputs, outputs, calls=((n * batch,),)) for n in (1, 64)]
    return shapes


def thinned(shapes: Sequence[LayerShape], most: int) -> list[LayerShape]:
    """A representative subset of the shapes: farthest-point selection within groups.

    In a group of equal geometry, each step selects the shape farthest from those selected.
    """
    groups: dict[object, list[LayerShape]] = {}
    for shape in shapes:
        groups.setdefault((shape.kernel, shape.stride, shape.calls, shape.groups > 1), []).append(
            shape
        )
    shares = _shares([len(group) for group in groups.values()], most)
    return [
        shape
        for group, share in zip(groups.values(), shares, strict=True)
        for shape in _farthest(group, share)
    ]


def _shares(sizes: Sequence[int], most: int) -> list[int]:
    """Samples per group: proportional to the square root of its size, at least two (or all)."""
    roots = np.sqrt(sizes)
    scale = most / roots.sum()
    for _ in range(20):  # small groups are capped; the rest is redistributed
        shares = np.clip(np.floor(scale * roots), np.minimum(2, sizes), sizes)
        if shares.sum() >= min(most, sum(sizes)):
            break
        scale *= 1.1
    return [int(share) for share in shares]


def _farthest(shapes: Sequence[LayerShape], count: int) -> list[LayerShape]:
    points = np.log([[s.inputs / s.groups, s.outputs / s.groups, s.groups] for s in shapes])
    taken = [int(np.argmax(points.sum(1)))]
    distance = np.full(len(shapes), np.inf)
    while len(taken) < count:
        distance = np.minimum(distance, ((points - points[taken[-1]]) ** 2).sum(1))
        taken.append(int(np.argmax(distance)))
    return [shapes[i] for i in taken]
