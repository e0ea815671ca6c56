"""Incremental forward passes: recompute only the operations after the first changed layer.

The forward pass is traced into a list of operations, with a cut point before each searched layer.
Live values at cut points are cached. After layers change, computation restarts at the first of
them. A network that cannot be traced faithfully is run as a whole.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
        cls, model: nn.Module, layers: Mapping[str, Sequence[str]], examples: Iterable[Tensor]
    ) -> IncrementalExecutor | None:
        """The executor of a traced model; None if the model cannot be traced.

        Args:
            model: In evaluation mode. Its in-place activations become out-of-place.
            layers: Per layer, all of its paths in the model.
            examples: Inputs on which the traced network must agree with the model.

        Returns:
            None if the model cannot be traced, or depends on state that the trace lacks.
        """
        try:
            with torch.no_grad():
                expected = [model(x) for x in examples]
                stages = _trace(model, layers)
                if stages is None:
                    return None
                actual = [stages.run({}, 0, x)[0] for x in examples]
            same = all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        except Exception as error:
            logger.debug("the model is not traced: %s", error, exc_info=True)
            return None
        return stages if same else None

    def run(
        self,
        values: dict[fx.Node, Any],
        start: int,
        x: Tensor,
        keep: Iterable[int] = (),
        stop: int | None = None,
    ) -> tuple[Any, dict[int, dict[fx.Node, Any]]]:
        """The network's output and cached live values, from operation `start` on.

        Args:
            values: Live values at `start`.
            start: Number of the first operation.
            x: The network's input.
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
        self, values: dict[fx.Node, Any], start: int, stop: int, x: Tensor
    ) -> dict[fx.Node, Any]:
        """Live values before operation `stop`, given those before `start`."""
        if start == stop:
            return values
        live_values = dict(values)
        self._compute(live_values, start, stop, x, {}, set())
        return live_values

    def input_of(self, number: int, values: dict[fx.Node, Any]) -> Tensor:
        """The first argument of an operation, given the live values before it."""
        node = self.nodes[number]
        first = [*node.args, *node.kwargs.values()][0]
        found = fx.node.map_arg(first, values.__getitem__)
        assert isinstance(found, Tensor)
        return found

    def _compute(
        self,
        live_values: dict[fx.Node, Any],
        start: int,
        stop: int,
        x: Tensor,
        kept: dict[int, dict[fx.Node, Any]],
        keep: set[int],
    ) -> None:
        """Run operations and update `live_values`; `kept` receives those before each cut point."""
        for i in range(start, stop):
            if i in keep:
                kept[i] = dict(live_values)
            node = self.nodes[i]
            if node.op == "placeholder":
                live_values[node] = x
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), live_values.__getitem__)
                live_values[node] = getattr(self._interpreter, node.op)(node.target, args, kwargs)
            for dead in self.last_use[i]:
                del live_values[dead]


class CachedPass:
    """Repeated forward passes over the same inputs; each restarts at the first change.

    Args:
        stages: The traced network.
        batches: Its input batches.
        stop: As in `IncrementalExecutor.run`.
    """

    def __init__(
        self, stages: IncrementalExecutor, batches: Sequence[Tensor], *, stop: int | None = None
    ) -> None:
        self.stages, self.batches, self.stop = stages, batches, stop
        self._kept: dict[int, list[dict[fx.Node, Any]]] = {}
        self._outputs: list[Any] | None = None
        with torch.no_grad():
            self._cuts = self._affordable()

    def invalidate(self, first: int) -> None:
        """Mark the operations from number `first` on as changed."""
        self._outputs = None
        for cut in [c for c in self._kept if c > first]:
            del self._kept[cut]

    @property
    def start(self) -> int:
        """Number of the first operation of the next run; past the end if none is needed."""
        if self._outputs is not None:
            return len(self.stages.nodes)
        return max(self._kept, default=0)

    @torch.no_grad()
    def run(self) -> list[Any]:
        """The outputs of all batches; only changed operations are recomputed."""
        if self._outputs is None:
            start = self.start
            cut_points = [c for c in self._cuts if c > start]
            before = self._kept.get(start) or [{} for _ in self.batches]
            runs = [
                self.stages.run(values, start, x, cut_points, self.stop)
                for values, x in zip(before, self.batches, strict=True)
            ]
            self._kept |= {cut: [kept[cut] for _, kept in runs] for cut in cut_points}
            self._outputs = [output for output, _ in runs]
        return self._outputs

    def _affordable(self) -> list[int]:
        """Evenly spaced cut points, as many as the memory allows."""
        cut_points = sorted(set(self.stages.cut_points.values()) - {0})
        few = self.batches[0][:2]
        _, kept = self.stages.run({}, 0, few, cut_points, self.stop)
        sampled = sum(_bytes(values.values()) for values in kept.values())
        total = sampled * sum(map(len, self.batches)) / len(few)
        return list(kept)[:: max(1, math.ceil(total / MEMORY))]


def _trace(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> IncrementalExecutor | None:
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    traced = fx.symbolic_trace(model)
    nodes = list(traced.graph.nodes)
    if not all(_made_out_of_place(node) for node in nodes):
        return None
    calls = [node.target for node in nodes if node.op == "call_module"]
    norms = [n for n, m in traced.named_modules() if isinstance(m, _BatchNorm)]
    # The statistics of a norm that is called twice depend on operations before a cut.
    if any(calls.count(name) != 1 for name in norms):
        return None
    users: dict[str, int] = {}
    owner = {path: name for name, paths in layers.items() for path in paths}
    for i, node in enumerate(nodes):
        path = str(node.target)
        if node.op == "get_attr":
            path = path.rpartition(".")[0]
        if node.op in ("call_module", "get_attr") and path in owner:
            users.setdefault(owner[path], i)
    if set(users) != set(layers) or sum(n.op == "placeholder" for n in nodes) != 1:
        return None
    (output,) = (node for node in nodes if node.op == "output")
    if nodes[-1] is not output:
        return None
    return IncrementalExecutor(nodes[:-1], output.args[0], traced, users)


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


def _bytes(values: Iterable[Any]) -> int:
    return sum(v.nbytes for v in values if isinstance(v, Tensor))
