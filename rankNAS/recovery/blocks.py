"""Blocks of a network that can be trained one after another, each from its own inputs.

A block of a traced network is the shortest segment of its operations with one live tensor at both
ends and at least one layer of the space; operations without a layer belong to the block before
them. Values that depend on no layer, such as masks, do not count. In a network that cannot be
traced, a block is a module of a repeated list, such as the layers of a transformer, and any other
layer of the space is a block of its own.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rankNAS.compression.incremental import IncrementalExecutor
from rankNAS.trees import Inputs, map_children, named_tensors, tensors, tree_map

__all__ = ["Blocks", "main_tensor", "paired_blocks"]

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


@torch.no_grad()
def paired_blocks(
    dense: nn.Module,
    compressed: nn.Module,
    layers: Mapping[str, Sequence[str]],
    few: Inputs,
) -> tuple[Blocks, Blocks] | None:
    """The corresponding blocks of a dense network and of its compressed one.

    Args:
        dense: The dense network, in evaluation mode. In-place activations become out-of-place.
        compressed: The compressed network, likewise.
        layers: Per layer of the space, all of its paths in both networks.
        few: Inputs of a few samples.

    Returns:
        The blocks of both networks; None if there is no block.
    """
    traced = [IncrementalExecutor.of(model, layers, [few]) for model in (dense, compressed)]
    paths = {path for found in layers.values() for path in found}
    names = _repeated(dense, paths)
    if traced[0] is not None and traced[1] is not None and _alike(traced[0], traced[1]):
        spans = _spans(traced[0], paths, few)
        if len(spans) > 1 or paths.issuperset(names):
            return _TracedBlocks(traced[0], spans), _TracedBlocks(traced[1], spans)
    calls, links = _usable(dense, names, few)
    if not calls:
        return None
    return _ModuleBlocks(dense, calls, links), _ModuleBlocks(compressed, calls, links)


class _TracedBlocks(Blocks):
    """Segments of a traced network; a state is the live values at the start of a segment."""

    ends_network = True

    def __init__(self, stages: IncrementalExecutor, spans: Sequence[_Span]) -> None:
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

    def parameters(self, number: int) -> list[nn.Parameter]:
        return self._parameters[number]

    def _used(self, span: _Span) -> list[nn.Parameter]:
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
class _Span:
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


def _alike(first: IncrementalExecutor, second: IncrementalExecutor) -> bool:
    """Whether two networks have the same operations."""
    a, b = ([(node.op, str(node.target)) for node in found.nodes] for found in (first, second))
    return a == b


def _spans(stages: IncrementalExecutor, paths: set[str], few: Inputs) -> list[_Span]:
    """The segments of a traced network with at least one layer each."""
    nodes = stages.nodes
    calls = [n.op == "call_module" and str(n.target) in paths for n in nodes]
    ends = [(0, None), *_boundaries(stages, calls, few), (len(nodes), None)]
    spans: list[_Span] = []
    for (start, _), (stop, output) in zip(ends, ends[1:], strict=False):
        named = next((str(nodes[i].target) for i in range(start, stop) if calls[i]), None)
        if named is not None and (not spans or spans[-1].name):
            spans.append(_Span(named, start, stop, output))
        elif spans:  # operations without a layer, or a layer behind such a beginning
            last = spans.pop()
            spans.append(_Span(last.name or named or "", last.start, stop, output))
        else:
            spans.append(_Span("", start, stop, output))
    return spans


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


class _ReachedError(Exception):
    """The block has been called."""


class _ModuleBlocks(Blocks):
    """Modules of a network that cannot be traced; a state is the arguments of a module.

    Args:
        model: The network.
        names: Paths of the modules, in the order of their calls.
        links: For each module, whether its arguments are those of the module before it with the
            output of that module as the first tensor. Other arguments come from a forward pass.
    """

    ends_network = False

    def __init__(self, model: nn.Module, names: Sequence[str], links: Sequence[bool]) -> None:
        self._model, self.names, self._links = model, list(names), links
        self._modules = [model.get_submodule(name) for name in names]
        inside = {id(p) for m in self._modules for p in m.parameters()}
        count = Counter(id(p) for m in self._modules for p in m.parameters())
        blocks = {id(m) for block in self._modules for m in block.modules()}
        outer = [m for m in model.modules() if id(m) not in blocks]
        shared = {id(p) for m in outer for p in m.parameters(recurse=False)} & inside
        self._own = {p for p, uses in count.items() if uses == 1} - shared

    def first(self, x: Inputs) -> State:
        return self._arguments(0, x)

    def run(self, number: int, state: State, x: Inputs) -> Any:
        return main_tensor(_fresh(state).run(self._modules[number]))

    def advance(self, number: int, state: State, x: Inputs) -> tuple[Any, State]:
        output = self.run(number, state, x)
        if number + 1 == len(self.names):
            return output, None
        linked = self._links[number + 1]
        return output, _with_first(state, output) if linked else self._arguments(number + 1, x)

    def graph(self, x: Inputs) -> tuple[list[Tensor], Any]:
        outputs: list[Tensor] = []

        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            main = main_tensor(output)
            assert main is not None
            outputs.append(main if outputs else main.detach().requires_grad_())
            return tree_map(lambda y: outputs[-1] if y is main else y, output)

        handles = [module.register_forward_hook(hook) for module in self._modules]
        try:
            return outputs, x.copied().run(self._model)
        finally:
            for handle in handles:
                handle.remove()

    def parameters(self, number: int) -> list[nn.Parameter]:
        return [p for p in self._modules[number].parameters() if id(p) in self._own]

    def _arguments(self, number: int, x: Inputs) -> Inputs:
        """The arguments of a module, from a forward pass that ends there."""
        found: list[Inputs] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Inputs(args, kwargs))
            raise _ReachedError

        handle = self._modules[number].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            x.copied().run(self._model)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return _fresh(found[0])


def _fresh(inputs: Inputs) -> Inputs:
    """The arguments with their own tensors and objects: a module may change them, as a cache."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        changed = map_children(own, value)
        if changed is value and not isinstance(value, str | int | float | torch.dtype | None):
            return copy.deepcopy(value)
        return changed

    return Inputs(tuple(map(own, inputs.args)), {k: own(v) for k, v in inputs.kwargs.items()})


def _with_first(inputs: Inputs, tensor: Tensor | None) -> Inputs:
    """The arguments with another first floating-point tensor."""
    first = main_tensor(inputs)
    found: Inputs = tree_map(lambda x: tensor if x is first else x, inputs)
    return found


def _repeated(model: nn.Module, paths: set[str]) -> list[str]:
    """Modules of the repeated lists that contain layers, and all other layers of the space."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not _inside(name, found):
            children = {f"{name}.{i}" if name else str(i): m for i, m in enumerate(module)}
            alike = len(children) > 1 and len({type(m) for m in children.values()}) == 1
            if alike and any(_inside(path, children) for path in paths):
                found += [child for child in children if any(_inside(p, [child]) for p in paths)]
    return found + [path for path in sorted(paths) if not _inside(path, found)]


def _inside(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _usable(model: nn.Module, names: Sequence[str], few: Inputs) -> tuple[list[str], list[bool]]:
    """The modules that one forward pass calls once and that repeat their outputs; their links."""
    calls: list[tuple[str, Inputs, Any]] = []
    handles, waiting = [], {}
    for name in names:

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            waiting[name] = _fresh(Inputs(args, kwargs))

        def after(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            calls.append((name, waiting.pop(name), tree_map(torch.clone, output)))

        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        few.copied().run(model)
    finally:
        for handle in handles:
            handle.remove()
    count = Counter(name for name, _, _ in calls)
    kept = [call for call in calls if count[call[0]] == 1 and _repeats(model, *call)]
    links = [False] + [
        _equal(_with_first(a[1], main_tensor(a[2])), b[1])
        for a, b in zip(kept, kept[1:], strict=False)
    ]
    return [name for name, _, _ in kept], links


def _repeats(model: nn.Module, name: str, inputs: Inputs, output: Any) -> bool:
    """Whether a module called by itself gives the output that it had in the forward pass."""
    expected = main_tensor(output)
    if expected is None or main_tensor(inputs) is None:
        return False
    try:
        found = main_tensor(_fresh(inputs).run(model.get_submodule(name)))
    except Exception:  # it depends on more than its arguments
        return False
    return found is not None and torch.equal(found, expected)


def _equal(first: Inputs, second: Inputs) -> bool:
    a, b = dict(named_tensors(first)), dict(named_tensors(second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
