"""Nested containers of tensors: the items and batches of data sets, and the inputs of models.

A container is a mapping, a tuple, a list or a dataclass. Everything else is a leaf; functions of
this module change tensors and leave other leaves as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankNAS.exceptions import DataError

__all__ = [
    "Inputs",
    "channels_last",
    "count_bytes",
    "device_of",
    "floating_tensors",
    "has_images",
    "is_batched",
    "map_children",
    "named_tensors",
    "rows",
    "sample_count",
    "size_of",
    "tensors",
    "to_device",
    "tree_map",
    "type_difference",
    "with_size",
    "without_cache",
    "same_tensors",
]


class Inputs(NamedTuple):
    """The arguments of a model's forward pass.

    Some models change their arguments in place; see `copied`.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Example:
        >>> inputs = Inputs.of(torch.zeros(2, 3))
        >>> inputs.run(nn.Linear(3, 4)).shape
        torch.Size([2, 4])
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, given: Any) -> Inputs:
        """A tensor, a tuple of positional or a mapping of keyword arguments, as arguments."""
        if isinstance(given, Inputs):
            return given
        if isinstance(given, Mapping):
            return cls((), dict(given))
        if isinstance(given, tuple | list):
            return cls(tuple(given), {})
        return cls((given,), {})

    def run(self, model: nn.Module) -> Any:
        """The model's output; a model of ``transformers`` keeps no cache of keys and values."""
        with without_cache(model):
            return model(*self.args, **self.kwargs)

    def copied(self) -> Inputs:
        """The arguments with their own tensors and containers, for a model that changes them."""
        found: Inputs = tree_map(torch.clone, self)
        return found

    @property
    def first(self) -> Any:
        """The first argument; None if there are no arguments."""
        return next(iter((*self.args, *self.kwargs.values())), None)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Context in which a model of ``transformers`` keeps no keys and values for later tokens.

    Its configuration ends as it was.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", None) is not True:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def tree_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same containers, with every tensor replaced by the function's value of it."""
    if isinstance(tree, Tensor):
        return function(tree)
    return map_children(lambda value: tree_map(function, value), tree)


def map_children(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same container with changed elements; leaves are unchanged."""
    if isinstance(tree, Mapping):
        mapped = {key: function(value) for key, value in tree.items()}
        return mapped if type(tree) is dict else _rebuilt(tree, mapped)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(function, tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map(function, tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [part.name for part in dataclasses.fields(tree) if part.init]
        return dataclasses.replace(tree, **{n: function(getattr(tree, n)) for n in names})
    return tree


def _rebuilt(tree: Mapping[Any, Any], mapped: dict[Any, Any]) -> Any:
    """A mapping of the same type, such as a ``BatchEncoding``; a dict if that is impossible."""
    try:
        return type(tree)(mapped)  # type: ignore[call-arg]
    except Exception:
        return mapped


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors with their places, such as ``labels`` or ``[0][1]``, in order."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from named_tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, tuple | list):
        for i, value in enumerate(tree):
            yield from named_tensors(value, f"{name}[{i}]")
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for part in dataclasses.fields(tree):
            inner = f"{name}.{part.name}" if name else part.name
            yield from named_tensors(getattr(tree, part.name), inner)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors, in order."""
    return [tensor for _, tensor in named_tensors(tree)]


def floating_tensors(tree: Any) -> list[Tensor]:
    """The tensors of floating-point numbers, in order."""
    return [tensor for tensor in tensors(tree) if tensor.is_floating_point()]


def type_difference(model: nn.Module, inputs: Inputs) -> str:
    """A sentence about inputs of another floating-point type than the weights; "" if none is."""
    given = {x.dtype for x in floating_tensors(inputs)}
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not given or not own or given & own:
        return ""
    found, wanted = (
        ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        for types in (given, own)
    )
    return (
        f"the inputs are {found} and the weights {wanted}: convert the data to {wanted}, or the "
        f"model with `model.to(torch.{found})`; "
    )


def size_of(tree: Any) -> int:
    """The number of samples of a batch: the common length of axis 0 of its tensors.

    A list inside a batch may also hold one element a sample, such as images of unequal size.

    Raises:
        DataError: The batch has no tensor with an axis, or their lengths differ.
    """
    parts = list(_parts(tree))
    sizes = [_sizes(value) for _, value in parts]
    known = [(name, found) for (name, _), found in zip(parts, sizes, strict=True) if found]
    if not known:
        raise DataError(
            f"a batch is a {type(tree).__name__} without tensors that have an axis of samples; "
            "return batches whose tensors have one sample along axis 0."
        )
    common = set.intersection(*(found for _, found in known))
    if not common:
        listed = ", ".join(f"{name or 'the tensor'} has {min(found)}" for name, found in known)
        raise DataError(
            f"the parts of a batch differ in the number of samples along axis 0: {listed}; "
            "return batches of equal lengths, or give a `collate_fn` that makes them equal."
        )
    return min(common)


def sample_count(tree: Any) -> int | None:
    """The number of samples of a model's arguments; None if no tensor has an axis.

    Some arguments, such as a causal mask, may have no axis of samples. If lengths differ, the
    first argument decides.
    """
    try:
        return size_of(tree)
    except DataError:
        return next((len(x) for x in tensors(tree) if x.dim()), None)


def is_batched(tensor: Tensor, count: int | None) -> bool:
    """Whether axis 0 of a tensor is that of the samples."""
    return bool(tensor.dim()) and len(tensor) == count


def _parts(tree: Any, name: str = "", top: bool = True) -> Iterator[tuple[str, Any]]:
    """Tensors, and lists below the top, with their places."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _parts(value, f"{name}.{key}" if name else str(key), False)
    elif isinstance(tree, tuple) or (isinstance(tree, list) and top):
        for i, value in enumerate(tree):
            yield from _parts(value, f"{name}[{i}]", False)
    elif isinstance(tree, list):
        yield name, tree
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for part in dataclasses.fields(tree):
            inner = f"{name}.{part.name}" if name else part.name
            yield from _parts(getattr(tree, part.name), inner, False)


def _sizes(part: Any) -> set[int]:
    """The possible numbers of samples of a tensor or a list; empty if it says nothing."""
    if isinstance(part, Tensor):
        return {len(part)} if part.dim() else set()
    found = {len(part)}
    lengths = {len(x) if isinstance(x, Tensor) and x.dim() else -1 for x in part}
    return found | (lengths if len(lengths) == 1 and lengths != {-1} else set())


def rows(tree: Any, wanted: Tensor | slice, size: int, *, top: bool = True) -> Any:
    """Some samples of a batch.

    Args:
        tree: The batch.
        wanted: Positions (n,), one position (), or a slice.
        size: The number of samples of the batch. Tensors of another length stay whole.
        top: Whether the tree is the whole batch; a list then holds its parts.
    """
    if isinstance(tree, Tensor):
        if not tree.dim() or len(tree) != size:
            return tree
        return tree[wanted if isinstance(wanted, slice) else wanted.to(tree.device)]
    if isinstance(tree, list) and not top and len(tree) == size:
        if isinstance(wanted, slice) or not wanted.dim():
            return tree[wanted if isinstance(wanted, slice) else int(wanted)]
        return [tree[i] for i in wanted.tolist()]
    return map_children(lambda value: rows(value, wanted, size, top=False), tree)


def with_size(tree: Any, size: int) -> Any:
    """The batch, repeated or cut to a number of samples."""
    count = size_of(tree)

    def resized(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        return tensor.repeat(math.ceil(size / count), *[1] * (tensor.dim() - 1))[:size]

    return tree_map(resized, tree)


def to_device(tree: Any, device: str | torch.device) -> Any:
    """The batch on a device."""
    return tree_map(lambda tensor: tensor.to(device), tree)


def channels_last(tree: Any) -> Any:
    """The batch with floating-point (N, C, H, W) tensors in channels-last memory format.

    This format is the fastest for CPUs and tensor cores. Other tensors are unchanged.
    """

    def placed(tensor: Tensor) -> Tensor:
        if not _are_images(tensor):
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)

    return tree_map(placed, tree)


def has_images(tree: Any) -> bool:
    """Whether a tensor is floating-point with the shape (N, C, H, W)."""
    return any(map(_are_images, tensors(tree)))


def _are_images(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point()


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def count_bytes(tree: Any) -> int:
    """The bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors(tree))


def same_tensors(a: Any, b: Any) -> bool:
    """Whether two trees have equal tensors in equal places."""
    first, second = dict(named_tensors(a)), dict(named_tensors(b))
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
