"""Whole networks with random weights: sampling allocations, building, running, layer timing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.factorisation import skeleton
from rankNAS.copies import copied
from rankNAS.hw_models.timing import Array, wait_for
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.trees import Inputs, channels_last, device_of, has_images, tensors, with_size

__all__ = [
    "Network",
    "Watch",
    "batched",
    "built",
    "in_network_factors",
    "place",
    "random_allocations",
]

OWN = 4  # prior weight of the operator's mean, in observations of a layer


class Network:
    """A network with fixed inputs; a call runs a forward pass.

    Args:
        model: The model in evaluation mode, on the device of the inputs.
        inputs: The arguments of every pass.
    """

    def __init__(self, model: nn.Module, inputs: Inputs | Tensor) -> None:
        self.model, self.inputs = model, Inputs.of(inputs)
        self.device = device_of(model)

    def __call__(self) -> Any:
        return self.inputs.run(self.model)

    def watching(self, layers: Iterable[Layer]) -> Watch:
        """A callable that runs the network and records the time of each layer."""
        return Watch(self, [layer.paths for layer in layers])


class Watch:
    """Runs a network and records in-network layer times.

    The hooks are removed after each run.

    Args:
        network: The network to run.
        layers: The module paths of each layer. Times of several calls or paths are summed.
    """

    def __init__(self, network: Network, layers: Sequence[Sequence[str]]) -> None:
        self._network = network
        found = [{id(m): m for m in map(network.model.get_submodule, paths)} for paths in layers]
        self._modules = [(i, m) for i, modules in enumerate(found) for m in modules.values()]
        self._spent = np.zeros(len(layers))
        self._rows: list[Array] = []

    def __call__(self) -> None:
        self._spent = np.zeros(len(self._spent))
        handles = []
        for i, module in self._modules:
            handles.append(module.register_forward_pre_hook(partial(self._add, i, -1)))
            handles.append(module.register_forward_hook(partial(self._add, i, 1)))
        try:
            self._network()
        finally:
            for handle in handles:
                handle.remove()
        self._rows.append(self._spent)

    def _add(self, i: int, sign: int, *_: object) -> None:
        wait_for(self._network.device)
        self._spent[i] += sign * time.perf_counter()

    def seconds(self) -> Array:
        """Medians over the runs, (layers,); 0 for a layer that was not called as a module."""
        medians: Array = np.median(self._rows, axis=0)
        return medians


def built(network: nn.Module, allocation: Allocation, inputs: Inputs | Tensor) -> Network:
    """The network under an allocation, with random weights."""
    model = skeleton(copied(network), allocation).eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                # Small normal values: denormal and infinite values would slow the arithmetic down.
                drawn = 0.05 * torch.randn(parameter.shape).to(parameter.dtype)
                setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    x = Inputs.of(inputs)
    first = tensors(x)
    model = model.to(first[0].device) if first else model
    if has_images(x):
        model = model.to(memory_format=torch.channels_last)
    return Network(model, channels_last(x))


def batched(inputs: Inputs | Tensor, size: int) -> Inputs:
    """The inputs, repeated to a batch of the given size."""
    found: Inputs = with_size(Inputs.of(inputs), size)
    return found


def random_allocations(space: SearchSpace, count: int, seed: int) -> list[Allocation]:
    """Random allocations of increasing dense share: each leaves some layers dense."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        dense, low = i / max(1, count), rng.uniform(0, 0.8)
        choices = {}
        for name, layer in space.layers.items():
            rest = len(layer.choices) - 1
            at = 1 + int(rest * rng.uniform(low, 1.0)) if rest else 0
            stays = rng.random() < dense or rest == 0
            choices[name] = DENSE if stays else layer.choices[min(at, rest)]
        found.append(Allocation.of(choices))
    return found


def place(layer: str, choice: Choice) -> str:
    """The key of an in-network factor: layer and operator."""
    return f"{layer} {choice.operator}"


def in_network_factors(
    space: SearchSpace,
    allocations: Sequence[Allocation],
    seconds: Sequence[Array],
    alone: Callable[[Layer, Choice], float],
) -> dict[str, float]:
    """In-network latency factors: the ratio of a layer's time in the network to its isolated time.

    In-network cache state differs from isolated timing. Factors with few observations are shrunk
    towards the mean of their operator.

    Args:
        space: The space of the network.
        allocations: The allocations under which layer times were recorded.
        seconds: In-network layer times per allocation, (layers,) each, in the space's order.
        alone: The isolated latency in seconds of a layer under a choice.
    """
    seen: dict[tuple[str, str], list[float]] = {}
    of_operator: dict[str, list[float]] = {}
    for allocation, times in zip(allocations, seconds, strict=True):
        for (name, layer), spent in zip(space.layers.items(), times.tolist(), strict=True):
            if spent > 0:
                choice = allocation[name]
                ratio = math.log(spent / alone(layer, choice))
                seen.setdefault((name, choice.operator), []).append(ratio)
                of_operator.setdefault(choice.operator, []).append(ratio)
    if not seen:
        return {}
    means = {operator: float(np.mean(found)) for operator, found in of_operator.items()}
    overall = float(np.mean([v for found in of_operator.values() for v in found]))
    factors: dict[str, float] = {}
    for name, layer in space.layers.items():
        for choice in layer.choices:
            mean = means.get(choice.operator, overall)
            own = [v - mean for v in seen.get((name, choice.operator), [])]
            factors[place(name, choice)] = math.exp(mean + sum(own) / (len(own) + OWN))
    return factors
