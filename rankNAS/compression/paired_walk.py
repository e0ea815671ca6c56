"""Two networks that walk side by side, block by block: a dense one and one that changes.

Both run each block once for all batches, and the changing one once more for each further site of
a block, since layers are exchanged site by site.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from rankNAS.allocation import Choice
from rankNAS.compression.activations import ActivationCache
from rankNAS.compression.blocks import BlockChain, freed
from rankNAS.compression.factor_store import FactorStore
from rankNAS.compression.factors import LayerFactors
from rankNAS.memory import give_back
from rankNAS.tasks.base import at_least_float32
from rankNAS.tasks.feeding import InputBatches
from rankNAS.trees import Inputs, tree_map

__all__ = ["EachBlock", "PairedWalk", "rows_of"]


class EachBlock(Protocol):
    """What is done with each block of a walk once its layers are refitted.

    Attributes:
        batches: Inputs on which it is done; they walk along.
        key: Of everything that its result depends on, besides the network.
    """

    batches: InputBatches
    key: str

    def work(
        self,
        walk: PairedWalk,
        number: int,
        layers: Mapping[str, LayerFactors],
        allocation: Mapping[str, Choice],
        store: FactorStore,
    ) -> None:
        """Change a block of the walk's compressed network.

        Args:
            walk: The walk, which ends at this block.
            number: The number of the block.
            layers: The refitted factors of its layers and of those before it.
            allocation: The choices.
            store: Takes the result.
        """

    def is_done(self, store: FactorStore) -> bool:
        """Whether a store has the result of every block."""


class PairedWalk:
    """Walks of the dense and of a changing network, block by block.

    Args:
        chain: The blocks of the dense network.
        network: A copy of it, whose layers are exchanged.
        batches: The inputs.
        count: The number of batches to use.
        folder: For activations that exceed the memory.
        experts: Layers whose inputs in the dense network are not used.
        further: Inputs that walk along and are not used for moments.
    """

    def __init__(
        self,
        chain: BlockChain,
        network: nn.Module,
        batches: InputBatches,
        count: int,
        folder: Path,
        experts: Collection[str] = (),
        further: InputBatches | None = None,
    ) -> None:
        self._experts = experts
        self._dense, self._other = chain, chain.of_copy(network)
        self._batches, self._count, self._further = batches, count, further
        self._total = count + len(further or ())
        self._cache = ActivationCache(folder)
        self._shapes: list[list[Any]] = [[] for _ in range(self._total)]

    @property
    def network(self) -> nn.Module:
        """The changing network."""
        return self._other.network

    def renew(self) -> None:
        """Find the blocks of the changing network again, after some were exchanged themselves."""
        self._other = self._dense.of_copy(self.network)

    def sites(
        self, on_block: Callable[[int], None] | None = None
    ) -> Iterator[tuple[list[str], Callable[[], Iterator[tuple[Tensor, Tensor]]]]]:
        """The layers by site, with a function that gives their inputs in both networks by batch.

        The layers of a site may be exchanged before the next site.

        Args:
            on_block: Called with the number of each block after its last site; the block may be
                exchanged then.
        """
        for number, sites in enumerate(self._dense.sites):
            leaders = [names[0] for names in sites]
            seen = [False]
            for names in sites:
                yield list(names), partial(self._pairs, number, names[0], leaders, seen)
            for i in range(self._count, self._total):
                self._run_dense(number, i, ())
            if on_block is not None:
                on_block(number)
            for i in range(self._total):
                self._advance(number, i, seen[0] or i >= self._count)
                for leader in leaders:
                    self._cache.drop((leader, i))
            give_back()

    def output(self, number: int, further: int) -> Any:
        """The output of the dense block for one of the further inputs."""
        return self._cache.get(("dense", number, self._count + further))

    def run(self, number: int, further: int) -> Any:
        """The output of the compressed block for one of the further inputs."""
        i = self._count + further
        return self._other.run(number, self._inputs(i), self._before("other", number, i))

    def _inputs(self, i: int) -> Inputs:
        if i < self._count or self._further is None:
            found: Inputs = self._batches[i]
            return found
        found = self._further[i - self._count]
        return found

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
            output = self._dense.run(number, self._inputs(i), self._before("dense", number, i))
        finally:
            for handle in handles:
                handle.remove()
        self._cache.put(("dense", number, i), output)
        for name, x in found.items():
            self._cache.put((name, i), x)

    def _advance(self, number: int, i: int, seen: bool) -> None:
        """Keep the outputs of a block in both networks, and drop those of the block before it."""
        if number < len(self._dense) - 1:
            x = self._inputs(i)
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
