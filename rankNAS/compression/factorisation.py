"""Factorisation of a model: factorise each layer once, slice the factors per allocation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.batch_norm import has_batch_norm
from rankNAS.compression.degenerate import DegenerateLayers
from rankNAS.compression.factor_store import FactorStore, read_factors
from rankNAS.compression.factors import LayerFactors, Screen, Select, factorise_layer
from rankNAS.compression.surgery import LazyFactorised, shared_copy
from rankNAS.copies import copied
from rankNAS.decompositions import OPERATORS, NormName, Statistics, make_norm
from rankNAS.decompositions.layer_view import LayerView
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.plain_layers import with_plain_layers

__all__ = ["Factorisation", "OneLayer", "factorise", "skeleton"]


@dataclass(frozen=True)
class Factorisation:
    """A model's factors, shared read-only by all allocations.

    Args:
        model: The dense model, with separate attention projections.
        space: Its space.
        layers: Factors by layer name.
        store: The files that hold the factors, where memory is short.
    """

    model: nn.Module
    space: SearchSpace
    layers: dict[str, LayerFactors]
    store: FactorStore | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        space: SearchSpace,
        layers: dict[str, LayerFactors],
        store: FactorStore | None = None,
    ) -> Factorisation:
        """The factorisation whose space has the choices that have factors."""
        space = replace(space, layers={name: found.layer for name, found in layers.items()})
        return cls(model, space, layers, store)

    def __getstate__(self) -> dict[str, Any]:
        """The state with files in place of the factors that lie in them."""
        layers = {name: found.file or found for name, found in self.layers.items()}
        return {**self.__dict__, "layers": layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {
            name: _opened(found, state["space"].layers[name], state["model"])
            for name, found in state["layers"].items()
        }
        self.__dict__.update({**state, "layers": opened})

    @property
    def streamed(self) -> bool:
        """Whether the factors lie in files."""
        return self.store is not None

    def errors(self) -> dict[str, list[float]]:
        """Relative error of each choice of each layer, in the order of the space."""
        return {name: found.errors() for name, found in self.layers.items()}

    def losses(self) -> dict[str, list[float]]:
        """Absolute error of each choice of each layer in its norm, per sample and halved.

        In the norm ``fisher`` it is the second-order loss per sample, where the positions of an
        input are taken to be independent.
        """
        batch = max(1, self.space.batch_size)
        return {name: found.losses(batch) for name, found in self.layers.items()}

    def materialise(self, allocation: Mapping[str, Choice]) -> nn.Module:
        """The compressed network: a copy of the model with decomposed layers as ordinary modules.

        The new weights can be trained, also those in place of frozen ones.

        Raises:
            UsageError: The allocation does not belong to the space.
        """
        self.space.check(allocation)
        replaced = [name for name, choice in allocation.items() if choice != DENSE]
        # Do not copy layers that are replaced.
        memo = {id(self.model.get_submodule(n)): nn.Identity() for n in replaced}
        network = copied(self.model, memo)
        for name in replaced:
            module = self.layers[name].module(allocation[name])
            # The weights of a large network go to a file that is mapped, one layer at a time.
            module = module if self.store is None else self.store.in_file(module, name)
            LayerView(network, self.space.layers[name].paths).replace(module)
        return network

    def made_when_called(self, allocation: Mapping[str, Choice]) -> nn.Module:
        """The compressed network for inference only, with the memory of one decomposed layer.

        A decomposed layer exists only during its forward pass. All other parameters and the
        factors are shared.

        Raises:
            UsageError: The allocation does not belong to the space.
        """
        self.space.check(allocation)
        network = shared_copy(self.model)
        for name, choice in allocation.items():
            if choice != DENSE:
                module = LazyFactorised(self.layers[name], choice)
                LayerView(network, self.space.layers[name].paths).replace(module)
        return network


def _opened(found: LayerFactors | Path, layer: Layer, model: nn.Module) -> LayerFactors:
    """The factors of a layer, which may lie in a file."""
    if isinstance(found, LayerFactors):
        return found
    if not found.exists():
        raise UsageError(
            f"the factors of layer {layer.name!r} are not on this machine, in {str(found)!r}; set "
            "RANKNAS_CACHE to a folder that all machines share, or use the workers of one."
        )
    return read_factors(found, layer, model).restrict(layer.choices)


def factorise(
    model: nn.Module,
    space: SearchSpace,
    statistics: Mapping[str, Statistics] | None = None,
    *,
    norm: NormName = "weight",
    centred: bool | None = None,
    select: Select | None = None,
    screen: Screen | None = None,
    on_layer: Callable[[int, int], None] | None = None,
    store: FactorStore | None = None,
) -> Factorisation:
    """The factors of every layer of a space, for all its choices.

    Args:
        model: The compiled model.
        space: Its space.
        statistics: From `calibrate`; not needed for ``norm="weight"``.
        norm: The error norm in which truncations are optimal.
        centred: Minimise the variance of the error and correct its mean: through the bias or,
            in layers without one, through a following batch norm that is re-estimated. The default
            is on for layers with a bias, and for all layers if the model has batch norms.
        select: Receives a layer and the relative error of each of its choices, infinite for those
            that the screen removed; returns the choices to keep. The others are removed from the
            space, and their factors are freed at once.
        screen: Receives a layer, the errors that are known (infinite for the others) and estimates
            that are at most the errors (infinite for the others); returns the choices with
            estimates that may be of use. Factors that none of these needs may be left out, and
            choices without factors are removed.
        on_layer: Called with (layers done, layers in total).
        store: Takes the factors of each layer as they are made; None keeps them in memory.
    """
    model = with_plain_layers(model, space.layers)
    each = OneLayer(model, norm, centred, select, screen, store)
    layers = {}
    for done, (name, layer) in enumerate(space.layers.items(), 1):
        layers[name] = each.factorised(layer, (statistics or {}).get(name))
        if on_layer is not None:
            on_layer(done, len(space.layers))
    each.degenerate.warn()
    return Factorisation.of(model, space, layers, store)


@dataclass(frozen=True)
class OneLayer:
    """Factorises one layer after another; the arguments are those of `factorise`.

    Args:
        model: The model with plain layers.
    """

    model: nn.Module
    norm: NormName = "weight"
    centred: bool | None = None
    select: Select | None = None
    screen: Screen | None = None
    store: FactorStore | None = None
    degenerate: DegenerateLayers = field(default_factory=DegenerateLayers)

    def factorised(self, layer: Layer, known: Statistics | None) -> LayerFactors:
        """The factors of a layer, from its statistics."""
        module = self.model.get_submodule(layer.name)
        norm = make_norm(self.norm, known, centred=self._is_centred(module))
        found = factorise_layer(layer, module, norm, self.screen)
        self.degenerate.add(layer, found.weight, None if self.norm == "weight" else known)
        if self.select is not None:
            computed = dict(zip(found.layer.choices, found.errors(), strict=True))
            errors = [computed.get(choice, math.inf) for choice in layer.choices]
            found = found.restrict([c for c in self.select(layer, errors) if c in computed])
        return found if self.store is None else self.store.put(found, layer)

    def _is_centred(self, module: Any) -> bool:
        if self.centred is None:
            return module.bias is not None or has_batch_norm(self.model)
        return self.centred


def skeleton(model: nn.Module, allocation: Mapping[str, Choice]) -> nn.Module:
    """The compressed network without weights: `model`, changed in place, with empty layers.

    Paths that share a module in the model also share the decomposed module.

    Raises:
        UsageError: The allocation names a layer that is not in the model, or an unknown
            operator.
    """
    model = with_plain_layers(model, allocation)
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
        LayerView(model, paths).replace(empty.to(weight.dtype))
    return model
