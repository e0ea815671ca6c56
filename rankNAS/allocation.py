"""Allocations, the solutions of a search: one choice of operator and rank per layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rankNAS.exceptions import UsageError

__all__ = ["DENSE", "Allocation", "Choice"]


@dataclass(frozen=True, order=True)
class Choice:
    """An operator and its rank for one layer.

    Args:
        operator: Name of the operator, or ``"dense"``.
        rank: Integers that determine the size; empty for dense. Their meaning depends on the
            operator: ``(rank,)`` for ``svd``, ``(groups, rank)`` for ``group_svd``,
            ``(rank_out, rank_in)`` for ``tucker2``.

    >>> str(Choice("group_svd", (4, 8)))
    'group_svd:4x8'
    >>> Choice.parse("tucker2:24x16")
    Choice(operator='tucker2', rank=(24, 16))
    """

    operator: str
    rank: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.operator}:{'x'.join(map(str, self.rank))}" if self.rank else self.operator

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The inverse of ``str``.

        Raises:
            UsageError: The text is not of the form ``operator:AxB``.
        """
        operator, _, rank = str(text).partition(":")
        try:
            return cls(operator, tuple(int(r) for r in rank.split("x")) if rank else ())
        except ValueError:
            raise UsageError(
                f"a choice must look like 'svd:16', 'tucker2:24x16' or 'dense', got {text!r}."
            ) from None


DENSE = Choice("dense")


@dataclass(frozen=True)
class Allocation(Mapping[str, Choice]):
    """One choice per layer: an immutable, hashable mapping from layer name to choice.

    Args:
        items_: Pairs of layer name and choice, in the order of the space; equality ignores the
            order.

    >>> a = Allocation.of({"conv1": Choice("svd", (4,)), "conv2": DENSE})
    >>> a["conv1"].rank, len(a)
    ((4,), 2)
    >>> Allocation.from_json(a.to_json()) == a
    True
    """

    items_: tuple[tuple[str, Choice], ...]

    @classmethod
    def of(cls, choices: Mapping[str, Choice]) -> Allocation:
        """An allocation from any mapping of layer name to choice."""
        return cls(tuple(choices.items()))

    @cached_property
    def _choices(self) -> dict[str, Choice]:
        return dict(self.items_)

    @cached_property
    def _hash(self) -> int:
        return hash(frozenset(self.items_))

    def __reduce__(self) -> tuple[Any, ...]:
        # Without cached hashes: string hashes differ between processes.
        return type(self), (self.items_,)

    def __getitem__(self, layer: str) -> Choice:
        return self._choices[layer]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items_)

    def __len__(self) -> int:
        return len(self.items_)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Allocation):
            return False
        return self._hash == other._hash and self._choices == other._choices

    def labels(self) -> dict[str, str]:
        """Layer name to choice as text, for JSON."""
        return {name: str(choice) for name, choice in self.items_}

    def to_json(self) -> str:
        """The allocation as a JSON object of layer name to choice."""
        return json.dumps(self.labels())

    @classmethod
    def from_json(cls, text: str) -> Allocation:
        """The inverse of `to_json`.

        Raises:
            UsageError: The text is not a JSON object of layer names to choices.
        """
        try:
            labels = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"an allocation must be a JSON object: {error}.") from None
        if not isinstance(labels, dict):
            raise UsageError(f"an allocation must be a JSON object, got {type(labels).__name__}.")
        return cls.of({name: Choice.parse(label) for name, label in labels.items()})
