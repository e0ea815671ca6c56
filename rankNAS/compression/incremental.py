"""Forward passes that begin where a network begins to differ from the last one.

The forward pass is traced into a list of operations, cut before each searched layer. What is alive
at a cut is kept, so that after a change of some layers only what follows the first of them is
computed again. A network that cannot be traced faithfully is simply run as a whole.
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
MEMORY = 1 << 30  # bytes of activations that one pass may keep
OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class IncrementalExecutor:
    """The operations of a network, in order, and where each searched layer is first used.

    Args:
        nodes: Without the output node.
        result: What the network returns.
        network: The traced network, without in-place operations; it shares its modules.
        cut_points: By layer, the number of the first operation that depends on it.
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
        """Trace a model, which loses its in-place activations.

        Args:
            model: In evaluation mode.
            layers: By layer, every path of it in the model.
            examples: Inputs on which the traced network must agree with the model.

        Returns:
            None if the model cannot be traced, or depends on more than the trace shows.
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
        """Run the operations from number `start` on.

        Args:
            values: What is alive at `start`.
            start: Number of the first operation.
            x: The network's input.
            keep: Numbers of operations before which what is alive is kept.
            stop: Number of the operation to stop before; None runs to the end.

        Returns:
            The network's output (None if stopped) and what was kept.
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
        """What is alive before operation `stop`, given what is alive before `start`."""
        if start == stop:
            return values
        live_values = dict(values)
        self._compute(live_values, start, stop, x, {}, set())
        return live_values

    def input_of(self, number: int, values: dict[fx.Node, Any]) -> Tensor:
        """The first argument of an operation, given what is alive before it."""
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
        """Run operations, updating `live_values`; `kept` gets the live values at some."""
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
    """Repeated forward passes over the same inputs, each from the first change on.

    Args:
        stages: The traced network.
        batches: Its inputs.
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
        """The operations from number `first` on have changed."""
        self._outputs = None
        for cut in [c for c in self._kept if c > first]:
            del self._kept[cut]

    @property
    def start(self) -> int:
        """Number of the operation that the next run begins with; past the end if none."""
        if self._outputs is not None:
            return len(self.stages.nodes)
        return max(self._kept, default=0)

    @torch.no_grad()
    def run(self) -> list[Any]:
        """The outputs of all batches; nothing is computed that has not changed."""
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
        """As many evenly spaced cuts as the memory allows."""
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
    # Statistics of a norm that is called twice would depend on what comes before a cut.
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
    """Make an operation leave its inputs alone; false if that is not possible."""
    if node.op == "call_function":
        node.target = OUT_OF_PLACE.get(node.target, node.target)
        name = getattr(node.target, "__name__", "")
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        flags = any(argument is True for argument in node.args)  # perhaps `inplace`, by position
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
