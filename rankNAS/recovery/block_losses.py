"""The error of a block's output in a refinement, and its target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rankNAS.recovery.blocks import Blocks, main_tensor
from rankNAS.tasks.base import Task
from rankNAS.tasks.feeding import InputBatches

__all__ = [
    "ChannelLoss",
    "DenseOutputs",
    "Loss",
    "Targets",
    "advanced",
    "channel_moment",
    "output_gradients",
]

DEAD = 1e-3  # of the mean variance, added to that of each channel
RIDGE = 0.1  # share of the plain relative error, of which no channel is free
FULL = 1024  # channels; of more, only their own gradients are kept, not the products
Loss = Callable[[Any, Any, int], Tensor]  # of an output, its target and the number of the batch


class ChannelLoss:
    """The squared error of a block's output, weighted by what the network's loss sees of it.

    The weights of the channels are the second moment G of the loss's gradients with respect to the
    outputs, scaled so that an error as large as the output gives about 1, and a share of the error
    relative to each channel's variance.

    Args:
        targets: Outputs of the dense block; channels are axis 1 of images, else the last axis.
        gradient: G (c, c), or its diagonal (c,); None for the relative error alone.
        batches: Their inputs, whose masked positions do not count.
    """

    def __init__(
        self, targets: Sequence[Tensor], gradient: Tensor | None, batches: InputBatches
    ) -> None:
        self._batches, self._axis = batches, _axis(targets[0])
        mean = _mean(_rows(x) for x in targets)
        variance = _mean((_rows(x) - mean).square() for x in targets)
        variance = variance + DEAD * variance.mean()
        relative = torch.where(variance > 0, 1 / variance, torch.ones_like(variance))
        self._weights = relative.sqrt().to(targets[0].dtype)
        own = None if gradient is None else gradient.diagonal() if gradient.dim() > 1 else gradient
        total = 0.0 if own is None else float((own * variance).mean())
        if gradient is not None and total > 0:
            if gradient.dim() > 1:
                weights = torch.linalg.cholesky(gradient / total + RIDGE * relative.diag())
            else:
                weights = (gradient / total + RIDGE * relative).sqrt()
            self._weights = weights.to(targets[0].dtype)

    def __call__(self, output: Any, target: Tensor, number: int) -> Tensor:
        found = main_tensor(output)
        assert found is not None
        error = (found - target).movedim(self._axis, -1)
        mask = self._batches.mask(number)
        if mask is not None and mask.any() and mask.shape == error.shape[:2]:
            error = error[mask]
        weighted = error @ self._weights if self._weights.dim() > 1 else error * self._weights
        return weighted.square().mean()


class DenseOutputs:
    """Outputs of the dense network's last block, computed when they are needed: they are large."""

    def __init__(
        self, blocks: Blocks, number: int, states: Sequence[Any], batches: InputBatches
    ) -> None:
        self._blocks, self._number, self._states, self._batches = blocks, number, states, batches

    @torch.no_grad()
    def __getitem__(self, i: int) -> Any:
        return self._blocks.run(self._number, self._states[i], self._batches[i])


#: Of the batches, in their order.
Targets: TypeAlias = "Sequence[Tensor] | DenseOutputs"


def advanced(
    blocks: Blocks, number: int, states: list[Any], batches: InputBatches
) -> list[Tensor]:
    """The outputs of a block; the states become those before the next block."""
    outputs = []
    for i, x in enumerate(batches):
        output, states[i] = blocks.advance(number, states[i], x)
        tensor = main_tensor(output)
        assert tensor is not None
        outputs.append(tensor)
    return outputs


@torch.enable_grad()
def output_gradients(
    dense: Blocks, batches: InputBatches, numbers: Iterable[int], task: Task, seed: int
) -> list[Tensor | None]:
    """The second moments of the loss's gradients at the outputs of the dense network's blocks.

    Targets are sampled from the prediction itself, so the moments are those of the Fisher matrix.

    Args:
        dense: The blocks of the dense network.
        batches: Inputs.
        numbers: The batches to use.
        task: Reads batches and outputs.
        seed: Random seed of the targets.

    Returns:
        For each block a moment (c, c) or its diagonal (c,), float64; None for the last block where
        its output is that of the network, or if the loss has no gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: list[Tensor | None] = [None] * len(dense.names)
    for i in numbers:
        outputs, final = dense.graph(batches[i])
        loss = task.predict(final, batches.batch(i)).sampled_loss(generator)
        if not loss.requires_grad or not outputs:
            break
        gradients = torch.autograd.grad(loss, outputs, materialize_grads=True)
        for k, gradient in enumerate(gradients):
            own, before = channel_moment(gradient), sums[k]
            sums[k] = own if before is None else before + own
    return [x if x is not None and bool(x.isfinite().all()) else None for x in sums]


def channel_moment(gradient: Tensor) -> Tensor:
    """The sum of the products of the channels (c, c), or of their squares (c,), float64."""
    rows = _rows(gradient)
    return rows.mT @ rows if rows.shape[1] <= FULL else rows.square().sum(0)


def _axis(x: Tensor) -> int:
    """The axis of the channels."""
    return 1 if x.dim() > 3 else -1


def _rows(x: Tensor) -> Tensor:
    """The values of the channels, float64 (n, c)."""
    axis = _axis(x)
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]).double()


def _mean(parts: Iterable[Tensor]) -> Tensor:
    """The mean over the rows of all parts."""
    sums, count = torch.zeros(()), 0
    for part in parts:
        sums, count = sums.to(part) + part.sum(0), count + len(part)
    return sums / count
