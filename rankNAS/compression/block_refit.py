"""Sequential refits block by block: two networks walk side by side, and factors go to files.

As in `rankNAS.compression.reconstruction`, each layer fits its dense outputs from the inputs that
the compressed layers before it leave. Both networks run each block once for all batches, and the
compressed one once more for each further site of the block. Moments exist for one site at a time.

Reference: Wang et al., 2025 (SVD-LLM, arXiv 2403.07378), section 3.3, for the sequential update of
the factors of a transformer; here of both factors, in the norm of the search.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.activations import ActivationCache
from rankNAS.compression.blocks import BlockChain, freed
from rankNAS.compression.factor_store import FactorStore
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.factors import LayerFactors
from rankNAS.compression.reconstruction import SAMPLES, Refitted
from rankNAS.compression.site_moments import Pairs, site_moments, transfer
from rankNAS.compression.streaming import batches_of_positions
from rankNAS.compression.surgery import install, shared_copy
from rankNAS.deadline import check_time
from rankNAS.decompositions import OPERATORS, ErrorNorm, Target
from rankNAS.decompositions.norms import ridged
from rankNAS.io.fingerprints import fingerprint
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.tasks.base import at_least_float32
from rankNAS.tasks.feeding import InputBatches
from rankNAS.threads import limited_threads
from rankNAS.trees import Inputs, rows, tree_map

__all__ = ["BlockRefit"]

logger = logging.getLogger(__name__)
VERSION = 2  # of the method, in the names of files
PER_COLUMN = 16  # positions for each column of the widest weight
Progress = Callable[[int, int], None]


class BlockRefit:
    """Refits of allocations of one streamed factorisation, on the same calibration inputs.

    Args:
        factorisation: The factors from the dense network's inputs, in files.
        batches: The calibration inputs, a few samples each.
        chain: The blocks of the dense network.
    """

    def __init__(
        self, factorisation: Factorisation, batches: InputBatches, chain: BlockChain
    ) -> None:
        assert factorisation.store is not None
        self._factorisation, self._chain = factorisation, chain
        self._store = factorisation.store
        self._batches = batches
        space = factorisation.space
        widest = max(x.shape.width for x in space.layers.values())
        self._count = batches_of_positions(space, batches, PER_COLUMN * widest)

    @classmethod
    def of(cls, factorisation: Factorisation, batches: InputBatches) -> BlockRefit | None:
        """The refits; None if the blocks of the network cannot be run on their own."""
        few = rows(batches[0], slice(0, 1), batches.sizes[0])
        chain = BlockChain.of(factorisation.model, factorisation.space.layers, few)
        return None if chain is None else cls(factorisation, batches, chain)

    @torch.no_grad()
    def factors(
        self, allocation: Mapping[str, Choice], on_layer: Progress | None = None
    ) -> Refitted:
        """The refitted factors of an allocation; see `SequentialRefit.factors`.

        Raises:
            WriteError: The disk is full; the layers that are done are found again.
        """
        space, dense = self._factorisation.space, self._factorisation.model
        restricted = space.restrict({name: [choice] for name, choice in allocation.items()})
        salt = f"{VERSION} {sorted(allocation.items())} {self._batches.sizes[: self._count]}"
        store = self._store.within(fingerprint({}, salt))
        known = {name: store.get(layer, dense) for name, layer in restricted.layers.items()}
        layers = {name: found for name, found in known.items() if found is not None}
        if len(layers) < len(known):
            layers = self._walked(allocation, restricted, store, on_layer)
        model = shared_copy(dense)
        for name in (n for n in layers if allocation[n] == DENSE):
            install(model, layers[name], DENSE)
        return Refitted(model, restricted, layers, self._store)

    def _walked(
        self,
        allocation: Mapping[str, Choice],
        restricted: SearchSpace,
        store: FactorStore,
        on_layer: Progress | None,
    ) -> dict[str, LayerFactors]:
        """The refitted factors, from one walk of both networks; stored ones are not made again."""
        space, dense = self._factorisation.space, self._factorisation.model
        network = shared_copy(dense)
        experts = {name for name, layer in space.layers.items() if "expert" in layer.roles}
        walk = _PairedWalk(
            self._chain, network, self._batches, self._count, store.folder.parent, experts
        )
        layers: dict[str, LayerFactors] = {}
        for names, moments in walk.sites():
            stored = {n: store.get(restricted.layers[n], dense) for n in names}
            site = {
                n: self._factorisation.layers[n].restrict([allocation[n]])
                for n, found in stored.items()
                if found is None
            }
            refitted = _Site(site, allocation, moments).refitted() if site else {}
            for name in names:
                found = stored[name] or store.put(refitted[name], whole=True)
                layers[name] = found
                install(network, found, allocation[name])
                check_time()
                if on_layer is not None:
                    on_layer(len(layers), len(space.layers))
        return {name: layers[name] for name in space.layers}


class _PairedWalk:
    """Walks of the dense and of a changing network, block by block.

    Args:
        chain: The blocks of the dense network.
        network: A copy of it, whose layers are exchanged.
        batches: The inputs.
        count: The number of batches to use.
        folder: For activations that exceed the memory.
        experts: Layers whose inputs in the dense network are not used.
    """

    def __init__(
        self,
        chain: BlockChain,
        network: nn.Module,
        batches: InputBatches,
        count: int,
        folder: Path,
        experts: Collection[str] = (),
    ) -> None:
        self._experts = experts
        self._dense, self._other = chain, chain.of_copy(network)
        self._batches, self._count = batches, count
        self._cache = ActivationCache(folder)
        self._shapes: list[list[Any]] = [[] for _ in range(count)]

    def sites(self) -> Iterator[tuple[list[str], Callable[[], Iterator[tuple[Tensor, Tensor]]]]]:
        """The layers by site, with a function that gives their inputs in both networks by batch.

        The layers of a site may be exchanged before the next site.
        """
        for number, sites in enumerate(self._dense.sites):
            leaders = [names[0] for names in sites]
            seen = [False]
            for names in sites:
                yield list(names), partial(self._pairs, number, names[0], leaders, seen)
            for i in range(self._count):
                self._advance(number, i, seen[0])
                for leader in leaders:
                    self._cache.drop((leader, i))

    def _pairs(
        self, number: int, name: str, leaders: Sequence[str], seen: list[bool]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if not seen[0]:
            seen[0] = True
            for i in range(self._count):
                self._run_dense(number, i, leaders)
        for i in range(self._count):
            x = self._cache.get((name, i))
            before = self._before("other", number, i)
            q = self._other.input(number, self._batches[i], before, name)
            if name in self._experts:  # it receives other tokens than in the dense network
                x = q
            if x is None or q is None:
                continue
            mask = self._batches.mask(i)
            yield rows_of(x, mask), rows_of(q, mask)

    def _run_dense(self, number: int, i: int, leaders: Sequence[str]) -> None:
        """Run a block of the dense network; keep the inputs of its sites, and its output."""
        found: dict[str, Any] = dict.fromkeys(leaders)

        def hook(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            if found[name] is None:
                found[name] = Inputs(args, kwargs).first.detach().clone()

        network = self._dense.network
        handles = [
            network.get_submodule(n).register_forward_pre_hook(partial(hook, n), with_kwargs=True)
            for n in leaders
        ]
        try:
            output = self._dense.run(number, self._batches[i], self._before("dense", number, i))
        finally:
            for handle in handles:
                handle.remove()
        self._cache.put(("dense", number, i), output)
        for name, x in found.items():
            self._cache.put((name, i), x)

    def _advance(self, number: int, i: int, seen: bool) -> None:
        """Keep the outputs of a block in both networks, and drop those of the block before it."""
        if number < len(self._dense) - 1:
            x = self._batches[i]
            if not seen:
                output = self._dense.run(number, x, self._before("dense", number, i))
                self._cache.put(("dense", number, i), output)
            output = self._other.run(number, x, self._before("other", number, i))
            self._cache.put(("other", number, i), output)
            self._shapes[i].append(tree_map(freed, output))
        for kind in ("dense", "other"):
            self._cache.drop((kind, number - 1, i))

    def _before(self, kind: str, number: int, i: int) -> list[Any]:
        if not number:
            return []
        return [*self._shapes[i][: number - 1], self._cache.get((kind, number - 1, i))]


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions (N, n) of an input that count, in at least single precision."""
    x = at_least_float32(x)
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask]
    return x.reshape(-1, x.shape[-1])


class _Site:
    """The layers of a site, and their refit.

    Args:
        layers: The factors of their choices from the dense network's inputs.
        allocation: The choices.
        pairs: Gives their inputs in both networks by batch.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerFactors],
        allocation: Mapping[str, Choice],
        pairs: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    ) -> None:
        self._layers, self._allocation, self._pairs = layers, allocation, pairs
        self._transfers: dict[bool, Tensor] = {}

    def refitted(self) -> dict[str, LayerFactors]:
        """The factors of the layers; their own if there are too few positions.

        Held-out batches choose the shrinkage, of which a large one leaves the weight as it is.
        """
        shape = next(iter(self._layers.values())).layer.shape
        if len(shape.calls) != 1:
            return dict(self._layers)
        moments = site_moments(self._pairs())
        if moments is None or moments.fit.count < SAMPLES * shape.width:
            return dict(self._layers)
        found = {}
        for centred in (False, True):
            part = {n: x for n, x in self._layers.items() if _is_centred(x) is centred}
            if not part:
                continue
            weighted = {n: x.norm.left(_matrix(x.weight).float()) for n, x in part.items()}
            needs = [HW.mT @ HW for HW in weighted.values()]
            shrinkage = moments.shrinkage(needs, centred=centred)
            for name, layer in part.items():
                logger.debug("%s: shrinkage %g", name, shrinkage)
                choice = self._allocation[name]
                with limited_threads(max(layer.weight.shape[:3])):
                    found[name] = self._fitted(layer, choice, moments.all, shrinkage, centred)
        return found

    def _fitted(
        self, layer: LayerFactors, choice: Choice, pairs: Pairs, shrinkage: float, centred: bool
    ) -> LayerFactors:
        """The factors of a choice, from the least-squares weight for the compressed inputs."""
        if centred not in self._transfers:
            self._transfers[centred] = transfer(pairs, shrinkage, centred=centred)
        W = _matrix(layer.weight).double()
        best, bias = W @ self._transfers[centred], layer.bias
        x, q = pairs.means()
        if centred and bias is not None:
            bias = (bias.double() + W @ x - best @ q).to(bias.dtype)
        weight = best.reshape(layer.weight.shape)
        if choice == DENSE:
            return replace(layer, weight=weight.to(layer.weight.dtype), bias=bias)
        _, moment, _ = pairs.second(pairs.means() if centred else None)
        norm = ErrorNorm(ridged(moment)[None], layer.norm.H, q[None] if centred else None)
        operator = OPERATORS[choice.operator]
        found = operator.factorise(layer.layer.shape, Target(weight, norm), [choice.rank])
        norm = replace(norm, C=None)
        refitted = replace(
            layer, weight=weight, bias=bias, norm=norm, factors={choice.operator: found}
        )
        # The single choice includes its corrected bias, so no dense weight is needed.
        bias = refitted.bias_of(choice)
        return replace(refitted, weight=layer.weight, bias=bias, norm=replace(norm, mean=None))


def _is_centred(layer: LayerFactors) -> bool:
    return layer.norm.mean is not None


def _matrix(weight: Tensor) -> Tensor:  # (1, o, n, 1, 1) -> (o, n)
    return weight.detach().flatten(2)[0]
