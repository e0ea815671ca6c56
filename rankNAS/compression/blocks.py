"""The blocks of a network, which run one after another.

A block is an element of a list of modules, or a child of the network. The network runs up to a
block with kept outputs in place of the blocks before it, so that what lies between two blocks
need not be known.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.compression.patches import same_patches
from rankNAS.search_spaces.base import Layer
from rankNAS.tasks.headed import without_head
from rankNAS.trees import Inputs, floating_tensors, tree_map

__all__ = [
    "BlockChain",
    "Calls",
    "ReachedError",
    "block_paths",
    "digest",
    "freed",
    "graded",
    "leaf",
    "standing_in",
]

logger = logging.getLogger(__name__)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class ReachedError(Exception):
    """The target has been called.

    Args:
        inputs: Its arguments, if they are wanted.
        output: Its output, if that is wanted.
    """

    def __init__(self, inputs: Inputs | None = None, output: Any = None) -> None:
        super().__init__()
        self.inputs, self.output = inputs, output


class BlockChain:
    """Blocks each of which needs no outputs but those of the block before it.

    Args:
        network: The network, in evaluation mode.
        blocks: Its blocks, in the order of their calls.
        sites: For each block its layers in order, those with the same inputs together.
    """

    def __init__(
        self, network: nn.Module, blocks: Sequence[nn.Module], sites: Sequence[list[list[str]]]
    ) -> None:
        self.network, self.blocks, self.sites = network, list(blocks), list(sites)

    def __len__(self) -> int:
        return len(self.blocks)

    @classmethod
    def of(cls, network: nn.Module, layers: Mapping[str, Layer], few: Inputs) -> BlockChain | None:
        """The chain of a network; None if its blocks cannot be run on their own.

        Args:
            network: The network, in evaluation mode.
            layers: The layers; blocks without any are joined to their neighbours.
            few: The inputs on which the chain must agree with an ordinary forward pass.
        """
        blocks = [network.get_submodule(path) for path in block_paths(network, list(layers))]
        calls = Calls.of(network, blocks, layers, few)
        if len(blocks) < 2 or not calls.once(blocks):
            return None
        sites = [calls.sites(network, block, layers) for block in calls.blocks]
        chain = cls(network, calls.blocks, sites)
        return chain if chain._is_faithful(few, calls, layers) else None

    def run(self, number: int, x: Inputs, before: Sequence[Any], *, whole: bool = False) -> Any:
        """The output of a block, or with ``whole`` of the network from this block on.

        Args:
            number: The number of the block; one beyond the last is the end of the network.
            x: The inputs of the network.
            before: The outputs of the blocks before it, of which all but the last may be `freed`.
            whole: Whether to run to the end of the network.
        """

        def forward(position: int, original: Any, *args: Any, **kwargs: Any) -> Any:
            if position < number:
                return tree_map(torch.clone, before[position])
            return original(*args, **kwargs)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not whole:  # after the block's own hooks
                raise ReachedError(output=output)

        handle = self.blocks[min(number, len(self) - 1)].register_forward_hook(hook)
        with standing_in(self.blocks, forward):
            try:
                return x.copied().run(self.network)
            except ReachedError as reached:
                return reached.output
            finally:
                handle.remove()

    def input(self, number: int, x: Inputs, before: Sequence[Any], name: str) -> Tensor | None:
        """The input of a layer inside a block; None if the layer is not called.

        Args:
            number: The number of the block.
            x: As for `run`.
            before: As for `run`.
            name: The layer.
        """
        found: list[Any] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Inputs(args, kwargs).first.detach())
            raise ReachedError

        handle = self.network.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

        def forward(position: int, original: Any, *args: Any, **kwargs: Any) -> Any:
            if position < number:
                return tree_map(torch.clone, before[position])
            original(*args, **kwargs)
            raise ReachedError

        with standing_in(self.blocks, forward), suppress(ReachedError):
            try:
                x.copied().run(self.network)
            finally:
                handle.remove()
        return found[0] if found else None

    def of_copy(self, network: nn.Module) -> BlockChain:
        """The chain of a copy of the network."""
        paths = {id(module): path for path, module in self.network.named_modules()}
        blocks = [network.get_submodule(paths[id(block)]) for block in self.blocks]
        return BlockChain(network, blocks, self.sites)

    @torch.no_grad()
    def _is_faithful(self, few: Inputs, calls: Calls, layers: Mapping[str, Layer]) -> bool:
        """Whether a walk finds the inputs and the output of an ordinary forward pass."""
        found: dict[str, str] = {}
        handles = [
            self.network.get_submodule(name).register_forward_pre_hook(
                partial(_note_input, found, name), with_kwargs=True
            )
            for name in layers
        ]
        outputs: list[Any] = []
        try:
            for number in range(len(self) - 1):
                output = self.run(number, few, outputs)
                outputs = [tree_map(freed, y) for y in outputs] + [output]
            with without_head(self.network):
                final = self.run(len(self) - 1, few, outputs, whole=True)
        except Exception as error:
            logger.debug("blocks are not run on their own: %s", error, exc_info=True)
            return False
        finally:
            for handle in handles:
                handle.remove()
        return found == calls.inputs and digest(final) == calls.output


@contextmanager
def standing_in(blocks: Sequence[nn.Module], forward: Any) -> Iterator[None]:
    """Context in which a function, given a block's number and method, runs in place of blocks."""
    own = [block.__dict__.get("forward") for block in blocks]
    for number, block in enumerate(blocks):
        block.forward = partial(forward, number, block.forward)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


@dataclass(frozen=True)
class Calls:
    """What happens in an ordinary forward pass on a few samples.

    Args:
        blocks: The blocks, in the order of their calls.
        inputs: The `digest` of the first input of each layer, in the order of the calls.
        same: A number for each layer; equal for layers that are called one after another with
            the same tensor.
        output: The `digest` of the network's output.
    """

    blocks: list[nn.Module]
    inputs: dict[str, str]
    same: dict[str, int]
    output: str

    @classmethod
    def of(
        cls,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        layers: Mapping[str, Layer],
        few: Inputs,
    ) -> Calls:
        """Run the network on a few samples."""
        called: list[nn.Module] = []
        inputs: dict[str, str] = {}
        same: dict[str, int] = {}
        last: list[Any] = [None]  # alive, so that no other tensor is taken for it

        def reached(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            if name in inputs:
                return
            x = Inputs(args, kwargs).first
            same[name] = len(inputs) if x is not last[0] else next(reversed(same.values()))
            _note_input(inputs, name, module, args, kwargs)
            last[0] = x

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
            with torch.no_grad(), without_head(network):
                output = few.copied().run(network)
        finally:
            for handle in handles:
                handle.remove()
        return cls(called, inputs, same, digest(output))

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
            same = before != name and self.same.get(before, -1) == self.same.get(name, -2)
            if same and same_patches(layers[before].shape, layers[name].shape):
                found[-1].append(name)
            else:
                found.append([name])
        return found


def _note_input(
    found: dict[str, str], name: str, module: nn.Module, args: Any, kwargs: Any
) -> None:
    """Keep the digest of the first input of a layer's first call."""
    if name not in found:
        found[name] = digest(Inputs(args, kwargs).first)


def digest(tree: Any) -> str:
    """A key of the shapes and contents of all tensors, which takes no memory to keep."""
    found: list[str] = []

    def add(tensor: Tensor) -> Tensor:
        flat = tensor.detach().contiguous().reshape(-1)
        kind = _BITS.get(flat.element_size(), torch.uint8)
        bits = flat.view(torch.uint8) if flat.dtype.is_complex else flat.view(kind)
        # Exact sums of integers in two orders: equal bits give equal sums on every machine.
        sums = int(bits.sum()), int(bits[::2].sum())
        found.append(f"{tuple(tensor.shape)} {tensor.dtype} {sums}")
        return tensor

    tree_map(add, tree)
    return "; ".join(found)


def block_paths(network: nn.Module, names: Sequence[str]) -> list[str]:
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


def leaf(tensor: Tensor) -> Tensor:
    """A tensor that a backward pass ends at, if it holds floating-point numbers."""
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def graded(output: Any, gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a block's output that need gradients, and their known gradients."""
    pairs = zip(floating_tensors(output), gradients, strict=True)
    known = [(y, g) for y, g in pairs if y.requires_grad]
    return [y for y, _ in known], [g for _, g in known]


def freed(tensor: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)
