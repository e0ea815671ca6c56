"""From a model and an allocation to a network: factorise once, slice for every allocation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.batch_norm import has_batch_norm
from rankNAS.decompositions import (
    OPERATORS,
    ErrorNorm,
    Factors,
    NormName,
    Statistics,
    Target,
    make_norm,
)
from rankNAS.decompositions.shapes import LayerShape, is_hf_conv1d
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.attention import separate_attention
from rankNAS.search_spaces.base import Layer, SearchSpace

LIGHT = 1 << 24  # bytes of weights; a process that has loaded PyTorch takes many times as much
Select = Callable[[Layer, Sequence[float]], Sequence[Choice]]

__all__ = [
    "Factorisation",
    "LayerFactors",
    "changeable_copy",
    "factorise",
    "exceeds_memory_limit",
    "shared_copy",
    "skeleton",
]


@dataclass(frozen=True)
class LayerFactors:
    """One layer's factors by operator, its dense weight and its metric.

    ``outputs`` (g, o, o) is the covariance of the layer's outputs: W C W^T, with C the identity in
    the metric ``weight``.
    """

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    norm: ErrorNorm
    factors: dict[str, Factors]
    outputs: Tensor

    def error(self, choice: Choice) -> float:
        """Relative error of a choice in the metric; dense is 0."""
        return 0.0 if choice == DENSE else self.factors[choice.operator].error(choice.rank)

    def errors(self) -> list[float]:
        """Relative error of each choice of the layer."""
        return [self.error(choice) for choice in self.layer.choices]

    def restrict(self, keep: Sequence[Choice]) -> LayerFactors:
        """Only some of the choices, in the memory that these need."""
        layer = self.layer.restrict(keep)
        factors = {
            name: self.factors[name].restrict(ranks)
            for name, ranks in _ranks(layer.choices).items()
        }
        return replace(self, layer=layer, factors=factors)

    def folded(self, choice: Choice) -> tuple[Tensor, Tensor | None]:
        """Weight (shaped as by `LayerShape.unfold`) and bias that a choice multiplies out to."""
        if choice == DENSE:
            return self.layer.shape.unfold(self.weight), self.bias
        approximation = self.factors[choice.operator].weight(choice.rank)
        return (
            self.layer.shape.unfold(approximation).to(self.weight.dtype),
            self._corrected_bias(approximation),
        )

    @torch.no_grad()
    def write(self, model: nn.Module, choice: Choice) -> None:
        """Give the layer of a model, in place, the weight that a choice multiplies out to.

        What `changeable_copy` makes may remember the choice instead of the weight.
        """
        weight, bias = self.folded(choice)
        for path in self.layer.paths:
            module: Any = model.get_submodule(path)
            if parametrize.is_parametrized(module, "weight"):
                module.parametrizations.weight[0].chosen = self, choice
            else:
                module.weight.copy_(weight.T if is_hf_conv1d(module) else weight)
            if bias is not None:
                module.bias.copy_(bias)

    def module(self, choice: Choice) -> nn.Module:
        """The decomposed layer, an ordinary chain of modules."""
        bias = self.bias_of(choice)
        return self.factors[choice.operator].truncate(choice.rank, bias, self.weight.dtype)

    def bias_of(self, choice: Choice) -> Tensor | None:
        """The bias of the decomposed layer."""
        if self.bias is None or self.norm.mean is None:
            return self.bias
        return self._corrected_bias(self.factors[choice.operator].weight(choice.rank))

    def _corrected_bias(self, approximation: Tensor) -> Tensor | None:
        """The bias b + (W - What) E[x], which takes out the mean of the error."""
        if self.bias is None or self.norm.mean is None:
            return self.bias
        D = self.weight.double().flatten(2) - approximation
        shift = (D @ self.norm.mean.unsqueeze(-1)).flatten()
        return (self.bias.double() + shift).to(self.bias.dtype)


@dataclass(frozen=True)
class Factorisation:
    """A model's factors, shared read-only by all allocations.

    Args:
        model: The dense model, with separate attention projections.
        space: Its space.
        layers: Name to factors.
    """

    model: nn.Module
    space: SearchSpace
    layers: dict[str, LayerFactors]

    def errors(self) -> dict[str, list[float]]:
        """Relative error of each choice of each layer, in the order of the space."""
        return {name: found.errors() for name, found in self.layers.items()}

    def materialise(self, allocation: Mapping[str, Choice]) -> nn.Module:
        """The compressed network: a copy of the model with ordinary modules in place.

        Raises:
            UsageError: The allocation does not belong to the space.
        """
        self.space.check(allocation)
        modules = {
            name: self.layers[name].module(choice)
            for name, choice in allocation.items()
            if choice != DENSE
        }
        # What is replaced need not be copied first.
        memo = {id(self.model.get_submodule(n)): nn.Identity() for n in modules}
        network = copy.deepcopy(self.model, dict(memo))
        for name, module in modules.items():
            replace_module(network, self.space.layers[name].paths, module)
        return network

    def made_when_called(self, allocation: Mapping[str, Choice]) -> nn.Module:
        """The compressed network for forward passes alone, in the memory of its largest layer.

        A decomposed layer is made when it is called, and gone after that. All other parameters,
        and the factors, are read where they lie.

        Raises:
            UsageError: The allocation does not belong to the space.
        """
        self.space.check(allocation)
        network = shared_copy(self.model)
        for name, choice in allocation.items():
            if choice != DENSE:
                module = _LazyFactorised(self.layers[name], choice)
                replace_module(network, self.space.layers[name].paths, module)
        return network


class _LazyFactorised(nn.Module):
    """A decomposed layer that exists while it is called."""

    def __init__(self, layer: LayerFactors, choice: Choice) -> None:
        super().__init__()
        self._factors, self._rank = layer.factors[choice.operator], choice.rank
        self._bias, self._dtype = layer.bias_of(choice), layer.weight.dtype

    def forward(self, x: Tensor) -> Any:
        module = self._factors.truncate(self._rank, self._bias, self._dtype, trainable=False)
        return module(x)


def factorise(
    model: nn.Module,
    space: SearchSpace,
    statistics: Mapping[str, Statistics] | None = None,
    *,
    norm: NormName = "weight",
    centred: bool | None = None,
    select: Select | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Factorisation:
    """Factorise every layer of a space once, for all its choices.

    Args:
        model: The model that was compiled.
        space: Its space.
        statistics: From `calibrate`; not needed for ``norm="weight"``.
        norm: The norm in which truncations are optimal.
        centred: Optimise the variance of the error and correct its mean: through the bias, or,
            in layers without one, through a following batch norm that is re-estimated. By default
            on for layers with a bias, and for all if the model has batch norms.
        select: Given a layer and the relative error of each of its choices, the choices to keep;
            the factors of the others are dropped at once, and they leave the space.
        on_layer: Called with (layers done, layers in all).
    """
    model = separate_attention(model)
    centred_all = has_batch_norm(model) if centred is None else centred
    layers = {}
    for done, (name, layer) in enumerate(space.layers.items(), 1):
        module = model.get_submodule(name)
        has_bias = module.bias is not None
        layer_centred = centred_all or (centred is None and has_bias)
        layer_norm = make_norm(norm, (statistics or {}).get(name), centred=layer_centred)
        found = _factorise_layer(layer, module, layer_norm)
        if select is not None:
            found = found.restrict(select(layer, found.errors()))
        layers[name] = found
        if on_layer is not None:
            on_layer(done, len(space.layers))
    space = replace(space, layers={name: found.layer for name, found in layers.items()})
    return Factorisation(model, space, layers)


def _factorise_layer(layer: Layer, module: nn.Module, norm: ErrorNorm) -> LayerFactors:
    shape = layer.shape
    weight = shape.fold(_oriented(module))
    target = Target(weight, norm)
    factors = {
        name: OPERATORS[name].factorise(shape, target, ranks)
        for name, ranks in _ranks(layer.choices).items()
    }
    bias: Any = module.bias
    bias = None if bias is None else bias.detach()
    # C is as large as all factors together, and no longer needed.
    outputs = target.WC @ target.W.mT
    return LayerFactors(layer, weight, bias, replace(norm, C=None), factors, outputs)


def _ranks(choices: Iterable[Choice]) -> dict[str, list[tuple[int, ...]]]:
    ranks: dict[str, list[tuple[int, ...]]] = {}
    for choice in choices:
        if choice != DENSE:
            ranks.setdefault(choice.operator, []).append(choice.rank)
    return ranks


def _oriented(module: nn.Module) -> Tensor:
    """The weight with outputs first; Hugging Face's ``Conv1D`` keeps them last."""
    own: Any = module.weight
    weight: Tensor = own.detach()
    return weight.T if is_hf_conv1d(module) else weight


def shared_copy(model: nn.Module, own: Iterable[Tensor] = ()) -> nn.Module:
    """A copy whose parameters lie where those of the model do, except some; not to be changed.

    Buffers, such as the statistics of batch norms, are its own.

    Args:
        model: The model.
        own: Parameters of the model that the copy gets its own of.
    """
    except_for = set(map(id, own))
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), p.requires_grad)
        for p in model.parameters()
        if id(p) not in except_for
    }
    return copy.deepcopy(model, memo)


def exceeds_memory_limit(model: nn.Module) -> bool:
    """Whether the weights take so much memory that they should not be copied without need."""
    return sum(p.nbytes for p in model.parameters()) > LIGHT


def changeable_copy(model: nn.Module, layers: Mapping[str, LayerFactors]) -> nn.Module:
    """A copy whose layers `LayerFactors.write` can change, without a copy of heavy weights.

    In a heavy model, a layer's weight is multiplied out whenever it is read, and gone after that;
    all other parameters, and the factors, are read where they lie.
    """
    if not exceeds_memory_limit(model):
        return copy.deepcopy(model)
    paths = {path for found in layers.values() for path in found.layer.paths}
    biases = [getattr(model.get_submodule(path), "bias", None) for path in paths]
    network = shared_copy(model, own=[bias for bias in biases if bias is not None])
    for module in {network.get_submodule(path) for path in paths}:
        parametrize.register_parametrization(module, "weight", _MultipliedOut(module), unsafe=True)
    return network


class _MultipliedOut(nn.Module):
    """The weight that a layer's choice multiplies out to, in place of the dense one."""

    chosen: tuple[LayerFactors, Choice] | None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.chosen, self._inputs_first = None, is_hf_conv1d(module)

    def forward(self, dense: Tensor) -> Tensor:
        if self.chosen is None:
            return dense
        factors, choice = self.chosen
        weight, _ = factors.folded(choice)
        return torch.empty_like(dense).copy_(weight.T if self._inputs_first else weight)


def skeleton(model: nn.Module, allocation: Mapping[str, Choice]) -> nn.Module:
    """The compressed network without its weights: `model`, changed in place, with empty layers.

    Paths that share one module in the model share the decomposed one too.

    Raises:
        UsageError: The allocation names a layer that the model does not have, or an operator that
            does not exist.
    """
    model = separate_attention(model)
    for name, choice in allocation.items():
        if choice == DENSE:
            continue
        if choice.operator not in OPERATORS:
            raise UsageError(f"layer {name!r} needs the unknown operator {choice.operator!r}.")
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise UsageError(f"the model has no layer {name!r}; is it another model?") from None
        weight: Any = module.weight
        paths = [
            path
            for path, other in model.named_modules(remove_duplicate=False)
            if other is module or getattr(other, "weight", None) is weight
        ]
        empty = OPERATORS[choice.operator].build(LayerShape.of(module), choice.rank)
        replace_module(model, paths, empty.to(weight.dtype))
    return model


def replace_module(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Put one module at every path, in place."""
    for path in paths:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
