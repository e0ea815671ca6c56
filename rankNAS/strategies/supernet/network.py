"""A super-net over ranks: one network that computes with several candidates a layer at once.

Every candidate of a layer is a truncation of the layer's one current weight. The layer's output is
the sum of the candidates' outputs, weighted by their probabilities; as a convolution is linear in
its weight, that equals one convolution with the weighted sum of the candidates' multiplied-out
weights,

    sum_j p_j conv(x, W_j) = conv(x, sum_j p_j W_j),

which is what is computed. In the same way a layer at a single rank computes with the product of
its factors, and gradients reach the factors through the product.

Batch norms normalise by the statistics of the batch, in both networks, and never update their
running averages: those of the dense network fit no mixture of ranks, and nothing here reads them.
Dropout is off.

Notation: J candidates of a layer, K budgets, g groups of a layer, m inner features.

References:
    Xiao et al., AAAI 2023 (HALOC): rank selection as differentiable architecture search.
    Gao et al., NAACL 2024 (ARS): the logarithmic penalty, and the alignment of masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.compression.factors import LayerFactors
from rankNAS.copies import copied
from rankNAS.deadline import check_time
from rankNAS.decompositions import OPERATORS, LayerShape
from rankNAS.decompositions.base import balanced
from rankNAS.decompositions.layer_view import LayerView
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.strategies.supernet.losses import Maps
from rankNAS.trees import Inputs

__all__ = ["FactoredWeight", "SuperNet", "multiply"]


@final
class SuperNet:
    """A copy of a model whose searched layers take their weights from outside.

    Args:
        model: The dense model; it is not changed.
        space: The searched layers, each with its candidates alone.
    """

    def __init__(self, model: nn.Module, space: SearchSpace) -> None:
        self.space = space
        self.network = copied(model).requires_grad_(False).eval()
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.train()
                module.momentum = 0.0  # the running averages keep their values
        self._original = {n: p.clone() for n, p in self.network.named_parameters()}
        self._maps: Maps = {}
        self._views = {n: LayerView(self.network, x.paths) for n, x in space.layers.items()}
        for name in space.layers:
            self.network.get_submodule(name).register_forward_hook(self._recorder(name))

    def decompose(self) -> Factorisation:
        """The current weights' factors, optimal in the norm of the weights themselves."""
        return factorise(self.network, self.space, on_layer=lambda done, total: check_time())

    def truncations(self, factors: Factorisation) -> dict[str, Tensor]:  # each (J, *weight)
        """By layer, the multiplied-out weights of its candidates, outputs first."""
        return {
            name: torch.stack([found.folded(c)[0] for c in found.layer.choices])
            for name, found in factors.layers.items()
        }

    def forward(self, x: Inputs | Tensor, weights: Mapping[str, Tensor]) -> tuple[Any, Maps]:
        """The network's output, and the feature maps of the searched layers.

        Args:
            x: The network's arguments for a batch.
            weights: By layer, outputs first.
        """
        return self._call(x, {f"{n}.weight": self._views[n].turned(w) for n, w in weights.items()})

    @torch.no_grad()
    def original(self, x: Inputs | Tensor) -> Maps:
        """The feature maps of the dense network as it was given."""
        return self._call(x, self._original)[1]

    def others(self) -> list[Tensor]:
        """All parameters but the weights of the searched layers."""
        searched = {id(view.parameter) for view in self._views.values()}
        return [p for p in self.network.parameters() if id(p) not in searched]

    def absorb(self, weights: Mapping[str, Tensor]) -> None:
        """Make weights, outputs first, the current ones of their layers."""
        for name, weight in weights.items():
            self._views[name].write(weight)

    def _call(self, x: Inputs | Tensor, parameters: dict[str, Tensor]) -> tuple[Any, Maps]:
        self._maps = {}
        given = Inputs.of(x).copied()  # a pass may change its inputs
        output = functional_call(self.network, parameters, given.args, given.kwargs)
        maps, self._maps = self._maps, {}
        return output, maps

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._maps.setdefault(name, []).append(output)

        return record


@final
@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """A layer at one rank: trainable factors, multiplied out on demand.

    Args:
        shape: The layer's shape.
        stages: The chain that replaces it.
        weights: The chain's weights, leaves that require gradients.
    """

    shape: LayerShape
    stages: tuple[LayerShape, ...]
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, found: LayerFactors, choice: Choice) -> FactoredWeight:
        """The factors of a choice, balanced as in the compressed network; dense has only one."""
        shape = found.layer.shape
        stages: tuple[LayerShape, ...] = (shape,)
        folded: Sequence[Tensor] = [shape.fold(found.weight)]
        if choice != DENSE:
            stages = OPERATORS[choice.operator].stages(shape, choice.rank)
            folded = balanced(stages, found.factors[choice.operator].stage_weights(choice.rank))
        dtype = found.weight.dtype
        leaves = tuple(w.detach().to(dtype, copy=True).requires_grad_() for w in folded)
        return cls(shape, stages, leaves)

    def product(self) -> Tensor:
        """The weight of the layer that the chain equals, outputs first."""
        return self.shape.unfold(multiply(self.stages, self.weights, self.shape.groups))


def multiply(
    stages: Sequence[LayerShape], weights: Sequence[Tensor], groups: int
) -> Tensor:  # (g, o, c, kh, kw)
    """The weight of the single layer that a chain of layers equals.

    Args:
        stages: Shapes of the chain; along each axis at most one of the kernels exceeds 1.
        weights: One a stage, shaped in any way that `LayerShape.fold` takes.
        groups: g, a divisor of the groups of every stage.
    """
    result: Tensor | None = None
    for stage, weight in zip(stages, weights, strict=True):
        B = _by_group(stage.fold(weight), groups)
        if result is None:
            result = B
            continue
        kernel = [b * a for b, a in zip(B.shape[3:], result.shape[3:], strict=True)]
        AB = torch.einsum("gomij,gmckl->gocikjl", B, result)
        result = AB.reshape(*AB.shape[:3], *kernel)
    assert result is not None
    return result


def _by_group(weight: Tensor, groups: int) -> Tensor:  # (g k, o, c, kh, kw) -> (g, k o, k c, …)
    """Blocks of k channel groups as one block-diagonal weight each."""
    k = weight.shape[0] // groups
    if k == 1:
        return weight
    blocks = weight.unflatten(0, (groups, k))
    eye = torch.eye(k, dtype=weight.dtype, device=weight.device)
    dense = torch.einsum("gkocij,kl->gkolcij", blocks, eye)
    return dense.flatten(3, 4).flatten(1, 2)
