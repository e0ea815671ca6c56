"""The configuration of a study as JSON, for comparison with that of later sessions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from rankNAS.models.agreement import Modules, Sketches

__all__ = ["canonical", "differences"]

CLASS = "class"
UNKNOWN = "not known"  # to this version, or to the one that created the study


def canonical(value: Any) -> Any:
    """Canonical JSON form of a value: a dataclass becomes its class and the fields in its repr.

    Functions become their names. Other objects become their repr, or their class if the repr is
    only an address.

    >>> canonical({"sizes": (1, 2), "by": object()})
    {'sizes': [1, 2], 'by': 'object'}
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Sketches):
        return value.to_json()
    if isinstance(value, Modules):
        return dict(value.places)
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: canonical(getattr(value, f.name)) for f in _printed(value)}
        return {CLASS: type(value).__qualname__, **own}
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    by_address = repr(value) == object.__repr__(value)
    return type(value).__qualname__ if by_address else repr(value)


def differences(stored: Any, given: Any, name: str = "") -> Iterator[str]:
    """Differences, in words, between a value and a stored one from `canonical`.

    A field that the stored dataclass lacks has its default: the field is newer than the study.

    >>> list(differences({"seed": 0, "sizes": [1]}, {"seed": 1, "sizes": (1,)}))
    ['seed was 0, is 1']
    """
    if isinstance(given, Sketches):
        yield from _other_function(stored, given, name)
        return
    if isinstance(given, Modules):
        if words := given.difference(stored if isinstance(stored, Mapping) else {}):
            yield f"{name} of the model differ ({words})"
        return
    now = canonical(given)
    if not (isinstance(stored, dict) and isinstance(now, dict)):
        if stored != now:
            yield f"{name} was {stored!r}, is {now!r}"
        return
    defaults: dict[str, Any] = {}
    if not is_dataclass(given):
        live = {str(key): item for key, item in given.items()}
    else:
        if stored.get(CLASS) != now[CLASS]:
            yield f"{name} was {stored.get(CLASS, stored)!r}, is {now[CLASS]!r}"
            return
        live = {CLASS: now[CLASS]} | {f.name: getattr(given, f.name) for f in _printed(given)}
        defaults = {f.name: _default(f) for f in _printed(given)}
    for key in sorted({*stored, *now}):
        path = f"{name}.{key}" if name else key
        if key not in now:
            yield f"{path} was {stored[key]!r}, is {UNKNOWN}"
        elif isinstance(live[key], Sketches | Modules):
            # A study from before they were kept may go on.
            yield from differences(stored.get(key, now[key]), live[key], path)
        elif key in stored:
            yield from differences(stored[key], live[key], path)
        elif now[key] != defaults.get(key, MISSING):
            yield f"{path} was {UNKNOWN}, is {now[key]!r}"


def _other_function(stored: Any, given: Sketches, name: str) -> Iterator[str]:
    """A difference if the model computes other values; those of one without any are unknown."""
    try:
        same = not stored or not given.entries or given.agree(stored)
    except ValueError as error:
        yield f"{name} cannot be compared: {error}"
        return
    if not same:
        yield (
            f"{name} of the model on the same data differ, although its weights are the same, as "
            "with another activation or another forward method"
        )


def _printed(value: Any) -> list[Field[Any]]:
    return [field for field in fields(value) if field.repr]


def _default(field: Field[Any]) -> Any:
    """Canonical default of a field; MISSING if it has none."""
    if field.default_factory is not MISSING:
        return canonical(field.default_factory())
    return MISSING if field.default is MISSING else canonical(field.default)
