"""Items of data sets: their parts as tensors, and batches of several items."""

from __future__ import annotations

import dataclasses
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rankNAS.exceptions import DataError
from rankNAS.trees import map_children, named_tensors

__all__ = ["Batch", "Batched", "Collate", "as_tensors", "shapes_of", "stacked"]

#: Any container of tensors that have one sample along axis 0; only the task reads it.
Batch: TypeAlias = Any
#: Makes a batch of a list of items.
Collate: TypeAlias = Callable[[list[Any]], Batch]


class Batched(ABC):
    """A data set of items of equal shape that makes whole batches faster than item by item."""

    @abstractmethod
    def batch(self, indices: Tensor, device: str | torch.device = "cpu") -> Batch:
        """Items ``indices`` (n,) as a batch on a device."""


def as_tensors(value: Any, where: str) -> Any:
    """The same containers, with tensors for numbers, arrays and lists of numbers.

    Args:
        value: An item or a batch.
        where: Its name in messages, such as ``item 3 of the train split``.

    Raises:
        DataError: It contains no tensor, or an image that is not converted to one.
    """
    found = _converted(value, where)
    if next(named_tensors(found), None) is None:
        raise DataError(
            f"{where} is a {type(value).__name__}{_parts(value)} without a tensor, array or "
            "number; convert its inputs, for example with ToTensor."
        )
    return found


def _converted(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "OSUMm":
        return value  # text, dates and other objects
    if isinstance(value, np.ndarray | np.generic | numbers.Number):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{where} has {value!r}, which is no tensor: {error}.") from error
    if isinstance(value, list) and value and _numeric(value):
        try:
            return torch.tensor(value)
        except ValueError:  # rows of unequal lengths
            return value
    if hasattr(value, "getbands"):  # a PIL image
        raise DataError(
            f"{where} contains a {type(value).__name__}; convert it to a tensor, for example with "
            "ToTensor."
        )
    return map_children(lambda part: _converted(part, where), value)


def _numeric(values: list[Any]) -> bool:
    return all(
        isinstance(v, numbers.Number) or (isinstance(v, list) and _numeric(v)) for v in values
    )


def _parts(value: Any) -> str:
    if not isinstance(value, tuple | list):
        return ""
    return f" of ({', '.join(type(part).__name__ for part in value)})"


def stacked(items: Sequence[Any]) -> Batch:
    """The batch of items of equal structure; equal places are stacked along a new axis 0.

    Places that hold no tensors, such as names, become lists.

    Raises:
        DataError: The items differ in structure.
    """
    first = items[0]
    if not all(type(item) is type(first) for item in items):
        kinds = sorted({type(item).__name__ for item in items})
        raise DataError(f"the items of a batch differ in type: {', '.join(kinds)}.")
    if isinstance(first, Tensor):
        return torch.stack(list(items))
    if isinstance(first, Mapping):
        if not all(item.keys() == first.keys() for item in items):
            raise DataError("the items of a batch differ in their keys; make them equal.")
        return {key: stacked([item[key] for item in items]) for key in first}
    if isinstance(first, tuple | list):
        if not all(len(item) == len(first) for item in items):
            raise DataError("the items of a batch differ in their number of parts.")
        parts = tuple(stacked(part) for part in zip(*items, strict=True))
        return type(first)(*parts) if hasattr(first, "_fields") else parts
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [part.name for part in dataclasses.fields(first) if part.init]
        values = {name: stacked([getattr(item, name) for item in items]) for name in names}
        return dataclasses.replace(first, **values)
    return list(items)


def shapes_of(item: Any) -> Hashable:
    """Shapes and dtypes of the tensors by place; items with equal ones can be stacked."""
    return tuple((name, tuple(x.shape), x.dtype) for name, x in named_tensors(item))
