"""Rows of CSV files that the studies of this folder write one by one."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append(path: Path, fields: Sequence[str], row: Mapping[str, Any]) -> None:
    """Append a row to a file, which gets a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame([row], columns=list(fields))
    frame.to_csv(path, mode="a", header=not path.exists(), index=False)
