"""Incremental forward passes: recompute only the operations after the first changed layer.

The forward pass is traced into a list of operations, with a cut point before each searched layer.
Live values at cut points are cached. After layers change, computation restarts at the first of
them. A network that cannot be traced faithfully is run as a whole.
"""

from __future__ import annotations

import inspect
import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankNAS.tasks.feeding import InputBatches
from rankNAS.trees import Inputs, count_bytes, rows, same_tensors

__all__ = ["CachedPass", "IncrementalExecutor"]

logger = logging.getLogger(__name__)
MEMORY = 1 << 30  # bytes of cached activations per pass
OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class IncrementalExecutor:
    """The traced operations of a network, in order, with the first use of each searched layer.

    Args:
        nodes: The operations, without the output node.
        result: The return value of the network.
        network: The traced network, without in-place operations; it shares its modules.
        cut_points: Per layer, the number of the first operation that depends on it.
    """

    def __init__(
        self, nodes: list[fx.Node], result: Any, network: nn.Module, cut_points: dict[str, int]
    ) -> None:
        self.nodes, self.result, self.network, self.cut_points = nodes, result, network, cut_points
        self._interpreter = fx.Interpreter(network)
        self._placeholders = [node for node in nodes if node.op == "placeholder"]
        place = {node: i for i, node in enumerate(nodes)}
        last_use = [i for i, _ in enumerate(nodes)]
        for i, node in enumerate(nodes):
            for other in node.all_input_nodes:
                last_use[place[other]] = i
        for other in _nodes_in(result):
            last_use[place[other]] = len(nodes)
        self.last_use: list[list[fx.Node]] = [[] for _ in range(len(nodes) + 1)]
        for node, last in zip(nodes, last_use, strict=True):
            self.last_use[last].append(node)

    @classmethod
    def of(
        cls, model: nn.Module, layers: Mapping[str, Sequence[str]], examples: Sequence[Inputs]
    ) -> IncrementalExecutor | None:
        """The executor of a traced model; None if the model cannot be traced.

        Args:
            model: In evaluation mode. Its in-place activations become out-of-place.
            layers: Per layer, all of its paths in the model.
            examples: One or more inputs on which the traced network must agree with the model.

        Returns:
            None if the model cannot be traced, or depends on state that the trace lacks.
        """
        try:
            with torch.no_grad():
                expected = [x.copied().run(model) for x in examples]
                stages = _trace(model, layers, examples[0])
                if stages is None:
                    return None
                actual = [stages.run({}, 0, x)[0] for x in examples]
            same = all(same_tensors(a, b) for a, b in zip(actual, expected, strict=True))
        except Exception as error:
            logger.debug("the model is not traced: %s", error, exc_info=True)
            return None
        return stages if same else None

    def run(
        self,
        values: dict[fx.Node, Any],
        start: int,
        x: Inputs,
        keep: Iterable[int] = (),
        stop: int | None = None,
    ) -> tuple[Any, dict[int, dict[fx.Node, Any]]]:
        """The network's output and cached live values, from operation `start` on.

        Args:
            values: Live values at `start`.
            start: Number of the first operation.
            x: The network's inputs.
            keep: Numbers of operations before which live values are cached.
            stop: Number of the operation to stop before; None runs to the end.

        Returns:
            The network's output (None if stopped early) and the cached values.
        """
        live_values = dict(values)
        kept: dict[int, dict[fx.Node, Any]] = {}
        end = len(self.nodes) if stop is None else stop
        self._compute(live_values, start, end, x, kept, set(keep))
        output = fx.node.map_arg(self.result, live_values.__getitem__) if stop is None else None
        return output, kept

    def advance(
        self, values: dict[fx.Node, Any], start: int, stop: int, x: Inputs
    ) -> dict[fx.Node, Any]:
        """Live values before operation `stop`, given those before `start`."""
        if start == stop:
            return values
        live_values = dict(values)
        self._compute(live_values, start, stop, x, {}, set())
        return live_values

    def input_of(self, number: int, values: dict[fx.Node, Any]) -> Tensor:
        """The first argument of an operation, given the live values before it."""
        found = fx.node.map_arg(self.input_node(number), values.__getitem__)
        assert isinstance(found, Tensor)
        return found

    def input_node(self, number: int) -> Any:
        """What computes the first argument of an operation; equal nodes have equal values."""
        node = self.nodes[number]
        return [*node.args, *node.kwargs.values()][0]

    def reads_inputs(self, start: int, stop: int) -> bool:
        """Whether operations from `start` to before `stop` need the network's inputs."""
        return any(node.op == "placeholder" for node in self.nodes[start:stop])

    def _compute(
        self,
        live_values: dict[fx.Node, Any],
        start: int,
        stop: int,
        x: Inputs,
        kept: dict[int, dict[fx.Node, Any]],
        keep: set[int],
    ) -> None:
        """Run operations and update `live_values`; `kept` receives those before each cut point."""
        for i in range(start, stop):
            if i in keep:
                kept[i] = dict(live_values)
            node = self.nodes[i]
            if node.op == "placeholder":
                live_values[node] = self._argument(node, x)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), live_values.__getitem__)
                live_values[node] = getattr(self._interpreter, node.op)(node.target, args, kwargs)
            for dead in self.last_use[i]:
                del live_values[dead]

    def _argument(self, node: fx.Node, x: Inputs) -> Any:
        """The value of a placeholder: by name, by position, or the parameter's default."""
        if node.target in x.kwargs:
            return x.kwargs[str(node.target)]
        position = self._placeholders.index(node)
        return x.args[position] if position < len(x.args) else node.args[0]


class CachedPass:
    """Repeated forward passes over the same inputs; each restarts at the first change.

    Args:
        stages: The traced network.
        batches: Its input batches.
        stop: As in `IncrementalExecutor.run`.
    """

    def __init__(
        self, stages: IncrementalExecutor, batches: InputBatches, *, stop: int | None = None
    ) -> None:
        self.stages, self.batches, self.stop = stages, batches, stop
        self._kept: dict[int, list[dict[fx.Node, Any]]] = {}
        self._done = False
        with torch.no_grad():
            self._cuts = self._affordable()

    def invalidate(self, first: int) -> None:
        """Mark the operations from number `first` on as changed."""
        self._done = False
        for cut in [c for c in self._kept if c > first]:
            del self._kept[cut]

    @property
    def start(self) -> int:
        """Number of the first operation of the next run; past the end if none is needed."""
        return len(self.stages.nodes) if self._done else max(self._kept, default=0)

    def run(self) -> None:
        """Recompute the changed operations, for their effects on the modules."""
        if not self._done:
            for _ in self.outputs():
                pass

    def outputs(self) -> Iterator[Any]:
        """The output of each batch; only changed operations are recomputed, and none is kept."""
        start = max(self._kept, default=0)
        cut_points = [c for c in self._cuts if c > start]
        before = self._kept.get(start)
        found: list[dict[int, dict[fx.Node, Any]]] = []
        for i in range(len(self.batches)):
            values = {} if before is None else before[i]
            with torch.no_grad():
                output, kept = self.stages.run(
                    values, start, self.batches[i], cut_points, self.stop
                )
            found.append(kept)
            yield output
            del output  # before the next forward pass
        self._kept |= {cut: [kept[cut] for kept in found] for cut in cut_points}
        self._done = True

    def _affordable(self) -> list[int]:
        """Evenly spaced cut points, as many as the memory allows."""
        cut_points = sorted(set(self.stages.cut_points.values()) - {0})
        first, size = self.batches[0], self.batches.sizes[0]
        few = rows(first, slice(0, 2), size)
        _, kept = self.stages.run({}, 0, few, cut_points, self.stop)
        sampled = count_bytes([list(values.values()) for values in kept.values()])
        total = sampled * self.batches.samples / min(2, size)
        return list(kept)[:: max(1, math.ceil(total / MEMORY))]


def _trace(
    model: nn.Module, layers: Mapping[str, Sequence[str]], example: Inputs
) -> IncrementalExecutor | None:
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    owner = {path: name for name, paths in layers.items() for path in paths}
    tracer = _Tracer({id(model.get_submodule(path)) for path in owner})
    graph = tracer.trace(model, concrete_args=_defaults(model, example))
    traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
    nodes = list(traced.graph.nodes)
    if not all(_made_out_of_place(node) for node in nodes):
        return None
    calls = [node.target for node in nodes if node.op == "call_module"]
    norms = [n for n, m in traced.named_modules() if isinstance(m, _BatchNorm)]
    # The statistics of a norm that is called twice depend on operations before a cut.
    if any(calls.count(name) != 1 for name in norms):
        return None
    users: dict[str, int] = {}
    for i, node in enumerate(nodes):
        path = str(node.target)
        if node.op == "get_attr" and path.rpartition(".")[0] in owner:
            return None  # an operation outside the layer depends on its weight
        if node.op == "call_module" and path in owner:
            users.setdefault(owner[path], i)
    if set(users) != set(layers):
        return None
    (output,) = (node for node in nodes if node.op == "output")
    if nodes[-1] is not output:
        return None
    return IncrementalExecutor(nodes[:-1], output.args[0], traced, users)


class _Tracer(fx.Tracer):  # type: ignore[misc]
    """Records searched layers and batch norms, also of derived classes, as single operations.

    A batch norm that is traced through would neither update its statistics nor be found.
    """

    def __init__(self, layers: set[int]) -> None:
        super().__init__()
        self._layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = id(m) in self._layers or isinstance(m, _BatchNorm)
        return known or super().is_leaf_module(m, module_qualified_name)


def _made_out_of_place(node: fx.Node) -> bool:
    """Replace an in-place operation by its out-of-place form; False if that is impossible."""
    if node.op == "call_function":
        node.target = OUT_OF_PLACE.get(node.target, node.target)
        name = getattr(node.target, "__name__", "")
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        flags = any(argument is True for argument in node.args)  # may be a positional `inplace`
        return not (name.endswith("_") or name in ("setitem", "delitem") or flags)
    if node.op == "call_method" and str(node.target).endswith("_"):
        node.target = str(node.target).rstrip("_")
        return hasattr(torch.Tensor, str(node.target))
    return True


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _defaults(model: nn.Module, example: Inputs) -> dict[str, Any]:
    """The parameters of the forward method that the inputs leave out, with their defaults."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return {
        p.name: p.default
        for i, p in enumerate(parameters)
        if i >= len(example.args)
        and p.name not in example.kwargs
        and p.default is not inspect.Parameter.empty
    }
