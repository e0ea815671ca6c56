"""Outputs of networks on data sets, and the metrics computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rankNAS.compression.incremental import CachedPass, IncrementalExecutor
from rankNAS.data.batches import batches, channels_last
from rankNAS.objectives.quality import accuracy, kl_divergence, loss, reverse_kl

__all__ = ["PartwiseOutputs", "output_metrics", "predictions", "quality", "test_metrics"]


class PartwiseOutputs:
    """The outputs of one changing network on fixed inputs, part by part.

    Args:
        inputs: The inputs (samples, …), on the network's device.
        sizes: The number of samples of each part.
        batch_size: Samples per forward pass, at most.
        executor: The network's executor, if it could be traced. A forward pass then begins at the
            first operation that changed since the last one.
    """

    def __init__(
        self,
        inputs: Tensor,
        sizes: Sequence[int],
        batch_size: int,
        executor: IncrementalExecutor | None,
    ) -> None:
        self._parts = [part.split(batch_size) for part in inputs.split(list(sizes))]
        self._passes: list[CachedPass] | None = None
        if executor is not None:
            self._passes = [CachedPass(executor, part) for part in self._parts]

    def invalidate(self, first: int) -> None:
        """Mark the executor's operations from number `first` on as changed."""
        for cached in self._passes or ():
            cached.invalidate(first)

    def __len__(self) -> int:
        """The number of parts."""
        return len(self._parts)

    @torch.no_grad()
    def part(self, number: int, network: nn.Module) -> Tensor:
        """The outputs of the network on one part."""
        if self._passes is not None:
            return torch.cat(self._passes[number].run())
        return torch.cat([network(x) for x in self._parts[number]])


def output_metrics(logits: Tensor, targets: Tensor, dense_logits: Tensor) -> dict[str, float]:
    """Metrics computed from outputs alone.

    Args:
        logits: Outputs (n, …) on the first validation samples.
        targets: The targets of all validation samples.
        dense_logits: The dense network's outputs on all validation samples.
    """
    targets, dense_logits = targets[: len(logits)], dense_logits[: len(logits)]
    metrics = quality(logits, targets)
    if logits.dim() > 1 and not targets.is_floating_point():
        metrics["kl_divergence"] = kl_divergence(logits, dense_logits)
        metrics["reverse_kl"] = reverse_kl(logits, dense_logits)
    return metrics


def quality(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Loss, and accuracy if the targets are classes."""
    metrics = {"loss": loss(logits, targets)}
    if not targets.is_floating_point():
        metrics["accuracy"] = accuracy(logits, targets)
    return metrics


def test_metrics(
    network: nn.Module,
    dataset: Dataset[Any] | tuple[Tensor, Tensor],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Loss and accuracy of a network on a data set, streamed."""
    return quality(*predictions(network, dataset, batch_size=batch_size, device=device))


@torch.no_grad()
def predictions(
    network: nn.Module,
    dataset: Dataset[Any] | tuple[Tensor, Tensor],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Outputs of a network and the targets of a data set, streamed."""
    network = network.to(device).eval()
    logits, targets = [], []
    for x, y in batches(dataset, batch_size, device=device):
        logits.append(network(channels_last(x)))
        targets.append(y)
    return torch.cat(logits), torch.cat(targets)
