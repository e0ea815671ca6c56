"""The distance between the feature maps of a compressed network and those of the dense one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from rankNAS.tasks.base import at_least_float32

__all__ = ["Features"]


@final
class Features:
    """Records the outputs of modules of two networks that have the same paths.

    References:
        Romero et al., ICLR 2015 (FitNets): hints from inner layers.

    Args:
        network: The compressed network.
        dense: The dense network.
        paths: Paths of modules in both.
    """

    def __init__(self, network: nn.Module, dense: nn.Module, paths: Sequence[str]) -> None:
        self.paths = paths
        self._networks = network, dense
        self._maps: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}

    @contextmanager
    def recorded(self) -> Iterator[Features]:
        """Context in which the networks record."""
        handles = []
        for network, found in zip(self._networks, self._maps, strict=True):
            for path in self.paths:
                module = network.get_submodule(path)
                handles.append(module.register_forward_hook(_recorder(found, path)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            for found in self._maps:
                found.clear()

    def distance(self) -> Tensor:
        """The mean over layers of the squared distance relative to the dense maps' variance.

        Of the last pass of each network, which it forgets.
        """
        own, wanted = self._maps
        losses = []
        for path, x in own.items():
            y = at_least_float32(wanted[path].detach())
            variance = y.var(correction=0).clamp_min(torch.finfo(y.dtype).tiny)
            losses.append((at_least_float32(x) - y).square().mean() / variance)
        own.clear()
        wanted.clear()
        return torch.stack(losses).mean()


def _recorder(found: dict[str, Tensor], path: str) -> Any:
    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[path] = output

    return record
