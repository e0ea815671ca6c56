"""Weight decay of the product of a layer's factors, instead of the factors apart.

Decay of U and V apart is a penalty on the nuclear norm of U V: it lowers the rank of what it
shrinks. Decay of the product, 1/2 |U V|_F^2, shrinks the layer as weight decay shrinks a dense
one. Its gradients are U (V V^T) and (U^T U) V, so the product is never formed.

References:
    Khodak, Tenenholtz, Mackey and Fusi, ICLR 2021, arXiv 2105.01029: Frobenius decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from rankNAS.decompositions.shapes import GroupedLinear
from rankNAS.recovery.parts import Part

__all__ = ["Chain", "ProductDecay", "chains", "is_product", "product_gradients"]

LAYERS = (nn.Linear, GroupedLinear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Chain:
    """A layer of two or three linear stages.

    Args:
        path: Its path in the network.
        stages: The stages, the first one first.
    """

    path: str
    stages: tuple[Any, ...]

    @property
    def weights(self) -> list[Tensor]:
        """The weights of the stages."""
        return [stage.weight for stage in self.stages]


def chains(network: nn.Module) -> list[Chain]:
    """The chains of two or three linear layers, with nothing in between, of a network."""
    found = []
    for path, module in network.named_modules():
        stages = tuple(module) if isinstance(module, nn.Sequential) else ()
        if len(stages) in (2, 3) and all(isinstance(s, LAYERS) for s in stages):
            if all(s.bias is None for s in stages[:-1]):
                found.append(Chain(path, stages))
    return found


@final
class ProductDecay(Part):
    """Decay of the products of factors; other weights are left to the optimiser.

    Args:
        network: The network.
        decay: The coefficient of 1/2 |U V|_F^2.
        optimizer: ``sgd`` adds the decay to the gradients; ``adamw`` decouples it from them.

    References:
        Loshchilov and Hutter, ICLR 2019: decoupled weight decay.
    """

    def __init__(self, network: nn.Module, decay: float, optimizer: str) -> None:
        self.decay, self.optimizer = decay, optimizer
        self.chains = [c for c in chains(network) if is_product(c.stages)]

    def exempt(self) -> Sequence[Tensor]:
        return [weight for chain in self.chains for weight in chain.weights]

    @torch.no_grad()
    def before_step(self, rate: float) -> None:
        for chain in self.chains:
            if all(weight.grad is None for weight in chain.weights):
                continue
            gradients = product_gradients(chain.stages)
            for weight, gradient in zip(chain.weights, gradients, strict=True):
                if weight.grad is None:  # frozen
                    continue
                if self.optimizer == "adamw":
                    weight.sub_(gradient, alpha=rate * self.decay)
                else:
                    weight.grad.add_(gradient, alpha=self.decay)


def is_product(stages: Sequence[Any]) -> bool:
    """Whether a chain has the form of a decomposed layer, whose weight is a product."""
    return _of_two(stages) if len(stages) == 2 else len(stages) == 3 and _of_three(stages)


@torch.no_grad()
def product_gradients(stages: Sequence[Any]) -> list[Tensor]:
    """The gradients of 1/2 |W|_F^2 for the weight W of the layer that a chain equals.

    Args:
        stages: Linear layers or convolutions, of which `is_product` is true.

    Returns:
        One gradient for each weight, in its shape.
    """
    if len(stages) == 2:
        return _two(*stages)
    A, core, B = map(_matrix, stages)
    pairs = zip(_three(A, core, B), stages, strict=True)
    return [gradient.reshape(stage.weight.shape) for gradient, stage in pairs]


def _of_two(stages: Sequence[Any]) -> bool:
    first, second = map(_groups, stages)
    kernels = zip(_kernel(stages[0]), _kernel(stages[1]), strict=False)
    same = _matrix(stages[0]).dim() == _matrix(stages[1]).dim()
    return same and first % second == 0 and all(min(pair) == 1 for pair in kernels)


def _of_three(stages: Sequence[Any]) -> bool:
    outer = [*_kernel(stages[0]), *_kernel(stages[2])]
    same = len({_matrix(stage).dim() for stage in stages}) == 1
    return same and all(_groups(s) == 1 for s in stages) and all(size == 1 for size in outer)


def _two(first: Any, second: Any) -> list[Tensor]:
    """Of W = U V, block by block: the first stage has g k groups of inputs, the second has g.

    V is (g k, r, n) and U is (g k, r, o) with the kernel of the second stage in o.
    """
    V, W2 = _matrix(first), _matrix(second)
    blocks, g = _groups(first), _groups(second)
    V = V.reshape(blocks, V.shape[0] // blocks, -1)
    U = W2.reshape(g, W2.shape[0] // g, blocks // g, V.shape[1], -1)  # (g, o, k, r, kernel)
    shape = U.shape
    U = U.permute(0, 2, 3, 1, 4).reshape(blocks, V.shape[1], -1)
    dU, dV = (V @ V.mT) @ U, (U @ U.mT) @ V
    dU = dU.reshape(g, shape[2], shape[3], shape[1], shape[4]).permute(0, 3, 1, 2, 4)
    return [dV.reshape(first.weight.shape), dU.reshape(second.weight.shape)]


def _three(A: Tensor, core: Tensor, B: Tensor) -> list[Tensor]:
    """Of W = B core A (Tucker-2): A is (p, c), the core (q, p, k) and B (o, q)."""
    A, B, core = A.flatten(1), B.flatten(1), core.reshape(*core.shape[:2], -1)
    G, H = A @ A.T, B.T @ B
    right = torch.einsum("qpk,ps->qsk", core, G)
    left = torch.einsum("qt,tpk->qpk", H, core)
    dA = torch.einsum("qpk,qsk->ps", left, core) @ A
    dB = B @ torch.einsum("qpk,tpk->qt", right, core)
    dcore = torch.einsum("qt,tpk->qpk", H, right)
    return [dA, dcore, dB]


def _matrix(stage: Any) -> Tensor:
    """The weight of a stage as (outputs, inputs of a group, *kernel)."""
    weight: Tensor = stage.weight
    return weight.flatten(0, 1) if isinstance(stage, GroupedLinear) else weight


def _groups(stage: Any) -> int:
    return int(getattr(stage, "groups", 1))


def _kernel(stage: Any) -> tuple[int, ...]:
    return tuple(getattr(stage, "kernel_size", ()))
