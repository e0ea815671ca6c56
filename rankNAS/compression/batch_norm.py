"""Re-estimation of batch-norm statistics after compression.

Replacing a layer by a low-rank one shifts the distribution of its outputs, so the stored running
means and variances no longer fit. Re-estimation needs neither labels nor gradients and often
recovers most of the lost accuracy.

Statistics estimated on calibration inputs also differ from the trained ones for other reasons: few
samples, no augmentation. These reasons affect the dense network equally, so they cancel in the
difference between the two networks on the same inputs (`BatchNormReference`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankNAS.exceptions import UsageError
from rankNAS.tasks.base import HALF
from rankNAS.tasks.feeding import InputBatches, InputSource, input_batches

__all__ = [
    "BatchNormReference",
    "averaging_anew",
    "cumulative_averaging",
    "has_batch_norm",
    "in_float32",
    "is_tracking",
    "reestimate_batch_norm",
    "tracking_layers",
    "training_layers",
    "uncorrected_layers",
]


FEW, ENOUGH = 4.0, 256  # values per channel: of 4, no variance is trusted below the stored one


def has_batch_norm(network: nn.Module) -> bool:
    """Whether ``network`` contains a batch norm that keeps running statistics."""
    return bool(tracking_layers(network))


@torch.no_grad()
def reestimate_batch_norm(
    network: nn.Module, inputs: InputSource, batch_size: int = 256
) -> nn.Module:
    """The same ``network`` with batch-norm statistics re-estimated in place.

    Every running mean and variance becomes the plain average over the batches (Ioffe & Szegedy
    2015, algorithm 2, lines 8 to 11). Only the batch norms are in training mode, so dropout stays
    off. A network without running statistics is returned without a forward pass.

    Args:
        network: The network to change; it ends in evaluation mode.
        inputs: Unlabelled images (N, C, H, W), or other samples or batches of inputs, N >= 2.
        batch_size: Largest number of inputs per forward pass (3 inputs may form one batch when
            ``batch_size`` is 2, because a single input has no variance).

    Returns:
        The same ``network``.

    Raises:
        UsageError: There are fewer than 2 inputs, or ``batch_size`` is below 2.
    """
    network.eval()
    layers = tracking_layers(network)
    if not layers:
        return network
    count = inputs.samples if isinstance(inputs, InputBatches) else len(inputs)
    if count < 2 or batch_size < 2:
        raise UsageError(
            f"batch-norm statistics were asked for from {count} inputs in batches of "
            f"{batch_size}, but a variance needs at least 2; give more inputs or a larger batch."
        )
    precisions = [(layer, layer.running_mean.dtype) for layer in layers]  # type: ignore[union-attr]
    in_float32(network)
    with cumulative_averaging(layers):
        for batch in input_batches(inputs, batch_size, even=True):
            batch.run(network)
    for layer, dtype in precisions:
        layer.to(dtype)
    return network


def in_float32(network: nn.Module) -> None:
    """Change half-precision batch norms to float32, in place; their outputs keep their type.

    A variance above 65504 is infinite in float16.
    """
    for layer in tracking_layers(network):
        if layer.running_mean is not None and layer.running_mean.dtype in HALF:
            layer.float()


def is_tracking(module: nn.Module | None) -> TypeGuard[_BatchNorm]:
    """Whether a module is a batch norm that keeps running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


class BatchNormReference:
    """Corrects stored batch-norm statistics by the change due to compression alone.

    Let m and v be the stored mean and variance, (M, V) the statistics measured in the dense
    network and (M', V') those measured on the same inputs in the compressed network. The
    compressed network gets m + M' - M and v V' / V. The dense network is unchanged.

    A variance of few values can be close to 0 by chance. From fewer than 256 values per channel,
    both variances are therefore at least a share of the stored one, which shrinks their ratio to 1
    as the number of values falls.

    Args:
        network: The dense network, with its stored statistics.
        inputs: Calibration samples, or batches of their inputs; ``network`` is unchanged.
        batch_size: As for `reestimate_batch_norm`.
        keeping: The network whose type the corrected statistics are rounded to, because those of
            ``network`` are in float32 (`in_float32`); None for ``network`` itself.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: InputSource,
        batch_size: int = 256,
        keeping: nn.Module | None = None,
    ) -> None:
        layers = tracking_layers(network)
        kept = tracking_layers(network if keeping is None else keeping)
        self._types = {
            layer: _statistics(k)[0].dtype for layer, k in zip(layers, kept, strict=True)
        }
        self._stored = {layer: _statistics(layer) for layer in layers}
        with _counting_values(layers) as self._counts:
            reestimate_batch_norm(network, inputs, batch_size)
        self._measured = {layer: _statistics(layer) for layer in layers}
        for layer in layers:
            _set_statistics(layer, *self._stored[layer])

    def correct(
        self, layers: Iterable[_BatchNorm], originals: Iterable[_BatchNorm] | None = None
    ) -> None:
        """Correct the statistics measured in the compressed network, in place.

        Args:
            layers: Batch norms of the compressed network.
            originals: The corresponding ones of ``network``; by default, the same objects.
        """
        layers = list(layers)
        pairs = zip(layers, layers if originals is None else originals, strict=True)
        for layer, original in pairs:
            mean, variance = _statistics(layer)
            (m, v), (M, V) = self._stored[original], self._measured[original]
            least = v * max(0.0, FEW / max(1, self._counts[original]) - FEW / ENOUGH)
            now, before = variance.maximum(least), V.maximum(least)
            corrected = v * (now + layer.eps) / (before + layer.eps)
            dtype = self._types[original]
            _set_statistics(layer, _rounded(m + mean - M, dtype), _rounded(corrected, dtype))


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.clone(), layer.running_var.clone()


def _set_statistics(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as a type has them, of finite ones none infinite."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype).to(values.dtype)


@contextmanager
def _counting_values(layers: Sequence[_BatchNorm]) -> Iterator[dict[_BatchNorm, int]]:
    """Context whose mapping counts the values per channel that reach each batch norm."""
    counts = dict.fromkeys(layers, 0)

    def count(layer: nn.Module, args: object, output: Tensor) -> None:
        assert isinstance(layer, _BatchNorm)
        counts[layer] += output.numel() // layer.num_features

    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def tracking_layers(network: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics."""
    return [module for module in network.modules() if is_tracking(module)]


def uncorrected_layers(network: nn.Module) -> list[str]:
    """The paths of the modules with running statistics that are no batch norms of PyTorch."""
    return [
        path
        for path, module in network.named_modules()
        if not is_tracking(module)
        and {"running_mean", "running_var"} & {n for n, _ in module.named_buffers(recurse=False)}
    ]


def training_layers(network: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics and use those of the batch."""
    return [layer for layer in tracking_layers(network) if layer.training]


@contextmanager
def averaging_anew(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Context in which running statistics are the plain average over the batches from now on."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch's setting for the average over all batches
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@contextmanager
def cumulative_averaging(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Context in which layers are in training mode, and average their statistics anew."""
    for layer in layers:
        layer.train()
    try:
        with averaging_anew(layers):
            yield
    finally:
        for layer in layers:
            layer.eval()
