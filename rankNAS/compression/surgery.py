"""Copies of a model that share its weights, and the replacement of its modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankNAS.allocation import Choice
from rankNAS.compression.factors import LayerFactors
from rankNAS.decompositions.shapes import is_hf_conv1d

__all__ = [
    "LazyFactorised",
    "changeable_copy",
    "exceeds_memory_limit",
    "replace_module",
    "shared_copy",
]

LIGHT = 1 << 24  # bytes of weights; a process that has loaded PyTorch takes many times as much


def shared_copy(model: nn.Module, own: Iterable[Tensor] = ()) -> nn.Module:
    """A copy that shares its parameters with the model, except some; it must not be changed.

    Buffers, such as the statistics of batch norms, are its own.

    Args:
        model: The model.
        own: Parameters of the model that the copy gets its own of.
    """
    except_for = set(map(id, own))
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), p.requires_grad)
        for p in model.parameters()
        if id(p) not in except_for
    }
    return copy.deepcopy(model, memo)


def changeable_copy(model: nn.Module, layers: Mapping[str, LayerFactors]) -> nn.Module:
    """A copy whose layers `LayerFactors.write` can change.

    If the model exceeds the memory limit, the copy shares all weights and factors. A layer's
    weight is then computed from its factors whenever it is read, and freed.
    """
    if not exceeds_memory_limit(model):
        return copy.deepcopy(model)
    paths = {path for found in layers.values() for path in found.layer.paths}
    biases = [getattr(model.get_submodule(path), "bias", None) for path in paths]
    network = shared_copy(model, own=[bias for bias in biases if bias is not None])
    for module in {network.get_submodule(path) for path in paths}:
        parametrize.register_parametrization(module, "weight", _MultipliedOut(module), unsafe=True)
    return network


class _MultipliedOut(nn.Module):
    """Computes a layer's weight from the factors of the choice; without one, it is dense."""

    chosen: tuple[LayerFactors, Choice] | None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.chosen, self._inputs_first = None, is_hf_conv1d(module)

    def forward(self, dense: Tensor) -> Tensor:
        if self.chosen is None:
            return dense
        factors, choice = self.chosen
        weight, _ = factors.folded(choice)
        return torch.empty_like(dense).copy_(weight.T if self._inputs_first else weight)


def exceeds_memory_limit(model: nn.Module) -> bool:
    """Whether the weights take so much memory that they should not be copied without need."""
    return sum(p.nbytes for p in model.parameters()) > LIGHT


class LazyFactorised(nn.Module):
    """A decomposed layer whose modules exist only during its forward pass."""

    def __init__(self, layer: LayerFactors, choice: Choice) -> None:
        super().__init__()
        self._factors, self._rank = layer.factors[choice.operator], choice.rank
        self._bias, self._dtype = layer.bias_of(choice), layer.weight.dtype

    def forward(self, x: Tensor) -> Any:
        module = self._factors.truncate(self._rank, self._bias, self._dtype, trainable=False)
        return module(x)


def replace_module(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Put one module at every path, in place."""
    for path in paths:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
