"""Operators: decompositions of a layer. `OPERATORS` is the complete list."""

from __future__ import annotations

from rankNAS.decompositions.base import Factors, Operator, Rank
from rankNAS.decompositions.norms import NORMS, ErrorNorm, NormName, Statistics, Target, make_norm
from rankNAS.decompositions.shapes import Cost, GroupedLinear, LayerShape
from rankNAS.decompositions.svd import GroupSvd, SpatialSvd, Svd
from rankNAS.decompositions.tucker import Tucker2

__all__ = [
    "NORMS",
    "OPERATORS",
    "Cost",
    "Factors",
    "GroupSvd",
    "GroupedLinear",
    "LayerShape",
    "ErrorNorm",
    "NormName",
    "Operator",
    "Rank",
    "SpatialSvd",
    "Statistics",
    "Svd",
    "Target",
    "Tucker2",
    "make_norm",
]

OPERATORS: dict[str, Operator] = {
    operator.name: operator for operator in (Svd(), SpatialSvd(), Tucker2(), GroupSvd())
}
