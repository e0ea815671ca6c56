"""`InputSpec`: the form of a model's arguments, for random arguments without the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankNAS.exceptions import UsageError
from rankNAS.trees import Inputs, is_batched, sample_count

__all__ = ["InputSpec"]

Node = dict[str, Any]  # one entry: its kind and content
MOST_ENTRIES = 1 << 26  # of all tensors for one sample
MOST_AXES = 16
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class InputSpec:
    """The form of a model's arguments.

    Integers are described by their range, so that random tokens stay inside an embedding.

    Args:
        args: The forms of the positional arguments, as JSON values.
        kwargs: The forms of the keyword arguments.

    Example:
        >>> spec = InputSpec.of({"ids": torch.tensor([[3, 1], [0, 7]])})
        >>> spec.kwargs["ids"]["tensor"]
        {'shape': [2], 'dtype': 'int64', 'batched': True, 'least': 0, 'largest': 7}
        >>> spec.random(5).kwargs["ids"].shape
        torch.Size([5, 2])
    """

    args: tuple[Node, ...]
    kwargs: dict[str, Node]

    @classmethod
    def of(cls, inputs: Any) -> InputSpec:
        """The form of example arguments, best of two samples or more; see `Inputs.of`.

        Raises:
            UsageError: An argument is neither a tensor, a plain value, nor a container of them.
        """
        given = Inputs.of(inputs)
        count = sample_count(given)
        return cls(
            tuple(_described(value, count) for value in given.args),
            {str(name): _described(value, count) for name, value in given.kwargs.items()},
        )

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> InputSpec:
        """The form of one floating-point tensor.

        Args:
            shape: Its shape without axis 0.
        """
        return cls.of(torch.zeros(2, *shape))

    @classmethod
    def from_json(cls, content: Any) -> InputSpec:
        """The inverse of `to_json`.

        Raises:
            UsageError: The content is something else.
        """
        try:
            spec = cls(tuple(content["args"]), dict(content["kwargs"]))
            left = MOST_ENTRIES
            for node in (*spec.args, *spec.kwargs.values()):
                left -= _checked(node)
                if left < 0:
                    raise ValueError(f"more than {MOST_ENTRIES} entries for a sample")
            spec.random(2)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UsageError(
                f"a description of a model's inputs is damaged: {type(error).__name__}: {error}."
            ) from None
        return spec

    def to_json(self) -> dict[str, Any]:
        """The form as JSON values."""
        return {"args": list(self.args), "kwargs": dict(self.kwargs)}

    def random(self, count: int = 2, seed: int = 0) -> Inputs:
        """Random arguments: normal numbers, and integers in the range of the example.

        Masks have both values in each row, if the example has both.

        Args:
            count: The number of samples.
            seed: The random seed.
        """
        generator = torch.Generator().manual_seed(seed)
        return Inputs(
            tuple(_drawn(node, count, generator) for node in self.args),
            {name: _drawn(node, count, generator) for name, node in self.kwargs.items()},
        )


def _described(value: Any, count: int | None) -> Node:
    if isinstance(value, Tensor):
        return {"tensor": _tensor(value, count)}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _described(part, count) for key, part in value.items()}}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_described(part, count) for part in value]}
    if isinstance(value, PLAIN):
        return {"value": value}
    raise UsageError(
        f"an argument of the model is a {type(value).__name__}; only tensors, numbers, text and "
        "containers of them can be described in a file."
    )


def _tensor(tensor: Tensor, count: int | None) -> Node:
    batched = is_batched(tensor, count)
    shape = list(tensor.shape[1:] if batched else tensor.shape)
    node: Node = {"shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}
    node["batched"] = batched
    if not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
        node |= {"least": int(tensor.min()), "largest": int(tensor.max())}
    return node


def _checked(node: Any) -> int:
    """The entries of a form's tensors for one sample; raises a ValueError if it is nonsense."""
    ((kind, content),) = node.items()
    if kind == "tensor":
        return _entries(content)
    if kind in ("dict", "tuple", "list"):
        parts = list(content.values()) if kind == "dict" else list(content)
        return len(parts) + sum(map(_checked, parts))
    if kind != "value" or not isinstance(content, PLAIN):
        raise ValueError(f"an entry of the kind {kind!r} has the value {content!r:.80}")
    return 0


def _entries(node: Any) -> int:
    """The entries of a tensor for one sample, from its checked description."""
    shape, batched = list(node["shape"]), node["batched"]
    least, largest = node.get("least", 0), node.get("largest", 0)
    if not isinstance(batched, bool) or not all(map(_is_whole, (*shape, least, largest))):
        raise ValueError(f"a tensor's sizes and range must be whole numbers, got {node!r:.200}")
    if not isinstance(getattr(torch, str(node["dtype"]), None), torch.dtype):
        raise ValueError(f"there is no dtype {node['dtype']!r:.80}")
    if len(shape) > MOST_AXES or any(size < 0 for size in shape):
        raise ValueError(f"a tensor has the shape {shape!r:.80}")
    if not -(2**62) < least <= largest < 2**62:
        raise ValueError(f"integers from {least} to {largest}")
    return math.prod(shape)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _drawn(node: Node, count: int, generator: torch.Generator) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return _random(content, count, generator)
    if kind == "dict":
        return {key: _drawn(part, count, generator) for key, part in content.items()}
    if kind in ("tuple", "list"):
        parts = [_drawn(part, count, generator) for part in content]
        return tuple(parts) if kind == "tuple" else parts
    if kind != "value":
        raise ValueError(f"unknown kind {kind!r}")
    return content


def _random(node: Node, count: int, generator: torch.Generator) -> Tensor:
    shape = [count] * bool(node["batched"]) + list(node["shape"])
    dtype: torch.dtype = getattr(torch, node["dtype"])
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    least, largest = int(node.get("least", 0)), int(node.get("largest", 0))
    drawn = torch.randint(least, largest + 1, shape, generator=generator)
    if largest - least == 1 and drawn.dim() and drawn.shape[-1] > 1:
        # As a mask of padding, whatever it marks, it leaves no row without any position.
        drawn[..., 0], drawn[..., -1] = largest, least
    return drawn.to(dtype)
