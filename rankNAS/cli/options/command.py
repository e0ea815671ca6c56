"""The command line equivalent to given options."""

from __future__ import annotations

import shlex

from rankNAS.cli.options.fields import specs
from rankNAS.cli.options.search import SearchOptions

__all__ = ["reproduction"]


def reproduction(options: SearchOptions) -> str:
    """The command that starts the same search, with all options that differ from the defaults."""
    words = ["ranknas", "search"]
    for spec in specs(type(options)):
        value, name = getattr(options, spec.name), spec.flag
        is_default = value == spec.default and spec.name != "space"
        if spec.name in ("out", "study") or is_default:
            continue
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
            continue
        for item in value if isinstance(value, list) else [value]:
            words += [name, shlex.quote(str(item))]
    return " ".join(words)
