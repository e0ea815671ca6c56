"""Sequential (asymmetric) reconstruction: refit layers to the inputs of the compressed network.

The initial factors are computed from the dense network's inputs x. In the compressed network, a
layer's inputs x' differ from x because of the errors of earlier layers. The least-squares map from
x' to the dense layer's outputs W x is W E[x x'^T] E[x' x'^T]^-1. Its decomposition in the norm of
x' has the smallest error and compensates part of the earlier errors. Layers are refitted in the
order of the forward pass, each after all earlier ones. Neither labels nor gradients are needed.

Reference: asymmetric reconstruction, Zhang, Zou, He and Sun, TPAMI 2016 (arXiv 1505.06798),
section 3.3, for the responses of one operator; here for every operator and every norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.accumulators import counted
from rankNAS.compression.batch_norm import in_float32, is_tracking
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.factors import LayerFactors
from rankNAS.compression.incremental import IncrementalExecutor
from rankNAS.compression.patches import folded, patches
from rankNAS.compression.surgery import changeable_copy, shared_copy
from rankNAS.decompositions import OPERATORS, ErrorNorm, Target
from rankNAS.decompositions.norms import ridged
from rankNAS.tasks.feeding import InputBatches, InputSource, input_batches
from rankNAS.threads import limited_threads
from rankNAS.trees import rows

__all__ = ["refit_sequentially"]

SAMPLES = 2  # fewest patches per input feature for reliable moments
POSITIONS = 32  # per input, see `patches`; more inputs help more than more positions
SHRINKAGE = 1e-2  # towards the dense weight, in units of the mean square of an input
Pairs = Iterator[tuple[Tensor, Tensor]]  # inputs of a layer: dense network's, compressed network's


@torch.no_grad()
def refit_sequentially(
    factorisation: Factorisation,
    allocation: Mapping[str, Choice],
    inputs: InputSource,
    *,
    batch_size: int = 256,
    seed: int = 0,
    on_layer: Callable[[int, int], None] | None = None,
) -> Factorisation:
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
        pass keep their factors; so do layers with fewer than two patches per input feature.
    """
    space = factorisation.space
    batches = input_batches(inputs, batch_size, even=True)
    # The statistics of one sample are no estimate, and those of one vector are none at all.
    statistics = nn.Module.eval if batches.samples < 2 else _training_statistics
    dense = statistics(shared_copy(factorisation.model))
    compressed = statistics(changeable_copy(factorisation.model, factorisation.layers))
    walk = _walk(factorisation, dense, compressed, batches)
    layers = {}
    for done, (name, pairs) in enumerate(walk, 1):
        choice, layer = allocation[name], factorisation.layers[name].restrict([allocation[name]])
        if len(layer.layer.shape.calls) == 1:
            moments = _Moments.of(layer, pairs, batches, seed)
            shape = layer.layer.shape
            if moments.count >= SAMPLES * shape.width:
                with limited_threads(max(shape.width, shape.outputs // shape.groups)):
                    layer = moments.refit(layer, choice)
        layers[name] = layer
        layer.write(compressed, choice)
        if on_layer is not None:
            on_layer(done, len(space.layers))
    layers = {name: layers[name] for name in space.layers}
    kept = [found for name, found in layers.items() if allocation[name] == DENSE]
    modules = [factorisation.model.get_submodule(p) for found in kept for p in found.layer.paths]
    model = shared_copy(factorisation.model, own=[p for m in modules for p in m.parameters()])
    for found in kept:
        found.write(model, DENSE)
    restricted = space.restrict({name: [choice] for name, choice in allocation.items()})
    return Factorisation(model, restricted, layers)


def _training_statistics(model: nn.Module) -> nn.Module:
    """The model, with batch norms that use the statistics of the batch."""
    in_float32(model.eval())
    for module in model.modules():
        if is_tracking(module):
            module.train()
    return model


@dataclass(frozen=True)
class _Moments:
    """Means over patches p of the dense network and q of the compressed one.

    Args:
        mean_dense: E[p], (g, n).
        mean: E[q], (g, n).
        cross: E[p q^T], (g, n, n).
        moment: E[q q^T], (g, n, n).
        count: Number of patches.
    """

    mean_dense: Tensor
    mean: Tensor
    cross: Tensor
    moment: Tensor
    count: int

    @classmethod
    def of(cls, layer: LayerFactors, pairs: Pairs, batches: InputBatches, seed: int) -> _Moments:
        """Moments over all batches."""
        shape = layer.layer.shape
        sums: list[Tensor] = []
        count = 0
        for number, pair in enumerate(pairs):
            # The same positions in both networks.
            mask = batches.mask(number)
            P, Q = (
                patches(
                    shape,
                    counted(shape, x, mask),
                    torch.Generator().manual_seed(seed + number),
                    POSITIONS,
                )
                for x in pair
            )
            parts = [P.sum(1), Q.sum(1), P.mT @ Q, Q.mT @ Q]
            parts = [part.double() for part in parts]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
            count += P.shape[1]
        order = folded(shape)
        mean_dense, mean = (s[:, order] / count for s in sums[:2])
        cross, moment = (s[:, order][:, :, order] / count for s in sums[2:])
        return cls(mean_dense, mean, cross, moment, count)

    def refit(self, layer: LayerFactors, choice: Choice) -> LayerFactors:
        """The factors of a choice, from the least-squares weight for the compressed inputs."""
        centred = layer.norm.mean is not None
        cross, moment = self.cross, self.moment
        if centred:
            cross = cross - self.mean_dense.unsqueeze(-1) * self.mean.unsqueeze(-2)
            moment = moment - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)
        scale = SHRINKAGE * moment.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
        shrinkage = torch.where(scale > 0, scale, torch.ones_like(scale))[:, None, None] * eye
        W = layer.weight.double().flatten(2)
        best = W @ torch.linalg.solve(moment + shrinkage, (cross + shrinkage).mT).mT
        bias = layer.bias
        if centred and bias is not None:
            shift = (W @ self.mean_dense.unsqueeze(-1) - best @ self.mean.unsqueeze(-1)).flatten()
            bias = (bias.double() + shift).to(bias.dtype)
        weight = best.reshape(layer.weight.shape)
        norm = ErrorNorm(ridged(moment), layer.norm.H, self.mean if centred else None)
        factors = {}
        if choice != DENSE:
            operator = OPERATORS[choice.operator]
            target = Target(weight, norm)
            found = operator.factorise(layer.layer.shape, target, [choice.rank])
            factors = {choice.operator: found}
        weight = weight.to(layer.weight.dtype)
        norm = replace(norm, C=None)
        refitted = replace(layer, weight=weight, bias=bias, norm=norm, factors=factors)
        if choice == DENSE:
            return refitted
        # The single choice includes its corrected bias, so no dense weight is needed.
        _, bias = refitted.folded(choice)
        return replace(refitted, weight=layer.weight, bias=bias, norm=replace(norm, mean=None))


def _walk(
    factorisation: Factorisation,
    dense: nn.Module,
    compressed: nn.Module,
    batches: InputBatches,
) -> Iterator[tuple[str, Pairs]]:
    """Each layer in the order of the forward pass, with its inputs in both networks.

    The caller changes the compressed network layer by layer during the iteration.
    """
    layers = factorisation.space.layers
    paths = {name: layer.paths for name, layer in layers.items()}
    few = rows(batches[0], slice(0, 2), batches.sizes[0])
    staged = [IncrementalExecutor.of(model, paths, [few]) for model in (dense, compressed)]
    if staged[0] is not None and staged[1] is not None:
        yield from _staged(staged[0], staged[1], layers, batches)
        return
    for name in layers:
        yield name, _hooked(name, dense, compressed, batches)


def _staged(
    dense: IncrementalExecutor,
    compressed: IncrementalExecutor,
    layers: Mapping[str, Any],
    batches: InputBatches,
) -> Iterator[tuple[str, Pairs]]:
    """Advance both forward passes from layer to layer, for all batches."""
    both = dense, compressed
    live_values: list[list[dict[Any, Any]]] = [[{} for _ in batches] for _ in both]
    at = 0
    for name in sorted(layers, key=lambda name: dense.cut_points[name]):
        cut = dense.cut_points[name]
        for i, x in enumerate(batches):
            for stages, values in zip(both, live_values, strict=True):
                values[i] = stages.advance(values[i], at, cut, x)
        at = cut
        yield (
            name,
            (
                (dense.input_of(cut, a), compressed.input_of(cut, b))
                for a, b in zip(*live_values, strict=True)
                if len(layers[name].shape.calls) == 1
            ),
        )


class _ReachedError(Exception):
    """The target layer has been called."""


def _hooked(name: str, dense: nn.Module, compressed: nn.Module, batches: InputBatches) -> Pairs:
    """Forward passes up to a layer, for networks that cannot be traced."""
    for x in batches:
        found = []
        for model in (dense, compressed):

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found.append((*args, *kwargs.values())[0].detach())  # noqa: B023
                raise _ReachedError

            handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
            try:
                x.copied().run(model)  # the model may change its inputs
            except _ReachedError:
                pass
            finally:
                handle.remove()
        if len(found) == 2:
            yield found[0], found[1]
