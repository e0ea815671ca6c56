"""Base classes of operators: decompositions of one layer at every rank at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from rankNAS.decompositions.norms import Target
from rankNAS.decompositions.shapes import Cost, LayerShape

__all__ = ["ALLOWANCE", "Factors", "Operator", "Rank", "Wanted"]

Rank = tuple[int, ...]
#: From estimates below the errors of some ranks, the ranks that are worth their factors.
Wanted = Callable[[Mapping[Rank, float]], Collection[Rank]]
#: Estimates from the tails of a matrix or of its blocks are multiplied by it. The least ratio of
#: an error to its tail in the layers of a trained ResNet-20 was 0.37.
ALLOWANCE = 0.3
BALANCING_SWEEPS = 10  # a middle layer has two sides, so balancing iterates


class Factors(ABC):
    """The factors of one layer; every rank is a slice of them. Read-only after construction."""

    shape: LayerShape
    operator: Operator

    @abstractmethod
    def error(self, rank: Rank) -> float:
        """Relative error in the norm, ||H (W - What) C^1/2||_F^2 / ||H W C^1/2||_F^2."""

    @abstractmethod
    def stage_weights(self, rank: Rank) -> Sequence[Tensor]:
        """The weights of the chain at a rank, folded (g, o, n) as in the stages' shapes."""

    @abstractmethod
    def weight(self, rank: Rank) -> Tensor:
        """The approximated weight What (g, o, n): the product of the chain."""

    def restrict(self, ranks: Iterable[Rank]) -> Factors:
        """The factors of a subset of the ranks; data of the other ranks may be freed."""
        return self

    def slim(self, dtype: torch.dtype) -> Factors:
        """The factors in a floating-point type, without what only their errors need."""
        return self

    @final
    def truncate(
        self,
        rank: Rank,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        trainable: bool = True,
    ) -> nn.Module:
        """The decomposed layer at a rank: a chain of ordinary modules with copied weights.

        Their type is `dtype`, or else that of `bias`, or else float32. `balanced` is needed only
        for training.
        """
        module = self.operator.build(self.shape, rank)
        stages = self.operator.stages(self.shape, rank)
        weights = self.stage_weights(rank)
        fill(module, stages, balanced(stages, weights) if trainable else weights, bias, dtype)
        return module


class Operator(ABC):
    """A decomposition of a layer. Stateless: equal arguments give equal results.

    `stages` alone defines cost and module. `families` lists the ranks that a search space may
    offer.

    Example:
        >>> from rankNAS.decompositions import Svd
        >>> shape = LayerShape(inputs=64, outputs=32, calls=((1,),))
        >>> Svd().cost(shape, (8,)).macs  # 8 x (64 + 32)
        768
        >>> Svd().build(shape, (8,))[0].weight.shape
        torch.Size([8, 64])
    """

    name: str

    @abstractmethod
    def refuses(self, shape: LayerShape) -> str | None:
        """The reason why the operator cannot decompose a layer; None if it can."""

    @abstractmethod
    def families(self, shape: LayerShape, multiple_of: int = 1) -> list[list[Rank]]:
        """All ranks, grouped into lists of increasing cost and accuracy.

        Args:
            shape: The layer's shape.
            multiple_of: Ranks are multiples of this number; numbers of groups are exempt.
        """

    @abstractmethod
    def stages(self, shape: LayerShape, rank: Rank) -> tuple[LayerShape, ...]:
        """The chain of layers that replaces a layer at a rank."""

    @abstractmethod
    def factorise(
        self,
        shape: LayerShape,
        target: Target,
        ranks: Iterable[Rank],
        wanted: Wanted | None = None,
    ) -> Factors:
        """The factors for all the given ranks.

        Args:
            shape: The layer's shape.
            target: Its weight and the error norm.
            ranks: The ranks that will be requested.
            wanted: Asked before the expensive part, with estimates for some of the ranks; those
                that it does not return may have no factors. None wants all.
        """

    @final
    def cost(self, shape: LayerShape, rank: Rank) -> Cost:
        """Exact cost at a rank, from shapes alone."""
        return sum((s.cost() for s in self.stages(shape, rank)), Cost(0, 0, 0))

    @final
    def build(
        self, shape: LayerShape, rank: Rank, device: torch.device | str = "meta"
    ) -> nn.Module:
        """The decomposed layer at a rank, uninitialised."""
        return nn.Sequential(*(s.build(device) for s in self.stages(shape, rank)))


def balanced(stages: Sequence[LayerShape], weights: Sequence[Tensor]) -> list[Tensor]:
    """The same chain, with the scale of each inner feature shared equally by adjacent layers.

    The product is unchanged, but training improves: gradients of factors with very different norms
    are badly scaled, and the usual learning rates diverge.
    """
    result = list(weights)
    pairs = list(enumerate(zip(stages[:-1], stages[1:], strict=True)))
    for i, (before, after) in pairs * (1 if len(pairs) == 1 else BALANCING_SWEEPS):
        produced = result[i].reshape(before.outputs, -1)
        taken = result[i + 1].unflatten(2, (after.inputs // after.groups, -1))  # (g, o, c, k)
        from_norm, to_norm = produced.norm(dim=1), taken.norm(dim=(1, 3)).flatten()
        scale = (to_norm / from_norm).sqrt()
        scale = torch.where((from_norm > 0) & (to_norm > 0), scale, torch.ones_like(scale))
        result[i] = (produced * scale.unsqueeze(1)).reshape(result[i].shape)
        by_group = scale.reshape(after.groups, 1, -1, 1)
        result[i + 1] = (taken / by_group).reshape(result[i + 1].shape)
    return result


def fill(
    module: nn.Module,
    stages: Sequence[LayerShape],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Assign weights to a chain built on the meta device, in place."""
    dtype = dtype or (torch.float32 if bias is None else bias.dtype)
    for child, shape, weight in zip(module.children(), stages, weights, strict=True):
        child.weight = nn.Parameter(shape.unfold(weight).to(dtype, copy=True).contiguous())
        if shape.bias:
            assert bias is not None
            child.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
