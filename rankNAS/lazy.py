"""Lazy imports: classes and functions that are imported on first use.

A catalogue lists entries with one line each, without importing them. A package exports names of
its modules without importing the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar

__all__ = ["Catalogue", "exports", "load"]

T = TypeVar("T")


class Catalogue(Mapping[str, T]):
    """A mapping from names to values that are imported on first use.

    Args:
        entries: By name, the location (``module:attribute``) and a one-line description.
        make: Creates the value from the name and the attribute; the attribute itself by default.

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

    def __contains__(self, name: object) -> bool:  # the inherited method would import the value
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def load(home: str) -> Any:
    """The object that ``module:attribute`` names."""
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


def exports(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that exports names of other modules.

    Args:
        module: The ``__name__`` of the package.
        homes: By name, the defining module.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return load(f"{homes[name]}:{name}")

    return find
