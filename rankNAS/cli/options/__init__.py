"""The options of the commands; each is one field of a dataclass."""

from __future__ import annotations

from rankNAS.cli.options.compare import CompareOptions
from rankNAS.cli.options.search import SearchOptions, check_name

__all__ = ["CompareOptions", "SearchOptions", "check_name"]
