"""Statistics of experts that saw few tokens: shrinkage towards the other experts of the block."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rankNAS.compression.degenerate import listed
from rankNAS.decompositions.norms import Statistics
from rankNAS.search_spaces.base import Layer

__all__ = ["shrunk_towards_siblings"]

logger = logging.getLogger(__name__)
NUMBER = re.compile(r"(^|\.)experts\.\d+(?=\.)")
FEW = 1.0  # tokens per input below which an expert is named


def shrunk_towards_siblings(
    layers: Mapping[str, Layer], statistics: Mapping[str, Statistics], tokens: Mapping[str, int]
) -> dict[str, Statistics]:
    """The statistics, with those of experts mixed with the mean of their block.

    An expert with n tokens and m inputs gets the weight n / (n + m), the mean of all experts of
    the block with the same role m / (n + m), as if it had seen m tokens of the mean.

    Args:
        layers: The layers.
        statistics: Their statistics. Experts without tokens need none: they get the mean.
        tokens: The number of tokens that each layer saw.
    """
    found, few = dict(statistics), []
    for names in _siblings(layers):
        total = sum(tokens[name] for name in names)
        if not total:
            continue
        shares = {name: tokens[name] / total for name in names if tokens[name]}
        mean = _mixed({name: statistics[name] for name in shares}, shares)
        for name in names:
            inputs = layers[name].shape.inputs
            if tokens[name] < FEW * inputs:
                few.append(f"{name!r} ({tokens[name]} tokens)")
            if not tokens[name]:
                found[name] = mean
                continue
            own = tokens[name] / (tokens[name] + inputs)
            both = {"own": statistics[name], "mean": mean}
            found[name] = _mixed(both, {"own": own, "mean": 1 - own})
    if few:
        logger.warning(
            "some experts saw few tokens, so their statistics lean on those of their siblings: "
            "%s; give more calibration data.",
            listed(few),
        )
    return found


def _siblings(layers: Mapping[str, Layer]) -> list[list[str]]:
    """The layers of the experts of one block with the same place in their expert."""
    groups: dict[tuple[str, int, int], list[str]] = {}
    for name, layer in layers.items():
        if "expert" in layer.roles and NUMBER.search(name):
            place = NUMBER.sub(r"\1experts", name)
            key = place, layer.shape.inputs, layer.shape.outputs
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _mixed(parts: Mapping[str, Statistics], shares: Mapping[str, float]) -> Statistics:
    """The weighted mean of statistics; that of the gradients is over the parts that have them."""
    gradients = {name: part.output_gradient_second_moment for name, part in parts.items()}
    return Statistics(
        _mean({name: part.input_second_moment for name, part in parts.items()}, shares),
        _mean({name: part.mean for name, part in parts.items()}, shares),
        _mean({n: x for n, x in gradients.items() if x is not None}, shares)
        if any(x is not None for x in gradients.values())
        else None,
    )


def _mean(tensors: Mapping[str, Tensor], shares: Mapping[str, float]) -> Tensor:
    """The mean of tensors with weights."""
    whole = sum(shares[name] for name in tensors)
    total = torch.zeros_like(next(iter(tensors.values())))
    for name, tensor in tensors.items():
        total.add_(tensor, alpha=shares[name] / whole)
    return total
