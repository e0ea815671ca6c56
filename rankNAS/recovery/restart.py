"""Chains of two factors at another rank: the exact truncation of a product by QR, and the reverse.

For a product U V of rank R, U = Q T and V^T = Q' T' (QR), and the singular value decomposition
T T'^T = A S B^T of an R x R matrix give the best product of rank r < R,

    (Q A S^1/2) (S^1/2 B^T Q'^T), cut to r columns and rows,

without forming U V. In the reverse direction, the leading singular vectors of what a product lacks
of the dense weight are appended to its factors.

Notation: k blocks, each of which is a product of U (m, r) and V (r, n).

References:
    Hajimolahoseini et al., 2024, arXiv 2406.19995: progressively lower ranks, each from the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.decompositions.shapes import GroupedLinear

__all__ = ["blocks_of", "dense_blocks", "extended", "rebuilt", "truncated"]


def blocks_of(stages: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The factors U (k, m, r) and V (k, r, n) of a chain of two stages."""
    first, second = stages
    V, W = _matrix(first), _matrix(second)
    blocks, groups = _groups(first), _groups(second)
    V = V.reshape(blocks, V.shape[0] // blocks, -1)
    U = W.reshape(groups, W.shape[0] // groups, blocks // groups, V.shape[1], -1)
    U = U.permute(0, 2, 1, 4, 3).reshape(blocks, -1, V.shape[1])
    return U, V


def dense_blocks(stages: Sequence[Any], dense: Any) -> Tensor:
    """The weight of the dense layer that a chain stands for, as the blocks (k, m, n) of U V.

    Gradients flow to the weight.
    """
    first, second = stages
    blocks, groups = _groups(first), _groups(second)
    W: Tensor = dense.weight
    if isinstance(dense, GroupedLinear):
        W = W.flatten(0, 1)
    kernels = [size for pair in zip(_kernel(first), _kernel(second), strict=True) for size in pair]
    k = blocks // groups
    W = W.reshape(groups, W.shape[0] // groups, k, W.shape[1] // k, *kernels)
    axes = range(len(_kernel(first)))
    of_first, of_second = [4 + 2 * i for i in axes], [5 + 2 * i for i in axes]
    rows = W.shape[1] * _product(W.shape[i] for i in of_second)
    W = W.permute(0, 2, 1, *of_second, 3, *of_first)
    return W.reshape(blocks, rows, -1)


def truncated(U: Tensor, V: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best product of a lower rank, balanced; see above."""
    dtype = U.dtype
    Q, T = torch.linalg.qr(U.double())
    P, S = torch.linalg.qr(V.double().mT)
    A, values, Bh = torch.linalg.svd(T @ S.mT, full_matrices=False)
    root = values[..., :rank].sqrt()
    left = Q @ A[..., :rank] * root.unsqueeze(-2)
    right = root.unsqueeze(-1) * Bh[..., :rank, :] @ P.mT
    return left.to(dtype), right.to(dtype)


def extended(U: Tensor, V: Tensor, W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors with the leading part of what their product lacks of W, up to a higher rank."""
    more = rank - U.shape[-1]
    if more <= 0:
        return U, V
    A, values, Bh = torch.linalg.svd(W.double() - U.double() @ V.double(), full_matrices=False)
    root = values[..., :more].sqrt()
    left = (A[..., :more] * root.unsqueeze(-2)).to(U.dtype)
    right = (root.unsqueeze(-1) * Bh[..., :more, :]).to(V.dtype)
    return torch.cat([U, left], -1), torch.cat([V, right], -2)


def rebuilt(stages: Sequence[Any], U: Tensor, V: Tensor) -> nn.Sequential:
    """A chain like another one, with other factors U (k, m, r) and V (k, r, n)."""
    first, second = stages
    blocks, groups, rank = _groups(first), _groups(second), V.shape[-2]
    inner = blocks * rank
    thin = [_like(first, None, inner), _like(second, inner, None)]
    kernel = U.shape[1] // (_matrix(second).shape[0] // groups)
    W = U.reshape(groups, blocks // groups, -1, kernel, rank).permute(0, 2, 1, 4, 3)
    with torch.no_grad():
        for stage, weight, old in zip(thin, (V, W), stages, strict=True):
            stage.weight.copy_(weight.reshape(stage.weight.shape))
            stage.weight.requires_grad_(old.weight.requires_grad)
            if old.bias is not None:
                stage.bias = old.bias
    return nn.Sequential(*thin)


def _like(stage: Any, inputs: int | None, outputs: int | None) -> Any:
    """A layer like another one, with another number of inputs or outputs and no weights."""
    to = {"device": stage.weight.device, "dtype": stage.weight.dtype}
    bias, groups = stage.bias is not None, _groups(stage)
    if isinstance(stage, nn.Conv1d | nn.Conv2d):
        return type(stage)(
            inputs or stage.in_channels,
            outputs or stage.out_channels,
            stage.kernel_size,  # type: ignore[arg-type]
            stage.stride,  # type: ignore[arg-type]
            stage.padding,  # type: ignore[arg-type]
            stage.dilation,  # type: ignore[arg-type]
            groups,
            bias,
            stage.padding_mode,
            **to,
        )
    shape = _matrix(stage).shape
    inputs, outputs = inputs or shape[1] * groups, outputs or shape[0]
    if groups > 1:
        return GroupedLinear(inputs, outputs, groups, bias).to(**to)
    return nn.Linear(inputs, outputs, bias, **to)


def _matrix(stage: Any) -> Tensor:
    """The weight of a stage as (outputs, inputs of a group, *kernel)."""
    weight: Tensor = stage.weight.detach()
    return weight.flatten(0, 1) if isinstance(stage, GroupedLinear) else weight


def _groups(stage: Any) -> int:
    return int(getattr(stage, "groups", 1))


def _kernel(stage: Any) -> tuple[int, ...]:
    return tuple(getattr(stage, "kernel_size", ()))


def _product(sizes: Any) -> int:
    found = 1
    for size in sizes:
        found *= int(size)
    return found
