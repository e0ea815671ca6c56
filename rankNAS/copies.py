"""Copies of models, and passes that leave nothing behind in them.

Some modules keep tensors of a forward pass: attention maps, caches, or the weight that
``weight_norm`` computes. Such a tensor has a graph, and ``copy.deepcopy`` refuses it.
"""

from __future__ import annotations

import copy
import math
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["copied", "evaluating", "unchanged", "without_graphs"]

T = TypeVar("T", bound=nn.Module)
#: Attributes of modules that PyTorch and this package change on purpose.
KEPT = frozenset(
    {
        "training",
        "_parameters",
        "_modules",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
MAPS = Path("/proc/self/smaps")  # of Linux; elsewhere all tensors are copied
LARGE = 1 << 16  # bytes of a tensor from which looking for its file is worth while
ATOMIC = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, str, bytes)


def copied(model: T, memo: Mapping[int, Any] | None = None) -> T:
    """A deep copy of a model; tensors with a graph are copied without it.

    Parameters and buffers in files that are mapped, such as those of safetensors, are mapped once
    more instead. Such a copy takes no memory until it is changed, and is as independent.

    Args:
        model: The model; it is not changed.
        memo: By ``id``, the objects that take the place of others in the copy.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> model.last = model(torch.zeros(1, 2))
        >>> copied(model).last.requires_grad
        False
    """
    found = dict(memo or {})
    for tensor in _with_graph(model):
        found.setdefault(id(tensor), tensor.detach().clone())
    for number, tensor in _mapped_again(model).items():
        found.setdefault(number, tensor)
    with torch.no_grad():  # a TorchScript program would keep the graph of the copying
        network = copy.deepcopy(model, found)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            own = network.get_submodule(name)
            for parameter, new in zip(module.parameters(), own.parameters(), strict=True):
                new.requires_grad_(parameter.requires_grad)
    return network


def _mapped_again(model: nn.Module) -> dict[int, Tensor]:
    """By ``id``, new tensors for those that lie in mapped files whose pages are unchanged."""
    if not MAPS.exists():
        return {}
    own = [*model.parameters(), *model.buffers()]
    plain = [t for t in own if t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)]
    plain = [t for t in plain if t.nbytes >= LARGE and t.layout == torch.strided]
    if not plain:
        return {}
    regions, storages, found = _unchanged_files(), {}, {}
    for tensor in plain:
        storage = tensor.untyped_storage()
        place = bisect_right(regions, (storage.data_ptr(), math.inf)) - 1
        if place < 0:
            continue
        start, end, offset, path = regions[place]
        if storage.data_ptr() + storage.nbytes() > end:
            continue
        if path not in storages:
            storages[path] = torch.UntypedStorage.from_file(path, False, os.path.getsize(path))
        first = offset + storage.data_ptr() - start
        part = storages[path][first : first + storage.nbytes()]
        new = torch.empty(0, dtype=tensor.dtype).set_(
            part, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        is_parameter = isinstance(tensor, nn.Parameter)
        found[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return found


def _unchanged_files() -> list[tuple[int, int, int, str]]:
    """Start, end, offset and path of the mapped files that no write has changed, in order."""
    found: list[tuple[int, int, int, str]] = []
    region: tuple[int, int, int, str] | None = None
    for line in MAPS.read_text().splitlines():
        parts = line.split(maxsplit=5)
        if "-" in parts[0]:
            region = None
            if len(parts) == 6 and parts[5].startswith("/") and "w" in parts[1]:
                start, end = (int(x, 16) for x in parts[0].split("-"))
                with suppress(OSError):  # a file that has been removed
                    if os.stat(parts[5]).st_ino == int(parts[4]):
                        region = start, end, int(parts[2], 16), parts[5]
        elif region is not None and parts[0] == "Anonymous:" and int(parts[1]) == 0:
            found.append(region)
    return sorted(found)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Context after which the model's modules have the attributes that they had before.

    What forward passes store in attributes, lists, dicts and buffers is removed again. Values
    that are changed in place, such as running statistics, keep their changes.

    Args:
        model: The model.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> with unchanged(model):
        ...     model.last = model(torch.zeros(1, 2))
        >>> hasattr(model, "last")
        False
    """
    before = [(module, _state(module)) for module in _plain_modules(model, LazyModuleMixin)]
    try:
        yield
    finally:
        for module, state in before:
            _restore(module, state)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context with a model in evaluation mode, which ends as it was; see `unchanged`.

    Args:
        model: The model.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
        >>> with evaluating(model):
        ...     model.training
        False
        >>> [module.training for module in model]
        [True, False]
    """
    training = [module for module in model.modules() if module.training]
    try:
        with unchanged(model):
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_graphs(model: nn.Module) -> Iterator[None]:
    """Context of a training, after which no module keeps a tensor with a graph.

    New attributes with such tensors are removed, containers become what they were, and tensors
    lose their graph. Counters and running averages keep what the training has stored.

    Args:
        model: The model.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> with without_graphs(model):
        ...     model.steps, model.last = 1, model(torch.zeros(1, 2))
        >>> model.steps, hasattr(model, "last")
        (1, False)
    """
    before = {module: _state(module) for module in _plain_modules(model)}
    try:
        yield
    finally:
        for module in _plain_modules(model):
            state = before.get(module, {})
            own = vars(module)
            for name in [name for name in own if name not in KEPT]:
                if isinstance(own[name], Tensor) and name in state:  # such as a computed weight
                    own[name] = own[name].detach()
            _restore(module, state, {"_buffers", *_without_graph(own)})
        for tensor in list(_with_graph(model)):
            with suppress(RuntimeError):  # a view
                tensor.detach_()


def _plain_modules(model: nn.Module, *others: type) -> Iterator[nn.Module]:
    """The modules of a model except TorchScript, whose attributes are its own, and `others`."""
    kinds = (torch.jit.ScriptModule, *others)
    return (module for module in model.modules() if not isinstance(module, kinds))


def _state(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """By attribute, its value and the contents of a container; modules keep their parts."""
    return {
        name: (value, _contents(value)) for name, value in vars(module).items() if name not in KEPT
    }


def _contents(value: Any) -> Any:
    """A shallow copy of a container that a pass may extend; None for anything else."""
    return copy.copy(value) if isinstance(value, list | dict | set | deque) else None


def _restore(
    module: nn.Module, state: Mapping[str, tuple[Any, Any]], kept: Collection[str] = ()
) -> None:
    """Give a module the attributes of `state`, except those whose names are in `kept`."""
    own = vars(module)
    for name in [name for name in own if name not in state]:
        if name not in KEPT and name not in kept:
            del own[name]
    # A layer that the first pass has built is registered, and was an attribute before.
    leave = {*module._parameters, *module._modules, *module._buffers, *kept}
    for name, (value, contents) in state.items():
        if name in leave:
            continue
        own[name] = value
        if contents is not None and not _same(value, contents):
            value.clear()
            if isinstance(value, dict | set):
                value.update(contents)
            else:
                value.extend(contents)


def _same(value: Any, contents: Any) -> bool:
    """Whether a container has the same objects in the same places."""
    if len(value) != len(contents):
        return False
    if isinstance(value, dict):
        pairs = zip(value.items(), contents.items(), strict=True)
        return all(a == b and x is y for (a, x), (b, y) in pairs)
    return all(x is y for x, y in zip(value, contents, strict=True))


def _without_graph(attributes: Mapping[str, Any]) -> list[str]:
    """The names of the attributes that reach no tensor with a graph."""
    found = (name for name in attributes if name not in KEPT)
    return [name for name in found if next(_with_graph(attributes[name]), None) is None]


def _with_graph(model: Any) -> Iterator[Tensor]:
    """The tensors with a graph that a model reaches through attributes and containers."""
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, ATOMIC):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, Mapping):
            waiting += list(value.values())
        elif isinstance(value, list | tuple | set | frozenset | deque):
            waiting += list(value)
        elif hasattr(value, "__dict__"):
            waiting += list(vars(value).values())
