"""Operators: ways to decompose a layer. `OPERATORS` is the complete list."""

from __future__ import annotations

from rankNAS.decompositions.base import Factors, Operator, Rank
from rankNAS.decompositions.metrics import (
    METRICS,
    Metric,
    MetricName,
    Statistics,
    Target,
    make_metric,
)
from rankNAS.decompositions.shapes import Cost, GroupedLinear, LayerShape
from rankNAS.decompositions.svd import GroupSvd, SpatialSvd, Svd
from rankNAS.decompositions.tucker import Tucker2

__all__ = [
    "METRICS",
    "OPERATORS",
    "Cost",
    "Factors",
    "GroupSvd",
    "GroupedLinear",
    "LayerShape",
    "Metric",
    "MetricName",
    "Operator",
    "Rank",
    "SpatialSvd",
    "Statistics",
    "Svd",
    "Target",
    "Tucker2",
    "make_metric",
]

OPERATORS: dict[str, Operator] = {
    operator.name: operator for operator in (Svd(), SpatialSvd(), Tucker2(), GroupSvd())
}
