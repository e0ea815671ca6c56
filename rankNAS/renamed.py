"""Names of version 0.1 that have changed, and their acceptance with a warning.

An old name works as before and gives a `RenamedWarning` that states the new name.
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
    "OBJECTIVE_CLASSES",
    "OPTIONS",
    "RenamedWarning",
    "current_name",
    "renamed",
    "renamed_exports",
    "warn_renamed",
]

#: Command-line options, as fields of the dataclasses and keys of the files.
OPTIONS = {
    "metric": "norm",
    "latency_steps": "latency_tolerance",
    "only_faster": "require_speedup",
}
#: Names of objectives.
OBJECTIVES = {"agreement": "kl_divergence", "reverse_agreement": "reverse_kl"}
#: Classes of objectives, by the metric that ``Metric`` measures now.
OBJECTIVE_CLASSES = {
    "Accuracy": "accuracy",
    "Agreement": "kl_divergence",
    "Loss": "loss",
    "ReverseAgreement": "reverse_kl",
}

T = TypeVar("T")


class RenamedWarning(FutureWarning):
    """Warning about an old name; a FutureWarning, which Python also shows to end users."""


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn that a name has changed.

    Args:
        old: The name that was used.
        new: The name to use.
        stacklevel: 2 blames the caller of this function, 3 the caller of that one, and so on.
    """
    warnings.warn(f"{old} is now {new}.", RenamedWarning, stacklevel=stacklevel + 1)


def current_name(names: Mapping[str, str], given: str, *, what: str, stacklevel: int = 2) -> str:
    """The current form of a name, with a warning for an old one.

    Args:
        names: Old name to new name.
        given: The given name; a name that is not in the table is returned unchanged.
        what: The kind of name, for the warning.
        stacklevel: As for `warn_renamed`.
    """
    if given not in names:
        return given
    new = names[given]
    warn_renamed(f"{what} {given!r}", repr(new), stacklevel=stacklevel + 1)
    return new


def renamed(**names: str) -> Callable[[type[T]], type[T]]:
    """A class decorator that accepts old names, each as ``old="new"``.

    The old name is accepted as a keyword of the constructor, as an attribute or method of an
    instance, and as a method that a subclass overrides. If a constructor receives both names, the
    old one takes precedence, because `dataclasses.replace` fills in the new one by itself.

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
    """The ``__getattr__`` of a module with renamed members.

    Args:
        module: The ``__name__`` of the module.
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
    """Alias of another attribute. It has no ``__set__``, so subclasses may reuse the name."""

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
    """Make a subclass method with an old name override the current method."""

    def init_subclass(subclass: Any, /, **kwargs: Any) -> None:
        super(cls, subclass).__init_subclass__(**kwargs)
        for old, new in names.items():
            own = vars(subclass)
            if callable(own.get(old)) and new not in own:
                name = subclass.__name__
                warn_renamed(f"the method {name}.{old}", f"{name}.{new}")
                setattr(subclass, new, own[old])

    cls.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]
