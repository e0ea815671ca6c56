"""Sequential (asymmetric) reconstruction: refit layers to the inputs of the compressed network.

The initial factors are computed from the dense network's inputs p. In the compressed network, a
layer's inputs q differ from p because of the errors of earlier layers. The least-squares map from
q to the dense layer's outputs y = W p is E[y q^T] E[q q^T]^-1. Its decomposition in the norm of
q has the smallest error and compensates part of the earlier errors. Layers are refitted in the
order of the forward pass, each after all earlier ones. Neither labels nor gradients are needed.

Part of the patches is held out of the fit. It chooses the shrinkage towards the dense weight, and
a layer keeps its factors where the refitted ones have a larger error on it.

Reference: asymmetric reconstruction, Zhang, Zou, He and Sun, TPAMI 2016 (arXiv 1505.06798),
section 3.3, for the responses of one operator; here for every operator and every norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.accumulators import counted
from rankNAS.compression.batch_norm import in_float32, is_tracking, training_layers
from rankNAS.compression.dense_outputs import MEMORY, DenseOutputs, draw, positions
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.factors import LayerFactors
from rankNAS.compression.moments import Moments, choose_shrinkage, split_moments
from rankNAS.compression.patches import patches
from rankNAS.compression.surgery import changeable_copy, shared_copy
from rankNAS.compression.walks import walk_through
from rankNAS.decompositions import OPERATORS, ErrorNorm, Target
from rankNAS.decompositions.norms import ridged
from rankNAS.tasks.base import at_least_float32
from rankNAS.tasks.feeding import InputSource, input_batches
from rankNAS.threads import limited_threads

__all__ = ["Refitted", "SequentialRefit", "refit_sequentially"]

SAMPLES = 2  # fewest patches per input feature for reliable moments
KEPT = 1 << 28  # bytes of refitted factors that are kept for the next call
Progress = Callable[[int, int], None]


def refit_sequentially(
    factorisation: Factorisation,
    allocation: Mapping[str, Choice],
    inputs: InputSource,
    *,
    batch_size: int = 256,
    seed: int = 0,
    on_layer: Progress | None = None,
) -> Refitted:
    """Sequentially refitted factors for one allocation: each layer fits its compressed inputs.

    Args:
        factorisation: Factors from the dense network's inputs; unchanged.
        allocation: The choices.
        inputs: Calibration samples, or batches of their inputs.
        batch_size: Samples per forward pass. Batch norms use the statistics of the batch in both
            networks.
        seed: Random seed of the positions sampled from large feature maps.
        on_layer: Called with (layers done, layers in total).

    Returns:
        A factorisation for this allocation alone. Layers that are called several times per forward
        pass keep their factors; so do layers with fewer than two patches per input feature, and
        layers whose error on held-out patches would grow.
    """
    refit = SequentialRefit(factorisation, inputs, batch_size=batch_size, seed=seed)
    return refit.factors(allocation, on_layer)


@dataclass(frozen=True)
class Refitted(Factorisation):
    """Refitted factors of one allocation.

    Args:
        statistics: Mean and variance of the inputs of each batch norm that keeps running
            statistics, by path: averages over the calibration batches in the refitted network.
            Empty without batch norms, and for a single calibration sample.
    """

    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class SequentialRefit:
    """Refits of many allocations of one factorisation, on the same calibration inputs.

    What does not depend on the allocation is computed once: the dense network's outputs, and the
    trace of the network. The latest refits are kept, as the best trial is often the answer.

    Args:
        factorisation: Factors from the dense network's inputs; unchanged.
        inputs: Calibration samples, or batches of their inputs.
        batch_size: Samples per forward pass.
        seed: Random seed of the positions sampled from large feature maps.
        memory: Bytes of dense outputs that are kept; beyond them they are computed at each refit.
    """

    @torch.no_grad()
    def __init__(
        self,
        factorisation: Factorisation,
        inputs: InputSource,
        *,
        batch_size: int = 256,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        self._factorisation, self._seed = factorisation, seed
        self._batches = input_batches(inputs, batch_size, even=True)
        # The statistics of one sample are no estimate, and those of one vector are none at all.
        statistics = nn.Module.eval if self._batches.samples < 2 else _training_statistics
        layers, model = factorisation.space.layers, factorisation.model
        self._dense = DenseOutputs(
            statistics(shared_copy(model)), layers, self._batches, seed=seed, memory=memory
        )
        self._network = statistics(changeable_copy(model, factorisation.layers))
        self._walk = walk_through(self._network, layers, self._batches)
        self._kept: dict[frozenset[tuple[str, Choice]], Refitted] = {}
        # An estimate: factors are in float64 and hold at most about the weights' numbers.
        numbers = sum(found.weight.numel() for found in factorisation.layers.values())
        self._most = max(1, KEPT // max(1, 8 * numbers))

    def factors(
        self, allocation: Mapping[str, Choice], on_layer: Progress | None = None
    ) -> Refitted:
        """The refitted factors of an allocation; see `refit_sequentially`."""
        key = frozenset(allocation.items())
        if key not in self._kept:
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._fitted(allocation, on_layer)
        return self._kept[key]

    @torch.no_grad()
    def _fitted(self, allocation: Mapping[str, Choice], on_layer: Progress | None) -> Refitted:
        space = self._factorisation.space
        for found in self._factorisation.layers.values():  # of an earlier allocation
            found.write(self._network, DENSE)
        layers: dict[str, LayerFactors] = {}
        for names, inputs in self._walk.sites():
            site = {
                n: self._factorisation.layers[n].restrict([allocation[n]])
                for n in names
                if n not in layers
            }
            for name, layer in self._refitted(site, inputs, allocation).items():
                layers[name] = layer
                layer.write(self._network, allocation[name])
                if on_layer is not None:
                    on_layer(len(layers), len(space.layers))
        layers = {name: layers[name] for name in space.layers}
        restricted = space.restrict({name: [choice] for name, choice in allocation.items()})
        model = self._model(layers, allocation)
        return Refitted(model, restricted, layers, statistics=self._statistics())

    def _refitted(
        self,
        site: Mapping[str, LayerFactors],
        inputs: Iterator[Tensor | None],
        allocation: Mapping[str, Choice],
    ) -> dict[str, LayerFactors]:
        """The refitted factors of layers with the same inputs."""
        found = dict(site)
        # The layers of a site of several are called once.
        if all(len(layer.layer.shape.calls) != 1 for layer in site.values()):
            return found
        shape = next(iter(site.values())).layer.shape
        parts = split_moments(shape, self._pairs(list(site), inputs))
        for (name, layer), (fit, held) in zip(site.items(), parts, strict=False):
            shape = layer.layer.shape
            if fit.count + held.count >= SAMPLES * shape.width:
                with limited_threads(max(shape.width, shape.outputs // shape.groups)):
                    found[name] = _refitted_layer(layer, allocation[name], fit, held)
        return found

    def _pairs(
        self, names: list[str], inputs: Iterator[Tensor | None]
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Compressed patches and dense outputs at the same positions, by batch."""
        layer = self._factorisation.space.layers[names[0]]
        if "expert" in layer.roles:
            yield from self._own_outputs(names, inputs)
            return
        most = positions(layer, self._batches.samples)
        dense = [self._dense.of(name) for name in names]
        for number, (x, *outputs) in enumerate(zip(inputs, *dense, strict=True)):
            called = [y for y in outputs if y is not None]
            if x is None or len(called) < len(names):
                continue
            x = counted(layer.shape, x, self._batches.mask(number))
            yield patches(layer.shape, x, draw(self._seed, number), most), called

    def _own_outputs(
        self, names: list[str], inputs: Iterator[Tensor | None]
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Compressed patches and the outputs that the dense layers would have on them, by batch.

        An expert of the compressed network receives other tokens than that of the dense one.
        """
        layers = [self._factorisation.layers[name] for name in names]
        for x in inputs:
            if x is not None:
                P = patches(layers[0].layer.shape, at_least_float32(x))
                yield P, [P @ found.weight.flatten(2).to(P.dtype).mT for found in layers]

    def _model(
        self, layers: Mapping[str, LayerFactors], allocation: Mapping[str, Choice]
    ) -> nn.Module:
        """A copy of the dense model with the refitted weights of layers that stay dense."""
        kept = [found for name, found in layers.items() if allocation[name] == DENSE]
        dense = self._factorisation.model
        modules = [dense.get_submodule(path) for found in kept for path in found.layer.paths]
        model = shared_copy(dense, own=[p for m in modules for p in m.parameters()])
        for found in kept:
            found.write(model, DENSE)
        return model

    def _statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        own = set(map(id, training_layers(self._network)))
        return {
            path: (module.running_mean.clone(), module.running_var.clone())
            for path, module in self._network.named_modules()
            if id(module) in own
        }


def _training_statistics(model: nn.Module) -> nn.Module:
    """The model, with batch norms that use the statistics of the batch."""
    in_float32(model.eval())
    for module in model.modules():
        if is_tracking(module):
            module.train()
    return model


def _refitted_layer(
    layer: LayerFactors, choice: Choice, fit: Moments, held: Moments
) -> LayerFactors:
    """The refitted factors of a layer; its own if these have a smaller error on held-out data."""
    W = layer.weight.double().flatten(2)
    shrinkage = choose_shrinkage(W, fit, held, layer.norm)
    if held.count:
        candidate = _fitted_layer(layer, choice, fit, shrinkage)
        errors = [_error(layer, found, choice, fit, held) for found in (candidate, layer)]
        if not errors[0] < errors[1]:
            return layer
    return _fitted_layer(layer, choice, fit + held, shrinkage)


def _fitted_layer(
    layer: LayerFactors, choice: Choice, moments: Moments, shrinkage: float
) -> LayerFactors:
    """The factors of a choice, from the least-squares weight for the compressed inputs."""
    centred = layer.norm.mean is not None
    best = moments.fitted(layer.weight.double().flatten(2), shrinkage, centred=centred)
    bias = layer.bias
    if centred and bias is not None:
        bias = (bias.double() + moments.shift(best).flatten()).to(bias.dtype)
    weight = best.reshape(layer.weight.shape)
    _, moment = moments.second(centred=centred)
    norm = ErrorNorm(ridged(moment), layer.norm.H, moments.means[1] if centred else None)
    factors = {}
    if choice != DENSE:
        operator = OPERATORS[choice.operator]
        found = operator.factorise(layer.layer.shape, Target(weight, norm), [choice.rank])
        factors = {choice.operator: found}
    weight = weight.to(layer.weight.dtype)
    norm = replace(norm, C=None)
    refitted = replace(layer, weight=weight, bias=bias, norm=norm, factors=factors, file=None)
    if choice == DENSE:
        return refitted
    # The single choice includes its corrected bias, so no dense weight is needed.
    _, bias = refitted.folded(choice)
    return replace(refitted, weight=layer.weight, bias=bias, norm=replace(norm, mean=None))


def _error(
    layer: LayerFactors, found: LayerFactors, choice: Choice, fit: Moments, held: Moments
) -> float:
    """The error of factors on held-out patches; its mean is removed where a batch norm does so."""
    weight, bias = found.folded(choice)
    A = layer.layer.shape.fold(weight).double().flatten(2)
    shift = torch.zeros_like(fit.y)
    if bias is not None and layer.bias is not None:
        shift = (bias.double() - layer.bias.double()).reshape(shift.shape)
    elif layer.norm.mean is not None:
        shift = fit.shift(A)
    return held.error(A, shift, layer.norm)
