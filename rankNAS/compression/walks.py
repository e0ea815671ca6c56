"""Walks through a network that changes: the inputs of one layer after another, for all batches.

A layer may be changed once its inputs are known; later inputs then follow from the change. Where
the network can be traced, no operation runs twice. Other networks run block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, fx, nn

from rankNAS.compression.batch_norm import averaging_anew, training_layers
from rankNAS.compression.block_walk import BlockWalk
from rankNAS.compression.incremental import IncrementalExecutor
from rankNAS.compression.patches import same_patches
from rankNAS.search_spaces.base import Layer
from rankNAS.tasks.feeding import InputBatches
from rankNAS.trees import Inputs, rows

__all__ = ["StagedWalk", "Walk", "walk_through"]


class Walk(Protocol):
    """Walks through a network; each starts at the beginning.

    After a walk, batch norms in training mode hold the plain average of their statistics over the
    batches, from one pass in which all layers are as they were left.
    """

    def sites(self) -> Iterator[tuple[list[str], Iterator[Tensor | None]]]:
        """The layers in order, those with the same inputs together, with these inputs by batch.

        Inputs are None if the layers are not called. They must be read before the layers are
        changed, and before the next site.
        """


def walk_through(network: nn.Module, layers: Mapping[str, Layer], batches: InputBatches) -> Walk:
    """The walk through a network: by operations if it can be traced, else by blocks.

    Args:
        network: In the mode in which it runs.
        layers: The layers.
        batches: The inputs.
    """
    few = rows(batches[0], slice(0, 2), batches.sizes[0])
    paths = {name: layer.paths for name, layer in layers.items()}
    executor = IncrementalExecutor.of(network, paths, [few])
    if executor is None:
        return BlockWalk(network, layers, batches, batches.sizes[0])
    return StagedWalk(executor, network, layers, batches)


class StagedWalk:
    """A walk by operations: live values are carried from layer to layer, for all batches.

    Args:
        executor: The traced network.
        network: The network.
        layers: The layers.
        batches: The inputs.
    """

    def __init__(
        self,
        executor: IncrementalExecutor,
        network: nn.Module,
        layers: Mapping[str, Layer],
        batches: InputBatches,
    ) -> None:
        self._executor, self._batches = executor, batches
        self._norms = training_layers(network)
        self._sites: list[list[str]] = []
        for name in sorted(layers, key=lambda name: executor.cut_points[name]):
            before = layers[self._sites[-1][0]] if self._sites else None
            if before is not None and self._are_alike(before, layers[name]):
                self._sites[-1].append(name)
            else:
                self._sites.append([name])

    def sites(self) -> Iterator[tuple[list[str], Iterator[Tensor | None]]]:
        """See `Walk.sites`."""
        executor = self._executor
        with averaging_anew(self._norms):
            values: list[dict[fx.Node, Any]] = [{} for _ in self._batches]
            at = 0
            for names in self._sites:
                cut = executor.cut_points[names[0]]
                self._advance(values, at, cut)
                at = cut
                yield list(names), (executor.input_of(cut, live) for live in values)
            self._advance(values, at, self._end())

    def _are_alike(self, first: Layer, other: Layer) -> bool:
        """Whether two layers have the same patches."""
        cuts = [self._executor.cut_points[layer.name] for layer in (first, other)]
        same = self._executor.input_node(cuts[0]) is self._executor.input_node(cuts[1])
        return same and same_patches(first.shape, other.shape)

    def _advance(self, values: list[dict[fx.Node, Any]], at: int, to: int) -> None:
        """Replace the live values before one operation by those before a later one."""
        if to <= at:
            return
        reads = self._executor.reads_inputs(at, to)
        for i in range(len(values)):
            x = self._batches[i] if reads else Inputs((), {})
            values[i] = self._executor.advance(values[i], at, to, x)

    def _end(self) -> int:
        """Number of the operation after the last batch norm."""
        modules = dict(self._executor.network.named_modules())
        own = set(map(id, self._norms))
        calls = enumerate(self._executor.nodes)
        return max((i + 1 for i, n in calls if id(modules.get(str(n.target))) in own), default=0)
