"""Walks through a network that cannot be traced, block by block."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.compression.batch_norm import averaging_anew, training_layers
from rankNAS.compression.patches import same_patches
from rankNAS.search_spaces.base import Layer
from rankNAS.trees import Inputs, rows, same_tensors, tree_map

__all__ = ["BlockWalk"]

logger = logging.getLogger(__name__)
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
Site = tuple[list[str], Iterator[Tensor | None]]


class BlockWalk:
    """A walk by blocks; see `Walk`.

    A block is an element of a list of modules, or a child of the network. The network runs up to a
    block with kept outputs in place of the blocks before it. Up to a layer, only its block runs.
    Where a block needs no outputs but those of the block before it, older ones are freed. The
    network is a single block if its blocks cannot be run on their own.

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
        blocks = [network.get_submodule(path) for path in _block_paths(network, list(layers))]
        calls = _Calls.of(network, blocks, layers, few)
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
                outputs |= {i: tree_map(_freed, y) for i, y in outputs.items() if i < number - 1}
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
                raise _ReachedError(Inputs(args, kwargs))
            if number in kept:
                return tree_map(torch.clone, kept[number])
            output = original(*args, **kwargs)
            if target is not None:
                kept[number] = tree_map(torch.clone, output)
            return output

        own = [block.__dict__.get("forward") for block in self._blocks]
        for number, block in enumerate(self._blocks):
            block.forward = partial(forward, number, block.forward)
        try:
            with torch.no_grad():
                return None, x.copied().run(self._network)
        except _ReachedError as reached:
            return reached.inputs, None
        finally:
            for block, before in zip(self._blocks, own, strict=True):
                del block.forward
                if before is not None:
                    block.forward = before

    def _input(self, number: int, name: str, inputs: Inputs | None) -> Tensor | None:
        """The input of a layer inside a block; None if the layer is not called."""
        if inputs is None:
            return None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _ReachedError(Inputs(args, kwargs))

        layer = self._network.get_submodule(name)
        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                # A copy of everything: a block may also change a cache among its inputs.
                copy.deepcopy(inputs).run(self._blocks[number])
        except _ReachedError as reached:
            found: Tensor = reached.inputs.first.detach()
            return found
        finally:
            handle.remove()
        return None

    def _is_faithful(self, few: Inputs, calls: _Calls) -> bool:
        """Whether a walk finds the inputs and the output of an ordinary forward pass."""
        last: list[Any] = []
        try:
            for names, (found,) in self._walk([few], last):
                if not same_tensors(found, calls.inputs.get(names[0])):
                    return False
        except Exception as error:
            logger.debug("blocks are not run on their own: %s", error, exc_info=True)
            return False
        return same_tensors(last[0], calls.output)


class _ReachedError(Exception):
    """The target has been called."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs


@dataclass(frozen=True)
class _Calls:
    """What happens in an ordinary forward pass on a few samples.

    Args:
        blocks: The blocks, in the order of their calls.
        inputs: A copy of the first input of each layer, in the order of the calls.
        same: Each layer's input as it is, to tell whether two layers have the same.
        output: The network's output.
    """

    blocks: list[nn.Module]
    inputs: dict[str, Tensor]
    same: dict[str, int]
    output: Any

    @classmethod
    def of(
        cls,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        layers: Mapping[str, Layer],
        few: Inputs,
    ) -> _Calls:
        """Run the network on a few samples."""
        called: list[nn.Module] = []
        inputs: dict[str, Tensor] = {}
        alive: dict[str, Any] = {}

        def reached(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in inputs:
                alive[name] = Inputs(args, kwargs).first
                inputs[name] = alive[name].detach().clone()

        handles = [
            block.register_forward_pre_hook(lambda module, args: called.append(module))
            for block in blocks
        ]
        handles += [
            network.get_submodule(name).register_forward_pre_hook(
                partial(reached, name), with_kwargs=True
            )
            for name in layers
        ]
        try:
            with torch.no_grad():
                output = few.copied().run(network)
        finally:
            for handle in handles:
                handle.remove()
        return cls(called, inputs, {name: id(x) for name, x in alive.items()}, output)

    def once(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether each block is called exactly once."""
        return sorted(map(id, self.blocks)) == sorted({id(block) for block in blocks})

    def sites(
        self, network: nn.Module, block: nn.Module, layers: Mapping[str, Layer]
    ) -> list[list[str]]:
        """A block's layers in the order of their calls, those with the same inputs together."""
        inside = {id(module) for module in block.modules()}
        order = [*self.inputs, *(name for name in layers if name not in self.inputs)]
        found: list[list[str]] = []
        for name in order:
            if id(network.get_submodule(name)) not in inside:
                continue
            before = found[-1][0] if found else name
            same = before != name and self.same.get(before, 0) == self.same.get(name, 1)
            if same and same_patches(layers[before].shape, layers[name].shape):
                found[-1].append(name)
            else:
                found.append([name])
        return found


def _block_paths(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of modules that hold all layers: elements of lists, or children of the network.

    A module that has a list inside is searched further, and so is an only child.
    """

    def search(module: nn.Module, prefix: str) -> list[str]:
        children = [
            (f"{prefix}{name}", child)
            for name, child in module.named_children()
            if any(f"{n}.".startswith(f"{prefix}{name}.") for n in names)
        ]
        found = []
        for path, child in children:
            several = len(children) > 1
            element = several and (isinstance(module, LISTS) or not _has_list(child))
            found += [path] if element or path in names else search(child, f"{path}.")
        return found

    return search(network, "") or [""]


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(m, LISTS) and len(list(m.children())) > 1 for m in module.modules())


def _freed(tensor: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)
