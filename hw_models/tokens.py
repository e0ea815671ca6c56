"""Latency of a few tokens: a space and its example inputs for the first positions of a window."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.tracing import trace
from rankNAS.trees import Inputs, tensors, tree_map

__all__ = ["first_tokens", "space_of_tokens"]


def first_tokens(model: nn.Module, inputs: Inputs, tokens: int | None) -> Inputs:
    """The inputs with the first tokens of each sample alone; unchanged if `tokens` is None.

    Args:
        model: The model.
        inputs: Its arguments: the first tensor holds token ids (N, T), and other tensors that
            begin with the axes (N, T) are cut as well.
        tokens: The number of tokens; 1 is what one step of decoding computes, but for its
            attention to earlier tokens.

    Raises:
        UsageError: The inputs are no windows of as many tokens, or the model has an encoder, which
            decoding does not run again.

    >>> import torch
    >>> window = Inputs.of(torch.zeros(2, 8, dtype=torch.int64))
    >>> first_tokens(nn.Identity(), window, 1).first.shape
    torch.Size([2, 1])
    """
    if tokens is None:
        return inputs
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{type(model).__name__} has an encoder, so the latency of a few tokens is not that "
            "of decoding; leave `latency_tokens` out."
        )
    first = next(iter(tensors(inputs)), None)
    if first is None or first.dim() != 2 or first.is_floating_point():
        raise UsageError("`latency_tokens` is for models of token ids; leave it out.")
    window = first.shape
    if tokens > window[1]:
        raise UsageError(
            f"`latency_tokens` is {tokens}, but a sample has {window[1]} tokens; give no more."
        )

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, :tokens] if tensor.shape[:2] == window else tensor

    found: Inputs = tree_map(cut, inputs)
    return found


def space_of_tokens(model: nn.Module, space: SearchSpace, inputs: Inputs) -> SearchSpace:
    """The space with the calls and the multiply-accumulates of other inputs for as many samples.

    Args:
        model: The dense model that the space was compiled from.
        space: The space.
        inputs: The model's arguments, such as those of `first_tokens`.

    Raises:
        UsageError: The model does not run on the inputs, or a layer is not called.
    """
    traced = trace(model, inputs)
    layers: dict[str, Layer] = {}
    for name, layer in space.layers.items():
        calls = tuple(call for path in layer.paths for call in traced.calls.get(path, ()))
        if not all(map(math.prod, calls)) or not calls:
            raise UsageError(
                f"layer {name!r} gets no input from so few tokens, as experts may; give more "
                "`latency_tokens`."
            )
        # The costs of linear layers are proportional to their positions.
        positions = sum(map(math.prod, calls)), sum(map(math.prod, layer.shape.calls))
        costs = tuple(
            replace(cost, macs=cost.macs * positions[0] // positions[1]) for cost in layer.costs
        )
        layers[name] = replace(layer, shape=replace(layer.shape, calls=calls), costs=costs)
    inside = sum(layer.costs[0].macs for layer in layers.values())
    remainder = replace(space.remainder_cost, macs=max(0, traced.total - inside))
    first = next(iter(tensors(inputs)))
    return replace(space, layers=layers, remainder_cost=remainder, input_shape=tuple(first.shape))
