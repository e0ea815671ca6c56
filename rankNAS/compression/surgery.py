"""Model surgery: copies that share weights, and replacement of modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankNAS.allocation import Choice
from rankNAS.compression.factors import LayerFactors
from rankNAS.copies import copied
from rankNAS.decompositions.shapes import is_hf_conv1d

__all__ = [
    "LazyFactorised",
    "changeable_copy",
    "exceeds_memory_limit",
    "replace_module",
    "shared_copy",
]

LIGHT = 1 << 24  # bytes of weights; small compared with a process that has loaded PyTorch


def shared_copy(model: nn.Module, own: Iterable[Tensor] = ()) -> nn.Module:
    """A read-only copy that shares its parameters with the model, except some.

    The copy has its own buffers, such as batch-norm statistics.

    Args:
        model: The model.
        own: Parameters of the model that are copied instead of shared.
    """
    except_for = set(map(id, own))
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), p.requires_grad)
        for p in model.parameters()
        if id(p) not in except_for
    }
    return copied(model, memo)


def changeable_copy(model: nn.Module, layers: Mapping[str, LayerFactors]) -> nn.Module:
    """A copy of the model for `LayerFactors.write`, which changes its layers.

    If the model exceeds the memory limit, the copy shares all weights and factors. A layer's
    weight is then computed from its factors on each access, and freed.
    """
    if not exceeds_memory_limit(model):
        return copied(model)
    paths = {path for found in layers.values() for path in found.layer.paths}
    biases = [getattr(model.get_submodule(path), "bias", None) for path in paths]
    network = shared_copy(model, own=[bias for bias in biases if bias is not None])
    for module in {network.get_submodule(path) for path in paths}:
        parametrize.register_parametrization(module, "weight", _MultipliedOut(module), unsafe=True)
    return network


class _MultipliedOut(nn.Module):
    """Computes a layer's weight from the factors of a choice; without a choice, it is dense."""

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
    """Whether the weights are too large to be copied without need."""
    return sum(p.nbytes for p in model.parameters()) > LIGHT


class LazyFactorised(nn.Module):
    """A decomposed layer that is built for each forward pass and freed after it."""

    def __init__(self, layer: LayerFactors, choice: Choice) -> None:
        super().__init__()
        self._factors, self._rank = layer.factors[choice.operator], choice.rank
        self._bias, self._dtype = layer.bias_of(choice), layer.weight.dtype

    def forward(self, x: Tensor) -> Any:
        module = self._factors.truncate(self._rank, self._bias, self._dtype, trainable=False)
        return module(x)


def replace_module(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Set one module at every path, in place."""
    for path in paths:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
