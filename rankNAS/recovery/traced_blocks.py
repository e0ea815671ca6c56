"""Blocks of a traced network: the shortest segments with one live tensor at both ends.

Each has at least one layer of the space; operations without a layer belong to the block before
them. Values that depend on no layer, such as masks, do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from rankNAS.compression.incremental import IncrementalExecutor
from rankNAS.recovery.blocks import Blocks, State
from rankNAS.trees import Inputs

__all__ = ["Span", "TracedBlocks", "have_equal_operations", "spans"]


class TracedBlocks(Blocks):
    """Segments of a traced network; a state is the live values at the start of a segment."""

    ends_network = True

    def __init__(self, stages: IncrementalExecutor, spans: Sequence[Span]) -> None:
        self._stages, self._spans = stages, spans
        self.names = [span.name for span in spans]
        used = [self._used(span) for span in spans]
        count = Counter(id(p) for found in used for p in set(found))
        self._parameters = [[p for p in found if count[id(p)] == 1] for found in used]

    def first(self, x: Inputs) -> State:
        return {}

    def run(self, number: int, state: State, x: Inputs) -> Any:
        return self.advance(number, state, x)[0]

    def advance(self, number: int, state: State, x: Inputs) -> tuple[Any, State]:
        span = self._spans[number]
        if span.output is None:
            return self._stages.run(state, span.start, x)[0], {}
        after = self._stages.advance(state, span.start, span.stop, x)
        return after[self._stages.nodes[span.output]], after

    def graph(self, x: Inputs) -> tuple[list[Tensor], Any]:
        outputs: list[Tensor] = []
        state = self.first(x)
        for number, span in enumerate(self._spans):
            output, state = self.advance(number, state, x)
            if span.output is not None:
                if not outputs:
                    output = output.detach().requires_grad_()
                    state[self._stages.nodes[span.output]] = output
                outputs.append(output)
        return outputs, output

    def is_linked(self, number: int) -> bool:
        return True

    def parameters(self, number: int) -> list[nn.Parameter]:
        return self._parameters[number]

    def _used(self, span: Span) -> list[nn.Parameter]:
        found: dict[int, nn.Parameter] = {}
        for node in self._stages.nodes[span.start : span.stop]:
            if node.op == "call_module":
                module = self._stages.network.get_submodule(str(node.target))
                found |= {id(p): p for p in module.parameters()}
            elif node.op == "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                value = getattr(self._stages.network.get_submodule(owner), name)
                if isinstance(value, nn.Parameter):
                    found[id(value)] = value
        return list(found.values())


@dataclass(frozen=True)
class Span:
    """A segment of the operations.

    Args:
        name: The first layer of the space in it.
        start: Number of its first operation.
        stop: Number of the operation after its last.
        output: Number of the operation whose value is its output; None for that of the network.
    """

    name: str
    start: int
    stop: int
    output: int | None


def have_equal_operations(first: IncrementalExecutor, second: IncrementalExecutor) -> bool:
    """Whether two networks have the same operations."""
    a, b = ([(node.op, str(node.target)) for node in found.nodes] for found in (first, second))
    return a == b


def spans(stages: IncrementalExecutor, paths: set[str], few: Inputs) -> list[Span]:
    """The segments of a traced network with at least one layer each."""
    nodes = stages.nodes
    calls = [n.op == "call_module" and str(n.target) in paths for n in nodes]
    ends = [(0, None), *_boundaries(stages, calls, few), (len(nodes), None)]
    found: list[Span] = []
    for (start, _), (stop, output) in zip(ends, ends[1:], strict=False):
        named = next((str(nodes[i].target) for i in range(start, stop) if calls[i]), None)
        if named is not None and (not found or found[-1].name):
            found.append(Span(named, start, stop, output))
        elif found:  # operations without a layer, or a layer behind such a beginning
            last = found.pop()
            found.append(Span(last.name or named or "", last.start, stop, output))
        else:
            found.append(Span("", start, stop, output))
    return found


def _boundaries(
    stages: IncrementalExecutor, calls: Sequence[bool], few: Inputs
) -> Iterator[tuple[int, int]]:
    """Numbers of operations before which one live value depends on layers; and its own number."""
    place = {node: i for i, node in enumerate(stages.nodes)}
    depends: set[fx.Node] = set()
    live: dict[fx.Node, Any] = {}
    for i, node in enumerate(stages.nodes):
        live = stages.advance(live, i, i + 1, few)
        if calls[i] or any(other in depends for other in node.all_input_nodes):
            depends.add(node)
        dependent = [other for other in live if other in depends]
        if len(dependent) == 1 and i + 1 < len(stages.nodes):
            value = live[dependent[0]]
            if isinstance(value, Tensor) and value.is_floating_point():
                yield i + 1, place[dependent[0]]
