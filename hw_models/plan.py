"""Selection of the stages to profile: a representative part of a space, and common shapes."""

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
    """The stages of all choices of all layers; equal ones are repeated."""
    return (s for layer in space.layers.values() for c in layer for s in stages(layer, c))


def stage_key(shape: LayerShape) -> LayerShape:
    """The shape as its time depends on it: bias and padding mode cost nothing."""
    return replace(shape, bias=False, padding_mode="zeros")


def network_key(space: SearchSpace) -> str:
    """A digest of the layers and inputs: equal for networks that take equally long."""
    shapes = [f"{name} {layer.shape}" for name, layer in space.layers.items()]
    text = "\n".join([*shapes, str(space.remainder_cost), str(space.input_shape)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def general_shapes(batch: int, itemsize: int = 4) -> list[LayerShape]:
    """Common square and thin convolutions and linear layers."""
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
    """A representative part of the shapes: farthest-point selection within groups.

    Within a group of equal geometry, the one farthest from those already taken comes next.
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
    """How many of each group: as for its square root, at least two (or all) of each."""
    roots = np.sqrt(sizes)
    scale = most / roots.sum()
    for _ in range(20):  # what small groups cannot take goes to the others
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
