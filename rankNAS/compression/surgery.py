"""Copies of models that share weights, and layers that exist only while they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.factors import LayerFactors
from rankNAS.copies import copied
from rankNAS.decompositions.layer_view import LayerView

__all__ = [
    "LazyFactorised",
    "changeable_copy",
    "exceeds_memory_limit",
    "install",
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
    biases = [LayerView(model, found.layer.paths).bias_parameter for found in layers.values()]
    network = shared_copy(model, own=[bias for bias in biases if bias is not None])
    for found in layers.values():
        LayerView(network, found.layer.paths).compute_weight()
    return network


def exceeds_memory_limit(model: nn.Module) -> bool:
    """Whether the weights are too large to be copied without need."""
    return sum(p.nbytes for p in model.parameters()) > LIGHT


def install(network: nn.Module, found: LayerFactors, choice: Choice) -> None:
    """Exchange a layer of a read-only network; it shares the memory of the factors.

    Args:
        network: A copy from `shared_copy`.
        found: The factors of the layer.
        choice: The choice; for dense the layer takes the weight and the bias.
    """
    view = LayerView(network, found.layer.paths)
    if choice != DENSE:
        view.replace(LazyFactorised(found, choice))
        return
    weight, bias = found.folded(choice)
    for module in view.modules:
        module.weight = nn.Parameter(view.turned(weight), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)


class LazyFactorised(nn.Module):
    """A decomposed layer that is built for each forward pass and freed after it."""

    def __init__(self, layer: LayerFactors, choice: Choice) -> None:
        super().__init__()
        self._factors, self._rank = layer.factors[choice.operator], choice.rank
        self._bias, self._dtype = layer.bias_of(choice), layer.weight.dtype

    def forward(self, input: Tensor) -> Any:  # named as in nn.Linear, for keyword calls
        module = self._factors.truncate(self._rank, self._bias, self._dtype, trainable=False)
        return module.to(input.device)(input)
