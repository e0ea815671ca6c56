"""Batch-norm statistics of a network whose weights were changed after training.

Replacing a layer by a low-rank one shifts the distribution of its outputs, so the running means
and variances stored behind it no longer fit. Measuring them again needs neither labels nor
gradients and often recovers most of the lost accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankNAS.exceptions import UsageError

__all__ = ["cumulative_averaging", "even_chunks", "has_batch_norm", "reestimate_batch_norm"]


def has_batch_norm(network: nn.Module) -> bool:
    """Whether any layer of ``network`` is a batch norm that keeps running statistics."""
    return bool(_tracking_layers(network))


@torch.no_grad()
def reestimate_batch_norm(network: nn.Module, inputs: Tensor, batch_size: int = 256) -> nn.Module:
    """Measure the batch-norm statistics of ``network`` anew, in place.

    Every running mean and variance becomes the plain average over the batches (Ioffe & Szegedy
    2015, algorithm 2, lines 8 to 11). Only the batch norms are in training mode meanwhile, so
    dropout stays off. A network without running statistics is returned without a forward pass.

    Args:
        network: The network to change; it is left in evaluation mode.
        inputs: Unlabelled images (N, C, H, W), or whatever the network takes, N >= 2.
        batch_size: The largest number of inputs in a forward pass (3 may go together when
            ``batch_size`` is 2, because one input alone has no variance).

    Returns:
        The same ``network``.

    Raises:
        UsageError: There are fewer than 2 inputs, or ``batch_size`` is below 2.
    """
    network.eval()
    layers = _tracking_layers(network)
    if not layers:
        return network
    if len(inputs) < 2 or batch_size < 2:
        raise UsageError(
            f"batch-norm statistics were asked for from {len(inputs)} inputs in batches of "
            f"{batch_size}, but a variance needs at least 2; give more inputs or a larger batch."
        )
    with cumulative_averaging(layers):
        for batch in even_chunks(inputs, batch_size):
            network(batch)
    return network


def _tracking_layers(network: nn.Module) -> list[_BatchNorm]:
    return [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def even_chunks(inputs: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Chunks whose sizes differ by 1 at most, so that they weigh alike and none holds 1 input."""
    count = min(math.ceil(len(inputs) / batch_size), len(inputs) // 2)
    return inputs.tensor_split(count)


@contextmanager
def cumulative_averaging(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within, the running statistics of batch norms become the plain average over the batches."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # how torch spells "average over all batches"
        layer.train()
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
