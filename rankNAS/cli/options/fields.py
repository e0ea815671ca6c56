"""Options as dataclass fields: type, default, and further properties.

The command line, the configuration files and their checks are all generated from these fields.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from rankNAS.exceptions import UsageError
from rankNAS.renamed import OPTIONS, warn_renamed

__all__ = [
    "PANELS",
    "Option",
    "Options",
    "Spec",
    "argument",
    "changed",
    "checked",
    "flag",
    "option",
    "specs",
    "with_current_names",
]

MODEL = "Model and data"
GOAL = "Goal"
SEARCH = "Search"
RANKS = "Ranks and operators"
EVALUATION = "Calibration and evaluation"
TRAINING = "Training"
HARDWARE = "Hardware"
RUNNING = "Running"
OUTPUT = "Output"
#: The panels of a command's help, in this order.
PANELS = (MODEL, GOAL, SEARCH, RANKS, EVALUATION, TRAINING, HARDWARE, RUNNING, OUTPUT)
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}

T = TypeVar("T")
_specs: dict[type, tuple[Spec, ...]] = {}


@dataclass(frozen=True)
class Option:
    """Properties of an option besides its name, type and default.

    Args:
        help: Its help text.
        panel: Its panel in the help; one of `PANELS`.
        hidden: Whether it is hidden in the help; it is still accepted.
        min: The minimum value.
        max: The maximum value.
        negatable: Whether a flag has a second form ``--no-...``.
        positional: Whether it is given by its position, without a name.
        renamed_values: Old values, with their replacements.
    """

    help: str
    panel: str
    hidden: bool = False
    min: float | None = None
    max: float | None = None
    negatable: bool = False
    positional: bool = False
    renamed_values: Mapping[str, str] = field(default_factory=dict)


def option(default: T, help: str, panel: str, **more: Any) -> T:
    """A field of a dataclass that is an option.

    Args:
        default: Its default value.
        help: As in `Option`.
        panel: As in `Option`.
        more: The other arguments of `Option`.
    """
    metadata = {"option": Option(help, panel, **more)}
    if isinstance(default, list):
        made: Any = field(default_factory=default.copy, metadata=metadata)
        return made  # type: ignore[no-any-return]  # dataclass fields are typed as their values
    return field(default=default, metadata=metadata)


def argument(help: str) -> Any:
    """A field that is a required argument, given by its position."""
    return field(metadata={"option": Option(help, OUTPUT, positional=True)})


def changed(cls: type, name: str, default: T, help: str | None = None) -> T:
    """The option of another class with a new default and, if given, a new help text."""
    known = asdict(_field(cls, name).metadata["option"])
    return option(default, **known | ({} if help is None else {"help": help}))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the dataclasses whose fields are options.

    Raises:
        UsageError: A value is out of its bounds.
    """

    def __post_init__(self) -> None:
        for spec in specs(type(self)):
            value = getattr(self, spec.name)
            if not spec.within_bounds(value):
                raise UsageError(f"`{spec.flag}` must be {spec.bounds}, got {value!r}.")

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Spec:
    """The full specification of one option."""

    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return flag(self.name)

    @property
    def old_names(self) -> list[str]:
        """Its earlier names, still accepted."""
        return [old for old, new in OPTIONS.items() if new == self.name]

    @property
    def plain_kind(self) -> Any:
        """Its type, without the None of an optional one."""
        return get_args(self.kind)[0] if isinstance(self.kind, UnionType) else self.kind

    @property
    def bounds(self) -> str:
        """Its bounds in words."""
        least, most = self.option.min, self.option.max
        if most is None:
            return f"at least {least}"
        return f"from {least} to {most}"

    @property
    def expected(self) -> str:
        """The accepted values in words."""
        words = WORDS.get(self.plain_kind, "a list of texts")
        return words if self.option.min is None else f"{words}, {self.bounds}"

    def within_bounds(self, value: Any) -> bool:
        """Whether a value of the right type is within the bounds; None always is."""
        if value is None or (self.option.min is None and self.option.max is None):
            return True
        least = -math.inf if self.option.min is None else self.option.min
        most = math.inf if self.option.max is None else self.option.max
        return bool(least <= value <= most)

    def takes(self, value: object) -> bool:
        """Whether a value of JSON or TOML has the right type and is within the bounds."""
        return _is(value, self.kind) and self.within_bounds(value)


def flag(name: str) -> str:
    """The name of an option as written on the command line."""
    return f"--{name.replace('_', '-')}"


def specs(cls: type) -> tuple[Spec, ...]:
    """The options of a dataclass."""
    if cls not in _specs:
        hints = get_type_hints(cls)
        _specs[cls] = tuple(
            Spec(f.name, hints[f.name], _default(f), f.metadata["option"])
            for f in fields(cls)
            if "option" in f.metadata
        )
    return _specs[cls]


def checked(cls: type, content: object) -> dict[str, Any]:
    """The options in a parsed JSON or TOML file; all content is checked.

    Args:
        cls: The dataclass of the options.
        content: The content of the file.

    Raises:
        ValueError: It is not a mapping, or contains an unknown option or a wrong value.
    """
    if not isinstance(content, dict):
        raise ValueError(f"expected an object of options, got {_short(content)}")
    known = {spec.name: spec for spec in specs(cls)}
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            guess = f"; expected perhaps {near[0]!r}" if near else ""
            raise ValueError(f"there is no option {_short(name)} (it is {_short(value)}){guess}")
        if not known[name].takes(value):
            raise ValueError(f"{name} is {_short(value)}, expected {known[name].expected}")
    return {
        name: float(value) if _is_float(known[name].kind, value) else value
        for name, value in content.items()
    }


def with_current_names(
    cls: type,
    content: Mapping[str, Any],
    written: Callable[[str], str],
    where: str = "",
) -> dict[str, Any]:
    """Options with their earlier names, and earlier names in their values, replaced.

    Args:
        cls: The dataclass of the options.
        content: Values by name.
        written: Formats a name as in the source. Each replacement gives a `RenamedWarning`.
        where: The source of the options, as a prefix of messages.

    Raises:
        UsageError: An option is given under both of its names.
    """
    found = dict(content)
    for spec in specs(cls):
        for old in spec.old_names:
            if old not in found:
                continue
            earlier, now = where + written(old), written(spec.name)
            if spec.name in found:
                raise UsageError(f"{earlier} is now {now}; give only one of them.")
            warn_renamed(earlier, now)
            found[spec.name] = found.pop(old)
        values = spec.option.renamed_values
        if values and isinstance(found.get(spec.name), list):
            found[spec.name] = _current_values(spec, found[spec.name], where)
    return found


def _current_values(spec: Spec, given: Sequence[Any], where: str) -> list[Any]:
    """The values with earlier names replaced, each with a warning."""
    table, found = spec.option.renamed_values, []
    for value in given:
        known = isinstance(value, str) and value in table
        if known:
            warn_renamed(f"{where}{spec.name} {value!r}", repr(table[value]))
        found.append(table[value] if known else value)
    return found


def _default(known: Field[Any]) -> Any:
    if known.default_factory is not MISSING:
        return known.default_factory()
    return known.default


def _field(cls: type, name: str) -> Field[Any]:
    return next(f for f in fields(cls) if f.name == name)


def _is(value: object, kind: Any) -> bool:
    """Whether a JSON value has the type of an option: plain, a union, or a list of strings."""
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _is_float(kind: Any, value: object) -> bool:
    return type(value) is int and (kind is float or float in get_args(kind))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 130 else f"{text[:130]}…"
