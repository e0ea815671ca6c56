"""Blocks of a network that can be trained one after another, each from its own inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from rankNAS.trees import Inputs, tensors

__all__ = ["Blocks", "JoinedBlocks", "State", "main_tensor"]

State = Any  # what a block needs besides the network's inputs, for one batch


class Blocks(ABC):
    """The blocks of one network.

    Attributes:
        names: One for each block, in the order of the forward pass.
        ends_network: Whether the output of the last block is that of the network.
    """

    names: list[str]
    ends_network: bool

    @abstractmethod
    def is_linked(self, number: int) -> bool:
        """Whether all gradients of a block's inputs pass through the block before it."""

    @abstractmethod
    def first(self, x: Inputs) -> State:
        """The state before the first block, for the inputs of the network."""

    @abstractmethod
    def run(self, number: int, state: State, x: Inputs) -> Any:
        """The output of a block for the state before it; see `main_tensor`.

        Args:
            number: The number of the block.
            state: The state before it.
            x: The inputs of the network.
        """

    @abstractmethod
    def advance(self, number: int, state: State, x: Inputs) -> tuple[Any, State]:
        """The output of a block and the state before the next one, for the state before it."""

    @abstractmethod
    def graph(self, x: Inputs) -> tuple[list[Tensor], Any]:
        """The blocks' main outputs and the network's output, with a graph from the first one on.

        The network's output itself is left out of the list.
        """

    @abstractmethod
    def parameters(self, number: int) -> list[nn.Parameter]:
        """The parameters that only this block uses."""


def main_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor of a block's output; None if there is none."""
    return next((x for x in tensors(output) if x.is_floating_point()), None)


class JoinedBlocks(Blocks):
    """Neighbouring blocks as one.

    A block whose output is that of the network stays alone: its divergence says less about the
    blocks before it than their outputs do, and several blocks overfit to it.

    Args:
        blocks: The blocks.
        most: The largest number of blocks to join; the first ones may be fewer.
    """

    def __init__(self, blocks: Blocks, most: int) -> None:
        self._blocks, self.ends_network = blocks, blocks.ends_network
        self._groups: list[list[int]] = []
        for number in reversed(range(len(blocks.names))):
            last = self._groups[0] if self._groups else []
            alone = blocks.ends_network and last == [len(blocks.names) - 1]
            if last and not alone and len(last) < most and blocks.is_linked(last[0]):
                last.insert(0, number)
            else:
                self._groups.insert(0, [number])
        self.names = [blocks.names[group[0]] for group in self._groups]

    def is_linked(self, number: int) -> bool:
        return self._blocks.is_linked(self._groups[number][0])

    def first(self, x: Inputs) -> State:
        return self._blocks.first(x)

    def run(self, number: int, state: State, x: Inputs) -> Any:
        *before, last = self._groups[number]
        for inner in before:
            _, state = self._blocks.advance(inner, state, x)
        return self._blocks.run(last, state, x)

    def advance(self, number: int, state: State, x: Inputs) -> tuple[Any, State]:
        output = None
        for inner in self._groups[number]:
            output, state = self._blocks.advance(inner, state, x)
        return output, state

    def graph(self, x: Inputs) -> tuple[list[Tensor], Any]:
        outputs, final = self._blocks.graph(x)
        ends = (group[-1] for group in self._groups)
        return [outputs[end] for end in ends if end < len(outputs)], final

    def parameters(self, number: int) -> list[nn.Parameter]:
        return [p for inner in self._groups[number] for p in self._blocks.parameters(inner)]
