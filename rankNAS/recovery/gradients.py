"""Other gradients than those of a batch: centralised ones, those of SAM, and after a virtual step.

References:
    Yong, Huang, Hua and Zhang, ECCV 2020: gradient centralisation.
    Foret, Kleiner, Mobahi and Neyshabur, ICLR 2021: sharpness-aware minimisation (SAM).
    arXiv 2309.03965, 2023: the virtual step, in a competition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from rankNAS.compression.batch_norm import tracking_layers
from rankNAS.decompositions.shapes import GroupedLinear, is_hf_conv1d
from rankNAS.recovery.parts import Gradients, Part
from rankNAS.recovery.products import LAYERS, chains
from rankNAS.trees import rows, size_of

__all__ = ["Centralisation", "Sharpness", "VirtualStep"]

LEAST = 4  # samples of a batch whose halves are taken apart: a batch norm needs two
TINY = 1e-12  # added to a norm that divides


@final
class Centralisation(Part):
    """Subtracts from each output's gradient its mean over the inputs and the kernel.

    Of the factors of a layer only the first is centralised. The inputs of the others are
    coordinates in a basis of any choice, in which a mean has no meaning.

    Args:
        network: The network; its linear layers and convolutions take part.
    """

    def __init__(self, network: nn.Module) -> None:
        later = {id(stage) for chain in chains(network) for stage in chain.stages[1:]}
        layers = [m for m in network.modules() if isinstance(m, LAYERS) or is_hf_conv1d(m)]
        found = [(m.weight, _fan_in(m)) for m in layers if id(m) not in later]
        self.weights = [
            (weight, axes)
            for weight, axes in found
            if isinstance(weight, nn.Parameter) and math.prod(weight.shape[i] for i in axes) > 1
        ]

    @torch.no_grad()
    def before_step(self, rate: float) -> None:
        for weight, axes in self.weights:
            if weight.grad is not None:
                weight.grad.sub_(weight.grad.mean(axes, keepdim=True))


@final
class Sharpness(Part):
    """SAM: the gradients at the weights that are a distance further along the gradient.

    The norm of the gradient is that of all weights together. The second pass leaves the running
    statistics of batch norms alone.

    Args:
        network: The network.
        radius: The distance.
        every: Of so many epochs, SAM acts in the last one. Its steps take twice the time.
    """

    def __init__(self, network: nn.Module, radius: float, every: int) -> None:
        self.radius, self.every = radius, every
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.norms = tracking_layers(network)
        self.active = False

    def begin_epoch(self, number: int) -> None:
        self.active = (number + 1) % self.every == 0

    def passes(self, epoch: int) -> float:
        return 2.0 if (epoch + 1) % self.every == 0 else 1.0

    def gradients(self, compute: Gradients, rate: float) -> Gradients:
        if not self.active:
            return compute

        def ascended(batch: Any, place: tuple[int, int] | None) -> float:
            value = compute(batch, place)
            scale = self.radius / (_norm(self.parameters) + TINY)
            with _moved(self.parameters, scale), self._kept_statistics():
                compute(batch, place)
            return value

        return ascended

    @contextmanager
    def _kept_statistics(self) -> Iterator[None]:
        momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(self.norms, momenta, strict=True):
                norm.momentum = momentum


@final
class VirtualStep(Part):
    """The gradients of one half of a batch, after a step of gradient descent on the other half.

    The step is taken back. A batch of fewer than 4 samples stays whole.

    Args:
        network: The network.
        clip: Largest gradient norm of the virtual step; None for no limit.
    """

    def __init__(self, network: nn.Module, clip: float | None) -> None:
        self.clip = clip
        self.parameters = [p for p in network.parameters() if p.requires_grad]

    def gradients(self, compute: Gradients, rate: float) -> Gradients:
        def ahead(batch: Any, place: tuple[int, int] | None) -> float:
            size = size_of(batch)
            if size < LEAST:
                return compute(batch, place)
            parts = slice(0, size // 2), slice(size // 2, size)
            first, second = (rows(batch, part, size) for part in parts)
            value = compute(first, None)
            scale = -rate
            if self.clip is not None:
                scale *= min(1.0, self.clip / (_norm(self.parameters) + TINY))
            with _moved(self.parameters, scale):
                return (value + compute(second, None)) / 2

        return ahead


def _fan_in(layer: nn.Module) -> tuple[int, ...]:
    """The axes of a layer's weight over which an output sums."""
    if isinstance(layer, GroupedLinear):
        return (2,)
    if is_hf_conv1d(layer):
        return (0,)
    assert isinstance(layer.weight, Tensor)
    return tuple(range(1, layer.weight.dim()))


def _norm(parameters: Sequence[nn.Parameter]) -> float:
    """The norm of the gradients of all parameters together."""
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], scale: float) -> Iterator[None]:
    """Context in which parameters are moved by a multiple of their gradients."""
    moved = [p for p in parameters if p.grad is not None]
    kept = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for parameter in moved:
            assert parameter.grad is not None
            parameter.add_(parameter.grad, alpha=scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, kept, strict=True):
                parameter.copy_(value)
