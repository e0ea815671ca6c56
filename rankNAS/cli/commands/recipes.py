"""``ranknas recipes``."""

from __future__ import annotations

from rankNAS.cli.options.common import JsonOptions
from rankNAS.cli.output import print_json, print_table
from rankNAS.recovery.recipe import ENTRIES, RECIPES, option_lines

__all__ = ["run_recipes"]


def run_recipes(options: JsonOptions) -> None:
    """List the recipes with the defaults of their options."""
    columns = "name", "description", "options"
    rows = [
        (name, text, ", ".join(f"{k}={v}" for k, v in option_lines(RECIPES[name]).items()))
        for name, (_, text) in ENTRIES.items()
    ]
    if options.json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table("Recipes", columns, rows, left=len(columns))
