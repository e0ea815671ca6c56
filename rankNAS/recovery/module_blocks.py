"""Blocks of a network that cannot be traced: its modules.

A block is a module of a repeated list, such as the layers of a transformer, and any other layer of
the space is a block of its own.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.recovery.blocks import Blocks, State, main_tensor
from rankNAS.trees import Inputs, map_children, same_tensors, tree_map

__all__ = ["ModuleBlocks", "repeated_modules", "usable_modules"]


class _ReachedError(Exception):
    """The block has been called."""


class ModuleBlocks(Blocks):
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

    def is_linked(self, number: int) -> bool:
        return self._links[number]

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


def repeated_modules(model: nn.Module, paths: set[str]) -> list[str]:
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


def usable_modules(
    model: nn.Module, names: Sequence[str], few: Inputs
) -> tuple[list[str], list[bool]]:
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
        same_tensors(_with_first(a[1], main_tensor(a[2])), b[1])
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
