"""What a search space leaves as it is: every parameter and operation outside its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from rankNAS.decompositions.shapes import Cost
from rankNAS.search_spaces.base import Layer, Skipped
from rankNAS.search_spaces.tracing import Trace

__all__ = ["Remainder"]

KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.RNNBase, nn.RNNCellBase), "recurrent: no operator decomposes it"),
    ((_ConvTransposeNd,), "transposed convolution: no operator decomposes it"),
    ((nn.Conv3d,), "3-D convolution: no operator decomposes it"),
    ((nn.Bilinear,), "bilinear: no operator decomposes it"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding: a table, no matrix product"),
    ((_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "norm: no matrix"),
    (
        (nn.MultiheadAttention,),
        "attention with hooks, added keys or a forward of its own, which is not separated",
    ),
    ((torch.jit.ScriptModule,), "a TorchScript program"),
)


class Remainder:
    """The parameters and operations of a model outside the layers of a space.

    Each parameter counts once, and so does each operation: costs that are taken are gone.
    Afterwards the costs of the layers and of everything skipped add up to those of the model.

    Args:
        model: The model.
        traced: Its forward pass.
        layers: The layers of the space.
    """

    def __init__(self, model: nn.Module, traced: Trace, layers: Mapping[str, Layer]) -> None:
        self._model, self._readers = model, traced.readers
        self._macs = defaultdict(int, traced.macs)
        self._counted: set[int] = set()
        for layer in layers.values():
            # The cost of a layer follows from its shape. It is that of its calls.
            counted = self.take(layer.paths).macs
            if left := counted - layer.costs[0].macs:
                self._macs[layer.name] = left

    def take(self, paths: Iterable[str]) -> Cost:
        """The cost of the modules at some paths, with all modules inside them."""
        cost = Cost(0, 0, 0)
        for path in paths:
            module = self._model.get_submodule(path)
            inside = [p for p in self._macs if p == path or p.startswith(f"{path}.")]
            macs = sum(self._macs.pop(p) for p in inside)
            cost += _cost(self._new(module.parameters()), macs)
        return cost

    def others(self) -> list[Skipped]:
        """All modules with parameters or operations of their own that were not taken yet."""
        found = []
        for path, module in self._model.named_modules():
            own = self._new(module.parameters(recurse=False))
            macs = self._macs.pop(path, 0)
            if own or macs:
                name = path or type(module).__name__
                reason = _reason(module, own)
                if path in self._readers:
                    reason = f"its weight is used by {self._readers[path]}, outside its own call"
                found.append(Skipped(name, reason, _cost(own, macs)))
        return found

    def _new(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        new = [p for p in dict.fromkeys(parameters) if id(p) not in self._counted]
        self._counted.update(map(id, new))
        return new


def _cost(parameters: list[nn.Parameter], macs: int) -> Cost:
    params = sum(p.numel() for p in parameters)
    return Cost(macs, params, sum(p.numel() * p.element_size() for p in parameters))


def _reason(module: nn.Module, own: list[nn.Parameter]) -> str:
    for kinds, reason in KINDS:
        if isinstance(module, kinds):
            return reason
    if not own:
        return "products without weights, as in attention"
    if all(p.dim() < 2 for p in own):
        return "no matrix: vectors and scalars"
    sizes = ", ".join(_size(name, p) for name, p in _named(module) if p.dim() > 1)
    return f"parameters of a {type(module).__name__}, which is no layer: {sizes}"


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    parameters: Any = module._parameters.items()
    return [(name, p) for name, p in parameters if p is not None]


def _size(name: str, parameter: Tensor) -> str:
    return f"{name} {'x'.join(map(str, parameter.shape))}"
