"""Names of version 0.1 that have changed: the tables, and what accepts an old name with a warning.

An old name works as before and gives a `RenamedWarning` that says the new one.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

__all__ = [
    "OBJECTIVES",
    "OPTIONS",
    "RenamedWarning",
    "current_name",
    "renamed",
    "renamed_exports",
    "warn_renamed",
]

#: Options of the command line, as the fields of its dataclasses and the keys of its files.
OPTIONS = {
    "metric": "norm",
    "latency_steps": "latency_tolerance",
    "only_faster": "require_speedup",
}
#: Names of objectives.
OBJECTIVES = {"agreement": "kl_divergence", "reverse_agreement": "reverse_kl"}

T = TypeVar("T")


class RenamedWarning(FutureWarning):
    """An old name was used. Python shows a FutureWarning to end users too."""


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn that a name has changed.

    Args:
        old: The name that was used.
        new: The name to use.
        stacklevel: 2 blames the caller of this function, 3 that one's caller, and so on.
    """
    warnings.warn(f"{old} is now {new}.", RenamedWarning, stacklevel=stacklevel + 1)


def current_name(names: Mapping[str, str], given: str, *, what: str, stacklevel: int = 2) -> str:
    """The current form of a name, with a warning if an old one is given.

    Args:
        names: Old name to new name.
        given: The name in question; one that is not in the table is returned as it is.
        what: What is named, for the warning.
        stacklevel: As for `warn_renamed`.
    """
    if given not in names:
        return given
    new = names[given]
    warn_renamed(f"{what} {given!r}", repr(new), stacklevel=stacklevel + 1)
    return new


def renamed(**names: str) -> Callable[[type[T]], type[T]]:
    """A class decorator that accepts old names, each as ``old="new"``.

    The old name is accepted as a keyword of the constructor, as an attribute or a method of an
    instance, and as a method that a subclass overrides. Where a constructor is given both names
    the old one holds, because `dataclasses.replace` fills in the new one by itself.

    >>> from dataclasses import dataclass
    >>> @renamed(colour="color")
    ... @dataclass
    ... class Box:
    ...     color: str = "red"
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     Box(colour="blue").color
    'blue'
    >>> print(caught[0].message)
    Box(colour=) is now Box(color=).
    """

    def decorate(cls: type[T]) -> type[T]:
        if "__init__" in vars(cls):
            _accept_keywords(cls, names)
        for old, new in names.items():
            setattr(cls, old, _OldAttribute(cls, old, new))
        _accept_overrides(cls, names)
        return cls

    return decorate


def renamed_exports(
    module: str, names: Mapping[str, str], otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module some of whose names have changed.

    Args:
        module: Its ``__name__``.
        names: Old name to new name; both are looked up in the module.
        otherwise: The ``__getattr__`` for other names.
    """

    def find(name: str) -> Any:
        if name in names:
            warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
            return getattr(import_module(module), names[name])
        if otherwise is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return otherwise(name)

    return find


class _OldAttribute:
    """Serves the attribute of another name. It has no ``__set__``, so subclasses may reuse it."""

    def __init__(self, home: type, old: str, new: str) -> None:
        self.home, self.old, self.new = home, old, new

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        name = owner.__name__
        warn_renamed(f"{name}.{self.old}", f"{name}.{self.new}")
        if inspect.getattr_static(owner, self.old) is not self:  # super().old() of an override
            return getattr(self.home, self.new).__get__(instance, owner)
        return getattr(instance, self.new)


def _accept_keywords(cls: type, names: Mapping[str, str]) -> None:
    original = cls.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: object, *args: Any, **kwargs: Any) -> None:
        for old, new in names.items():
            if old in kwargs:
                warn_renamed(f"{cls.__name__}({old}=)", f"{cls.__name__}({new}=)")
                kwargs[new] = kwargs.pop(old)
        original(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[misc]


def _accept_overrides(cls: type[T], names: Mapping[str, str]) -> None:
    """Let a subclass that defines a method under its old name override the current one."""

    def init_subclass(subclass: Any, /, **kwargs: Any) -> None:
        super(cls, subclass).__init_subclass__(**kwargs)
        for old, new in names.items():
            own = vars(subclass)
            if callable(own.get(old)) and new not in own:
                name = subclass.__name__
                warn_renamed(f"the method {name}.{old}", f"{name}.{new}")
                setattr(subclass, new, own[old])

    cls.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]
