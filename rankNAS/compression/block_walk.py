"""Walks through a network that cannot be traced, block by block."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.compression.batch_norm import averaging_anew, training_layers
from rankNAS.compression.blocks import (
    Calls,
    ReachedError,
    block_paths,
    digest,
    freed,
    standing_in,
)
from rankNAS.search_spaces.base import Layer
from rankNAS.trees import Inputs, rows, tree_map

__all__ = ["BlockWalk"]

logger = logging.getLogger(__name__)
Site = tuple[list[str], Iterator[Tensor | None]]


class BlockWalk:
    """A walk by blocks; see `Walk`.

    Up to a layer, only its block runs. Where a block needs no outputs but those of the block
    before it, older ones are freed. The network is a single block if its blocks cannot be run on
    their own.

    Args:
        network: In the mode in which it runs.
        layers: The layers.
        batches: The inputs.
        size: Samples of the first batch.
    """

    def __init__(
        self, network: nn.Module, layers: Mapping[str, Layer], batches: Sequence[Inputs], size: int
    ) -> None:
        self._network, self._batches = network, batches
        self._norms = training_layers(network)
        few = rows(batches[0], slice(0, 2), size)
        blocks = [network.get_submodule(path) for path in block_paths(network, list(layers))]
        calls = Calls.of(network, blocks, layers, few)
        options = [([network], False)]
        if calls.once(blocks):
            inside = {id(module) for block in blocks for module in block.modules()}
            # Batch norms between blocks see the outputs of all blocks once more, at the end.
            free = all(id(norm) in inside for norm in self._norms)
            freeing = [(calls.blocks, True)] if free else []
            options = [*freeing, (calls.blocks, False), *options]
        for self._blocks, self._frees in options:
            self._sites = [calls.sites(network, block, layers) for block in self._blocks]
            if self._blocks == [network] or self._is_faithful(few, calls):
                break

    def sites(self) -> Iterator[Site]:
        """See `Walk.sites`."""
        with averaging_anew(self._norms):
            yield from self._walk(self._batches)

    def _walk(self, batches: Sequence[Inputs], last: list[Any] | None = None) -> Iterator[Site]:
        """The sites; the outputs of the network are added to `last`, if it is given."""
        kept: list[dict[int, Any]] = [{} for _ in batches]
        for number, sites in enumerate(self._sites):
            if not sites:
                continue
            self._reset(kept)
            inputs = [self._run(batches[i], k, number)[0] for i, k in enumerate(kept)]
            for outputs in kept if self._frees else ():
                outputs |= {i: tree_map(freed, y) for i, y in outputs.items() if i < number - 1}
            for names in sites:
                self._reset(kept)
                yield list(names), (self._input(number, names[0], x) for x in inputs)
        if self._norms or last is not None:
            self._reset(kept)
            for i, outputs in enumerate(kept):
                _, output = self._run(batches[i], outputs, None)
                if last is not None:
                    last.append(output)

    def _reset(self, kept: Sequence[Mapping[int, Any]]) -> None:
        """Discard the statistics of batch norms, except in blocks whose outputs are kept."""
        done = {i for outputs in kept for i in outputs}
        final = {id(module) for i in done for module in self._blocks[i].modules()}
        for norm in self._norms:
            if id(norm) not in final:
                norm.reset_running_stats()

    def _run(
        self, x: Inputs, kept: dict[int, Any], target: int | None
    ) -> tuple[Inputs | None, Any]:
        """Run the network up to a block or to its end; the block's inputs, or the output."""

        def forward(number: int, original: Any, *args: Any, **kwargs: Any) -> Any:
            if number == target:
                raise ReachedError(Inputs(args, kwargs))
            if number in kept:
                return tree_map(torch.clone, kept[number])
            output = original(*args, **kwargs)
            if target is not None:
                kept[number] = tree_map(torch.clone, output)
            return output

        with standing_in(self._blocks, forward), torch.no_grad():
            try:
                return None, x.copied().run(self._network)
            except ReachedError as reached:
                return reached.inputs, None

    def _input(self, number: int, name: str, inputs: Inputs | None) -> Tensor | None:
        """The input of a layer inside a block; None if the layer is not called."""
        if inputs is None:
            return None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise ReachedError(Inputs(args, kwargs))

        layer = self._network.get_submodule(name)
        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                # A copy of everything: a block may also change a cache among its inputs.
                copy.deepcopy(inputs).run(self._blocks[number])
        except ReachedError as reached:
            assert reached.inputs is not None
            found: Tensor = reached.inputs.first.detach()
            return found
        finally:
            handle.remove()
        return None

    def _is_faithful(self, few: Inputs, calls: Calls) -> bool:
        """Whether a walk finds the inputs and the output of an ordinary forward pass."""
        last: list[Any] = []
        try:
            for names, (found,) in self._walk([few], last):
                if digest(found) != calls.inputs.get(names[0], digest(None)):
                    return False
        except Exception as error:
            logger.debug("blocks are not run on their own: %s", error, exc_info=True)
            return False
        return digest(last[0]) == calls.output
