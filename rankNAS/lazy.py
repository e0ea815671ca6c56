"""Classes and functions that are imported when they are first used.

A catalogue lists what there is, in one line each, without importing any of it; a package exports
the names of its modules without importing them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar

__all__ = ["Catalogue", "exports", "load"]

T = TypeVar("T")


class Catalogue(Mapping[str, T]):
    """A mapping from names to what they stand for, each imported on first use.

    Args:
        entries: By name, where it is (``module:attribute``) and what it is, in one line.
        make: Makes the value from the name and the attribute; by default the attribute is it.

    >>> folders = Catalogue({"path": ("pathlib:Path", "A path.")})
    >>> folders["path"].__name__
    'Path'
    """

    def __init__(
        self,
        entries: Mapping[str, tuple[str, str]],
        make: Callable[[str, Any], T] | None = None,
    ) -> None:
        self._homes = {name: home for name, (home, _) in entries.items()}
        self._make = make
        self._values: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            found = load(self._homes[name])
            self._values[name] = found if self._make is None else self._make(name, found)
        return self._values[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would import it
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def load(home: str) -> Any:
    """What ``module:attribute`` names."""
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


def exports(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that exports names of other modules.

    Args:
        module: Its ``__name__``.
        homes: By name, the module that defines it.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return load(f"{homes[name]}:{name}")

    return find
