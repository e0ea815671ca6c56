"""Trainings of networks in 16 bits: in float32, and rounded at the end.

A weight of 16 bits does not change by a step that is smaller than half the distance to the next
number, so most steps of a training would be lost. Passes may be in 16 bits all the same, by
automatic mixed precision.

Reference: Micikevicius et al., ICLR 2018, arXiv 1710.03740, section 3.1 (master weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rankNAS.tasks.base import HALF, at_least_float32
from rankNAS.trees import tree_map

__all__ = ["in_float32", "widen_arguments"]


@contextmanager
def in_float32(network: nn.Module) -> Iterator[None]:
    """Context in which no weight, buffer or input of a network has 16 bits.

    At its end, weights and buffers have their types again. Parameters stay the same objects.

    Args:
        network: The network; its modules stay the same in the context.
    """
    types = {name: x.dtype for name, x in _named(network).items() if x.dtype in HALF}
    if not types:
        yield
        return
    network.float()
    handle = network.register_forward_pre_hook(widen_arguments, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        network.zero_grad()  # a gradient has the type of its weight
        named = _named(network)  # other buffers than before
        for name, dtype in types.items():
            named[name].data = named[name].data.to(dtype)


def _named(network: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a network by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def widen_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook that gives a module its arguments in single precision at least."""
    return tree_map(at_least_float32, args), tree_map(at_least_float32, kwargs)
