"""Low-rank adapters beside linear layers: trained instead of the weights, and merged into them.

A layer W x becomes W x + a / r B (A x) with W frozen, A of r rows and B = 0 at the start. A and B
have at least 32 bits, whatever W has.

References:
    Hu et al., ICLR 2022, arXiv 2106.09685 (LoRA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from rankNAS.decompositions.shapes import GroupedLinear
from rankNAS.recovery.parts import Part
from rankNAS.recovery.products import LAYERS, chains
from rankNAS.tasks.base import HALF

__all__ = ["Adapted", "Adapters", "adapted"]


@final
class Adapted(nn.Module):
    """A linear layer or convolution with an adapter beside it.

    Args:
        base: The layer.
        rank: Rank of the adapter; at most that of the layer.
        scale: a / r.
        generator: Initialises A.
    """

    def __init__(self, base: Any, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        groups = int(getattr(base, "groups", 1))
        rows = _matrix(base)  # (o, n) of all groups
        rank = min(rank, rows.shape[0] // groups, rows.shape[1])
        self.down, self.up = _stages(base, rank, groups)
        dtype = torch.float32 if base.weight.dtype in HALF else base.weight.dtype
        to = {"device": base.weight.device, "dtype": dtype}
        self.down.to(**to)
        self.up.to(**to)
        bound = 1 / math.sqrt(rows.shape[1])
        with torch.no_grad():
            noise = torch.rand(self.down.weight.shape, generator=generator)
            self.down.weight.copy_((2 * noise - 1) * bound)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the adapter's."""
        y: Tensor = self.base(x)
        change: Tensor = self.scale * self.up(self.down(x.to(self.down.weight.dtype)))
        return y.add(change.to(y.dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the layer's weight; it is 0 after that."""
        groups = int(getattr(self.base, "groups", 1))
        up, down = (_matrix(stage).unflatten(0, (groups, -1)) for stage in (self.up, self.down))
        change = self.scale * (up @ down)
        W = self.base.weight
        W.copy_(W.to(change.dtype) + change.reshape(W.shape))
        self.up.weight.zero_()


@final
class Adapters(Part):
    """The adapters of a network, which are merged at the end.

    Args:
        layers: The layers with their adapters, by path.
    """

    def __init__(self, layers: dict[str, Adapted]) -> None:
        self.layers = layers

    def finish(self) -> None:
        for layer in self.layers.values():
            layer.merge()


@contextmanager
def adapted(
    network: nn.Module, rank: int, scale: float, seed: int, *, every: bool, vectors: bool
) -> Iterator[Adapters]:
    """Context in which the factors of a network have adapters, which alone are trained.

    Args:
        network: The network; changed in place, and a plain one after the context.
        rank: Rank of the adapters.
        scale: Of the adapters.
        seed: Of their initialisation.
        every: Whether layers that are no factors have adapters, too.
        vectors: Whether biases and norms are trained, too; those of 16 bits are not.
    """
    required = [(p, p.requires_grad) for p in network.parameters()]
    generator = torch.Generator().manual_seed(seed)
    for parameter, wanted in required:
        trained = vectors and parameter.dim() <= 1 and parameter.dtype not in HALF
        parameter.requires_grad_(wanted and trained)
    layers = {}
    for path in _targets(network, every):
        layers[path] = Adapted(network.get_submodule(path), rank, scale, generator)
        _put(network, path, layers[path])
    try:
        yield Adapters(layers)
    finally:
        for path, layer in layers.items():
            _put(network, path, layer.base)
        for parameter, wanted in required:
            parameter.requires_grad_(wanted)


def _targets(network: nn.Module, every: bool) -> list[str]:
    """Paths of the factors; of all layers, if asked for or if there are no factors."""
    factors = [f"{c.path}.{i}" for c in chains(network) for i in range(len(c.stages))]
    if factors and not every:
        return factors
    shared: dict[int, int] = {}
    for _, parameter in network.named_parameters(remove_duplicate=False):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    return [
        path
        for path, module in network.named_modules()
        if path and isinstance(module, LAYERS) and shared[id(module.weight)] == 1
    ]


def _put(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def _stages(base: Any, rank: int, groups: int) -> tuple[Any, Any]:
    """Layers from the inputs to r features of each group, and from them to the outputs."""
    inner = rank * groups
    if isinstance(base, nn.Linear):
        down: Any = nn.Linear(base.in_features, rank, bias=False)
        return down, nn.Linear(rank, base.out_features, bias=False)
    if isinstance(base, GroupedLinear):
        _, outputs, inputs = base.weight.shape
        down = GroupedLinear(groups * inputs, inner, groups, bias=False)
        return down, GroupedLinear(inner, groups * outputs, groups, bias=False)
    kind = type(base)
    down = kind(
        base.in_channels,
        inner,
        base.kernel_size,
        stride=base.stride,
        padding=base.padding,
        dilation=base.dilation,
        groups=groups,
        bias=False,
        padding_mode=base.padding_mode,
    )
    return down, kind(inner, base.out_channels, 1, groups=groups, bias=False)


def _matrix(stage: Any) -> Tensor:
    """The weight of a layer as (outputs, inputs of a group with the kernel)."""
    weight: Tensor = stage.weight
    weight = weight.flatten(0, 1) if isinstance(stage, GroupedLinear) else weight
    return weight.flatten(1)
