"""``ranknas recipes``."""

from __future__ import annotations

from collections.abc import Mapping

from rankNAS.cli.options.common import JsonOptions
from rankNAS.cli.output import print_json, print_table
from rankNAS.recovery.recipe import ENTRIES, RECIPES, Recipe, option_lines

__all__ = ["run_recipes"]

COLUMNS = "name", "description", "options"


def run_recipes(options: JsonOptions) -> None:
    """List the recipes with the defaults of their options."""
    if options.json:
        every = {name: _joined(option_lines(RECIPES[name])) for name in ENTRIES}
        rows = [(name, text, every[name]) for name, (_, text) in ENTRIES.items()]
        print_json([dict(zip(COLUMNS, row, strict=True)) for row in rows])
        return
    rows = [("(all)", "What every recipe has.", _joined(option_lines(Recipe)))]  # type: ignore[type-abstract]
    rows += [(name, text, _own(RECIPES[name])) for name, (_, text) in ENTRIES.items()]
    print_table("Recipes", COLUMNS, rows, left=len(COLUMNS))


def _own(kind: type[Recipe]) -> str:
    """The options in which a recipe differs from the one that it extends, which is named."""
    base = next(b for b in kind.__mro__[1:] if issubclass(b, Recipe))
    known = option_lines(base)
    own = _joined({k: v for k, v in option_lines(kind).items() if known.get(k) != v})
    return own if base is Recipe else f"as {base.name}; {own}"


def _joined(options: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())
