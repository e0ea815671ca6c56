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

from rankNAS.decompositions.shapes import GroupedLinear
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
        root: A square root of the second moments of the inputs (k, n, n), lower triangular; only
            for chains that are `whitenable`. None truncates the plain weight.
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


def whitenable(stages: Sequence[Any]) -> bool:
    """Whether a chain has two factors, of which the first one reads patches of its inputs."""
    first = stages[0]
    if len(stages) != 2 or isinstance(first, nn.Linear | GroupedLinear):
        return len(stages) == 2
    plain = isinstance(first, nn.Conv2d) and first.padding_mode == "zeros"
    return plain and not isinstance(first.padding, str)


class Moment:
    """The second moment of what the first factor of a chain reads, summed over batches.

    Args:
        first: A linear layer or a two-dimensional convolution that is `whitenable`, with k groups.
    """

    def __init__(self, first: Any) -> None:
        self.first, self.blocks = first, int(getattr(first, "groups", 1))
        n = first.weight.flatten(2).shape[2] if self._is_grouped else first.weight[0].numel()
        self.total = torch.zeros(self.blocks, n, n, device=first.weight.device)
        self.count = 0

    @property
    def _is_grouped(self) -> bool:
        return isinstance(self.first, GroupedLinear)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take an input of the layer into account."""
        first, x = self.first, x.float()
        if isinstance(first, nn.Conv2d):
            x = functional.unfold(
                x,
                first.kernel_size,
                dilation=first.dilation,
                padding=first.padding,  # type: ignore[arg-type]
                stride=first.stride,
            ).transpose(1, 2)
        rows = x.reshape(-1, self.blocks, self.total.shape[1]).transpose(0, 1)
        self.total += rows.mT @ rows
        self.count += rows.shape[1]

    def root(self) -> Tensor:
        """The Cholesky factors L (k, n, n) of the mean moments C = L L^T, with a small ridge."""
        C = self.total.double() / max(self.count, 1)
        ridge = RIDGE * C.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        root: Tensor = torch.linalg.cholesky(
            C + ridge[:, None, None] * torch.eye(C.shape[1]).to(C)
        )
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
