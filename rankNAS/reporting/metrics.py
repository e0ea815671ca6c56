"""Names and values of metrics as text, for any task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["metric_name", "metric_text", "quality_names"]


def metric_name(name: str) -> str:
    """The name of a metric in words.

    >>> metric_name("test_kl_divergence")
    'test kl divergence'
    """
    return name.replace("_", " ")


def metric_text(value: float | None) -> str:
    """A metric's value with four decimals, or five digits if it is very small or large.

    >>> metric_text(0.93), metric_text(123456.0), metric_text(None)
    ('0.9300', '1.2346e+05', '')
    """
    if value is None:
        return ""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.5g}"


def quality_names(result: Mapping[str, Any]) -> list[str]:
    """The main metric of a result document and, if there are test data, its test value."""
    main = result["metrics"][0]
    return [name for name in (main, f"test_{main}") if name in result["dense"]]
