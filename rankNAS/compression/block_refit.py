"""Sequential refits block by block: two networks walk side by side, and factors go to files.

As in `rankNAS.compression.reconstruction`, each layer fits its dense outputs from the inputs that
the compressed layers before it leave. Both networks run each block once for all batches, and the
compressed one once more for each further site of the block. Moments exist for one site at a time.

Reference: Wang et al., 2025 (SVD-LLM, arXiv 2403.07378), section 3.3, for the sequential update of
the factors of a transformer; here of both factors, in the norm of the search.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.blocks import BlockChain
from rankNAS.compression.factor_store import FactorStore
from rankNAS.compression.factorisation import Factorisation
from rankNAS.compression.factors import LayerFactors
from rankNAS.compression.paired_walk import EachBlock, PairedWalk
from rankNAS.compression.reconstruction import SAMPLES, Refitted
from rankNAS.compression.site_moments import Pairs, site_moments, transfer
from rankNAS.compression.streaming import batches_of_positions
from rankNAS.compression.surgery import install, shared_copy
from rankNAS.deadline import check_time
from rankNAS.decompositions import OPERATORS, ErrorNorm, Target
from rankNAS.decompositions.norms import ridged
from rankNAS.io.fingerprints import fingerprint
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.tasks.feeding import InputBatches
from rankNAS.threads import limited_threads
from rankNAS.trees import rows

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

    @property
    def chain(self) -> BlockChain:
        """The blocks of the dense network."""
        return self._chain

    @property
    def store(self) -> FactorStore:
        """The files of the factors."""
        return self._store

    @torch.no_grad()
    def factors(
        self,
        allocation: Mapping[str, Choice],
        on_layer: Progress | None = None,
        *,
        then: EachBlock | None = None,
        fit: bool = True,
    ) -> Refitted:
        """The refitted factors of an allocation; see `SequentialRefit.factors`.

        Args:
            allocation: The choices.
            on_layer: Called with (layers done, layers in total).
            then: What is done with each block after its refit, before the walk goes on.
            fit: Whether to refit; otherwise layers keep their factors from the dense network.

        Raises:
            WriteError: The disk is full; the layers that are done are found again.
        """
        space, dense = self._factorisation.space, self._factorisation.model
        restricted = space.restrict({name: [choice] for name, choice in allocation.items()})
        salt = f"{VERSION} {sorted(allocation.items())} {self._batches.sizes[: self._count]}"
        salt += f" {fit} {then.key}" if then is not None else ""
        store = self._store.within(fingerprint({}, salt))
        known = {name: store.get(layer, dense) for name, layer in restricted.layers.items()}
        layers = {name: found for name, found in known.items() if found is not None}
        if len(layers) < len(known) or (then is not None and not then.is_done(store)):
            layers = self._walked(allocation, restricted, store, on_layer, then, fit)
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
        then: EachBlock | None,
        fit: bool,
    ) -> dict[str, LayerFactors]:
        """The refitted factors, from one walk of both networks; stored ones are not made again."""
        space, dense = self._factorisation.space, self._factorisation.model
        network = shared_copy(dense)
        experts = {name for name, layer in space.layers.items() if "expert" in layer.roles}
        further = None if then is None else then.batches
        walk = PairedWalk(
            self._chain, network, self._batches, self._count, store.folder.parent, experts, further
        )
        layers: dict[str, LayerFactors] = {}

        def on_block(number: int) -> None:
            if then is not None:
                then.work(walk, number, layers, allocation, store)

        for names, moments in walk.sites(on_block):
            stored = {n: store.get(restricted.layers[n], dense) for n in names}
            site = {
                n: self._factorisation.layers[n].restrict([allocation[n]])
                for n, found in stored.items()
                if found is None
            }
            refitted = _Site(site, allocation, moments).refitted() if site and fit else site
            for name in names:
                found = stored[name] or store.put(refitted[name], whole=True)
                layers[name] = found
                install(network, found, allocation[name])
                check_time()
                if on_layer is not None:
                    on_layer(len(layers), len(space.layers))
            walk.renew()  # a layer may be a block of its own
        return {name: layers[name] for name in space.layers}


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
            weight = weight.to(layer.weight.dtype)
            return replace(layer, weight=weight, bias=bias, file=None)
        _, moment, _ = pairs.second(pairs.means() if centred else None)
        norm = ErrorNorm(ridged(moment)[None], layer.norm.H, q[None] if centred else None)
        operator = OPERATORS[choice.operator]
        found = operator.factorise(layer.layer.shape, Target(weight, norm), [choice.rank])
        norm = replace(norm, C=None)
        refitted = replace(
            layer, weight=weight, bias=bias, norm=norm, factors={choice.operator: found}, file=None
        )
        # The single choice includes its corrected bias, so no dense weight is needed.
        bias = refitted.bias_of(choice)
        return replace(refitted, weight=layer.weight, bias=bias, norm=replace(norm, mean=None))


def _is_centred(layer: LayerFactors) -> bool:
    return layer.norm.mean is not None


def _matrix(weight: Tensor) -> Tensor:  # (1, o, n, 1, 1) -> (o, n)
    return weight.detach().flatten(2)[0]
