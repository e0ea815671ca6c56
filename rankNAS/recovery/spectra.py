"""The dense layer that a chain stands for, as matrices whose ranks are those of the chain.

A chain of two factors has one matrix in each block, as in `rankNAS.recovery.restart`. A Tucker-2
chain has two: the unfoldings of the kernel along its inputs and its outputs. Matrices that are
multiplied by a square root of their inputs' second moment (whitening) have singular values that
say what each direction contributes to the outputs.

References:
    De Lathauwer, De Moor and Vandewalle, SIAM Journal on Matrix Analysis 2000: the truncated
    higher-order singular value decomposition.
    Wang et al., ICLR 2025, arXiv 2403.07378 (SVD-LLM): whitening by a Cholesky factor.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.recovery.restart import blocks_of, dense_blocks, rebuilt, truncated

__all__ = ["Moment", "truncated_chain", "unfoldings", "whitenable"]

RIDGE = 1e-6  # of the mean diagonal of a second moment, so that it can be inverted


def unfoldings(stages: Sequence[Any], dense: Any) -> list[tuple[Tensor, int]]:
    """The matrices (k, m, n) of a dense layer's weight, each with its rank in a chain.

    Gradients flow to the weight.

    Args:
        stages: The two or three stages of the chain.
        dense: The dense layer.
    """
    if len(stages) == 2:
        return [(dense_blocks(stages, dense), blocks_of(stages)[1].shape[1])]
    W = dense.weight
    first, last = W.transpose(0, 1).flatten(1), W.flatten(1)
    return [(first[None], stages[0].weight.shape[0]), (last[None], stages[2].weight.shape[1])]


@torch.no_grad()
def truncated_chain(
    stages: Sequence[Any], dense: Any, root: Tensor | None = None
) -> nn.Sequential:
    """A chain like another one with the leading part of a dense layer's weight.

    Args:
        stages: The stages of the chain, which give the ranks.
        dense: The dense layer.
        root: A square root of the second moment of the inputs (n, n), lower triangular; only for
            layers that are `whitenable`. None truncates the plain weight.
    """
    if len(stages) == 3:
        chain = _tucker(stages, dense)
    else:
        W, rank = dense_blocks(stages, dense).double(), blocks_of(stages)[1].shape[1]
        scaled = W if root is None else W @ root.to(W)
        identity = torch.eye(W.shape[2], dtype=W.dtype, device=W.device).expand(len(W), -1, -1)
        U, V = truncated(scaled, identity, rank)
        if root is not None:  # V root^-1
            V = torch.linalg.solve_triangular(root.to(V), V, upper=False, left=False)
        dtype = dense.weight.dtype
        chain = rebuilt(stages, U.to(dtype), V.to(dtype))
    if dense.bias is not None:
        chain[-1].bias = nn.Parameter(dense.bias.detach().clone())
    return chain


def whitenable(stages: Sequence[Any], dense: Any) -> bool:
    """Whether the first stage reads the same patches as a dense layer without groups."""
    if len(stages) != 2 or getattr(dense, "groups", 1) != 1:
        return False
    first = stages[0]
    if isinstance(dense, nn.Linear):
        return isinstance(first, nn.Linear)
    plain = isinstance(dense, nn.Conv2d) and dense.padding_mode == "zeros"
    plain = plain and not isinstance(dense.padding, str)
    return plain and first.groups == 1 and first.kernel_size == dense.kernel_size


class Moment:
    """The second moment of a layer's inputs, summed over batches.

    Args:
        dense: A linear layer or a two-dimensional convolution that is `whitenable`.
    """

    def __init__(self, dense: Any) -> None:
        self.dense = dense
        n = dense.weight.flatten(1).shape[1]
        self.total = torch.zeros(n, n, device=dense.weight.device)
        self.count = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take an input of the layer into account."""
        dense, x = self.dense, x.float()
        if isinstance(dense, nn.Conv2d):
            x = functional.unfold(
                x,
                dense.kernel_size,
                dilation=dense.dilation,
                padding=dense.padding,  # type: ignore[arg-type]
                stride=dense.stride,
            ).transpose(1, 2)
        rows = x.reshape(-1, x.shape[-1])
        self.total += rows.mT @ rows
        self.count += len(rows)

    def root(self) -> Tensor:
        """The Cholesky factor L (n, n) of the mean moment C = L L^T, with a small ridge."""
        C = self.total.double() / max(self.count, 1)
        ridge = RIDGE * C.diagonal().mean().clamp_min(1e-30)
        root: Tensor = torch.linalg.cholesky(C + ridge * torch.eye(len(C)).to(C))
        return root


def _tucker(stages: Sequence[Any], dense: Any) -> nn.Sequential:
    """The truncated higher-order singular value decomposition."""
    W = dense.weight.detach().double()
    p, q = stages[0].weight.shape[0], stages[2].weight.shape[1]
    A = torch.linalg.svd(W.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :p]
    B = torch.linalg.svd(W.flatten(1), full_matrices=False)[0][:, :q]
    core = torch.einsum("oc...,cp,oq->qp...", W, A, B)
    thin = []
    for stage, weight in zip(stages, (A.T, core, B), strict=True):
        module = copy.deepcopy(stage)
        module.weight = nn.Parameter(weight.reshape(stage.weight.shape).to(dense.weight.dtype))
        thin.append(module)
    return nn.Sequential(*thin)
