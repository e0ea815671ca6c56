"""Options as a TOML file: ``--config`` reads it, ``--print-config`` prints it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from rankNAS.cli.options.fields import (
    PANELS,
    Options,
    Spec,
    checked,
    specs,
    with_current_names,
)
from rankNAS.exceptions import UsageError

__all__ = ["read_toml", "to_toml"]

WIDTH = 80


def read_toml(path: Path, cls: type) -> dict[str, Any]:
    """The options in a TOML file.

    Args:
        path: The file.
        cls: The dataclass of the options.

    Raises:
        UsageError: The file cannot be read, is not TOML, or contains an unknown option or a wrong
            value.
    """
    import tomllib

    try:
        content = tomllib.loads(path.read_text("utf-8"))
        return checked(cls, with_current_names(cls, content, str, f"{path}: "))
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"`--config` {str(path)!r} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`--config` {str(path)!r}: {_one_line(error)}.") from None


def to_toml(options: Options) -> str:
    """Options as TOML for `read_toml`; options without a value become comments.

    Passwords are omitted.
    """
    values = options.to_json()
    parts = []
    for panel in PANELS:
        shown = [spec for spec in specs(type(options)) if spec.option.panel == panel]
        if shown:
            parts.append("\n".join([f"# {panel}", "", *(_entry(s, values) for s in shown)]))
    return "\n\n".join(parts) + "\n"


def _entry(spec: Spec, values: dict[str, Any]) -> str:
    import tomli_w

    value = values[spec.name]
    comment = textwrap.fill(spec.option.help, WIDTH, initial_indent="# ", subsequent_indent="# ")
    if value is None:
        return f"{comment}\n# {spec.name} is not set"
    return f"{comment}\n{tomli_w.dumps({spec.name: value}).rstrip()}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
