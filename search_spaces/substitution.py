"""Which layers a model would miss: a forward pass with a stand-in at each layer's place.

A decomposed layer is a chain of modules without the attributes of the layer. A model may read
those attributes (``layer.weight.dtype``), use a weight elsewhere, reach the layer by another way
than its place in the tree of modules (a list, a closure), or test its class. Each of these shows
in a pass in which another module stands at the layer's place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rankNAS.copies import evaluating
from rankNAS.search_spaces.experts import balanced_routing
from rankNAS.search_spaces.tracing import in_words
from rankNAS.trees import Inputs

__all__ = ["needed_in_place"]


@torch.no_grad()
def needed_in_place(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    calls: Mapping[str, Sequence[Any]],
    example_inputs: Any,
) -> dict[str, str]:
    """The layers that another module cannot replace, with the reason.

    Args:
        model: The model; unchanged afterwards.
        layers: By layer, all of its paths.
        calls: The calls of each module in an ordinary pass, by its first path.
        example_inputs: The model's arguments.
    """
    if not layers:
        return {}
    watch = _Watch(model, layers)
    try:
        watched = watch.standing_in()
        with evaluating(model), torch.random.fork_rng(devices=[]), balanced_routing(), watched:
            Inputs.of(example_inputs).copied().run(model)
    except Exception as error:
        if watch.reasons:  # the next pass runs without the layers found here
            others = {n: paths for n, paths in layers.items() if n not in watch.reasons}
            return watch.reasons | needed_in_place(model, others, calls, example_inputs)
        if len(layers) == 1:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            return dict.fromkeys(layers, f"the model fails with another module instead ({text})")
        found: dict[str, str] = {}
        names = list(layers)
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            part = {name: layers[name] for name in half}
            found |= needed_in_place(model, part, calls, example_inputs)
        return found
    for name, paths in layers.items():
        if watch.called[name] != sum(len(calls.get(path, ())) for path in paths):
            watch.note(name, "not called if it is of another class")
    return watch.reasons


class _Watch(TorchFunctionMode):
    """Notes every use of a layer that does not go through its stand-in."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self.called: Counter[str] = Counter()
        self.inside: list[str] = []  # layers whose stand-ins are running
        self._model = model
        self._places = dict(model.named_modules())
        self._running = [""]
        self._names: dict[int, str] = {}  # of layers, by identity
        self._parameters: dict[int, tuple[str, str]] = {}
        for name, paths in layers.items():
            for path in paths:
                module = model.get_submodule(path)
                self._names[id(module)] = name
                for kind, parameter in module._parameters.items():
                    self._parameters[id(parameter)] = name, kind

    def note(self, name: str, reason: str) -> None:
        self.reasons.setdefault(name, reason)

    def reader(self) -> str:
        """The innermost running module, for a reason."""
        path = self._running[-1]
        return in_words(path, self._places[path])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            name, kind = self._parameters.get(id(tensor), ("", ""))
            # A read of a data type or a shape gives no tensor and needs no weight in place.
            if name and name not in self.inside and any(True for _ in _tensors((result,))):
                if kind == "bias" and self._has_a_fast_path():
                    continue
                self.note(name, f"its {kind} is used by {self.reader()}, outside its own call")
        return result

    def _has_a_fast_path(self) -> bool:
        """Whether the running module only asks attention for biases to choose a fused kernel."""
        module = self._model.get_submodule(self._running[-1])
        return isinstance(module, nn.TransformerEncoderLayer)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Context with a stand-in at every place of every layer."""
        with ExitStack() as stack:
            stand_ins: dict[int, _StandIn] = {}
            for path, module in list(self._model.named_modules()):
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                name = self._names.get(id(module))
                if name is not None:
                    stand_ins[id(module)] = _StandIn(module, name, self)
                enter, leave = self._hooks(path, name)
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            for parent in list(self._model.modules()):
                for child, module in list(parent._modules.items()):
                    if module is not None and id(module) in stand_ins:
                        parent._modules[child] = stand_ins[id(module)]
                        stack.callback(parent._modules.__setitem__, child, module)
            with self:
                yield

    def _hooks(self, path: str, name: str | None) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: Any) -> None:
            if name is not None and name not in self.inside:
                self.note(name, f"called by {self.reader()} in another way than by its path")
            self._running.append(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            while self._running.pop() != path:
                pass

        return enter, leave


class _StandIn(nn.Module):
    """Calls a layer in its place, and notes what a chain of modules would not have."""

    def __init__(self, layer: nn.Module, name: str, watch: _Watch) -> None:
        super().__init__()
        self.add_module("0", layer)  # its parameters stay those of the model
        self._name, self._watch = name, watch
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(super().__getattr__("0"), name)
            watch = self._watch
            watch.note(self._name, f"its {name} is read by {watch.reader()}, outside its own call")
            return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) != 1 or set(kwargs) - {"input"}:
            self._watch.note(self._name, "called with other arguments than one input")
        layer: Any = super().__getattr__("0")
        self._watch.called[self._name] += 1
        self._watch.inside.append(self._name)
        try:
            return layer(*args, **kwargs)
        finally:
            self._watch.inside.pop()


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    """Tensors among values and inside lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(tuple(value))
