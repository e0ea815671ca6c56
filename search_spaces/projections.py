"""Fused projections as separate layers: query, key and value, or gate and up.

Each part then has a rank of its own. The parts of a fused layer share the first factor of a
decomposition; separate ones do not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.copies import copied
from rankNAS.decompositions.layer_view import LayerView, linear_of
from rankNAS.decompositions.shapes import is_hf_conv1d
from rankNAS.search_spaces.roles import role_of

__all__ = ["SplitProjection", "fused_projections", "split_projections"]

PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
#: Classes whose layer has the rows of each head together: its query, its key, its value.
BY_HEADS = ("GPTNeoX", "Bloom")


class SplitProjection(nn.Module):
    """Layers with the same input whose outputs are joined.

    Args:
        parts: The layers by role, in order.
        size: Outputs of a head, if those of each head lie together: of its first part, of its
            second part and so on. None if the parts are only concatenated.

    Example:
        >>> both = SplitProjection({"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6)})
        >>> both(torch.zeros(2, 4)).shape
        torch.Size([2, 12])
    """

    def __init__(self, parts: Mapping[str, nn.Linear], size: int | None = None) -> None:
        super().__init__()
        self._names, self._size = tuple(parts), size
        outputs = [(name, part.out_features) for name, part in parts.items()]
        biased = next(iter(parts.values())).bias is not None
        #: Arguments of an equal module: outputs by part in order, whether biased, and the size.
        self.sizes = {"parts": outputs, "bias": biased, "size": size}
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """The joined outputs (..., outputs)."""
        parts = [self.get_submodule(name)(x) for name in self._names]
        if self._size is None:
            return torch.cat(parts, -1)
        return torch.stack([part.unflatten(-1, (-1, self._size)) for part in parts], -2).flatten(
            -3
        )


def split_projections(model: nn.Module, paths: Collection[str]) -> nn.Module:
    """A copy of the model in which fused projections are split; the model itself without paths.

    Args:
        model: The model.
        paths: Some of those that `fused_projections` finds.
    """
    if not paths:
        return model
    sizes = fused_projections(model)
    network = copied(model)
    for path in paths:
        view = LayerView(network, [path])
        parent = network.get_submodule(path.rpartition(".")[0])
        view.replace(_split(view, sizes[path], parent))
    return network


def fused_projections(model: nn.Module) -> dict[str, dict[str, int]]:
    """By path of a fused projection, the number of outputs of each part."""
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) and not is_hf_conv1d(module):
            continue
        weight: Any = LayerView(module, [""]).weight
        sizes = _sizes(model, path, role_of(path), *weight.shape)
        if sizes is not None:
            found[path] = sizes
    return found


def _sizes(
    model: nn.Module, path: str, role: str | None, outputs: int, inputs: int
) -> dict[str, int] | None:
    """The outputs of each part; None if the layer is not fused, or its parts are not known."""
    if role == "gate_up":
        return {"gate": outputs // 2, "up": outputs // 2} if outputs % 2 == 0 else None
    if role != "qkv":
        return None
    parent = path.rpartition(".")[0]
    attention = model.get_submodule(parent)
    after = [
        LayerView(module, [""]).weight.shape[1]
        for name, module in attention.named_modules()
        if (isinstance(module, nn.Linear) or is_hf_conv1d(module))
        and role_of(f"{parent}.{name}") == "o"
    ]
    queries = int(after[0]) if len(after) == 1 else inputs
    keys, rest = divmod(outputs - queries, 2)
    if rest or not 0 < keys <= queries:
        return None
    # Other layers of this name have rows in orders that are not known here.
    known = keys == queries and _head_size(attention, outputs) is not None
    if path.endswith("query_key_value") and not known:
        return None
    return {"q": queries, "k": keys, "v": keys}


def _head_size(parent: Any, outputs: int) -> int | None:
    """Outputs of a head in a layer that has the rows of each head together; None in others."""
    if not type(parent).__name__.startswith(BY_HEADS):
        return None
    size = int(getattr(parent, "head_size", None) or getattr(parent, "head_dim", None) or 0)
    return size if size and outputs % (3 * size) == 0 else None


def _split(view: LayerView, sizes: Mapping[str, int], parent: nn.Module) -> SplitProjection:
    """The parts of a layer, with copies of its rows."""
    model, rows = view.modules[0], torch.arange(sum(sizes.values()))
    size = _head_size(parent, len(rows))
    if size is not None:
        rows = rows.unflatten(0, (-1, len(sizes), size)).transpose(0, 1).flatten()
    parts = {}
    for name, own in zip(sizes, rows.split(list(sizes.values())), strict=True):
        bias = None if view.bias is None else view.bias[own].clone()
        trained = view.parameter.requires_grad
        parts[name] = linear_of(view.weight[own].clone(), bias, trained=trained)
    return SplitProjection(parts, size).train(model.training)
