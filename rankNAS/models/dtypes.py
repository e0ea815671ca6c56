"""The data type of a network's weights, for files of another precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rankNAS.exceptions import UsageError
from rankNAS.models.huggingface.description import is_transformers
from rankNAS.search_spaces.zoo.folders import DTYPES

__all__ = ["converted"]


def converted(network: nn.Module, name: str) -> nn.Module:
    """The network itself, with floating-point weights of another data type.

    Buffers of a model of ``transformers`` that no file holds stay as they are: it computes them
    again in float32 when it is loaded.

    Args:
        network: The network; it is changed.
        name: ``float32``, ``bfloat16``, ``float16`` or ``float64``.

    Raises:
        UsageError: Another name.

    Example:
        >>> converted(nn.Linear(2, 3), "bfloat16").weight.dtype
        torch.bfloat16
    """
    if name not in DTYPES:
        raise UsageError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    if not is_transformers(network):
        return network.to(dtype)
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in network.modules():
        for key, buffer in module._buffers.items():
            kept = key in module._non_persistent_buffers_set
            if buffer is not None and buffer.is_floating_point() and not kept:
                module._buffers[key] = buffer.to(dtype)
    own: Any = network
    own.config.dtype = dtype
    return network
