"""Chains of two stages, and the dense layers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rankNAS.decompositions.shapes import GroupedLinear

#: Two stages, the dense layer that they stand for, and the shape of an input.
CASES: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], tuple[int, ...]]] = {
    "linear": (
        lambda: (nn.Linear(9, 4, bias=False), nn.Linear(4, 7), nn.Linear(9, 7)),
        (5, 9),
    ),
    "grouped linear": (
        lambda: (GroupedLinear(12, 6, 3, bias=False), nn.Linear(6, 5), nn.Linear(12, 5)),
        (5, 12),
    ),
    "convolution": (
        lambda: (
            nn.Conv2d(6, 4, 3, padding=1, bias=False),
            nn.Conv2d(4, 5, 1),
            nn.Conv2d(6, 5, 3, padding=1),
        ),
        (2, 6, 5, 5),
    ),
    "spatial": (
        lambda: (
            nn.Conv2d(6, 4, (3, 1), stride=(2, 1), bias=False),
            nn.Conv2d(4, 5, (1, 3), stride=(1, 2), bias=False),
            nn.Conv2d(6, 5, 3, stride=2, bias=False),
        ),
        (2, 6, 7, 7),
    ),
    "groups": (
        lambda: (
            nn.Conv2d(6, 4, 3, groups=2, bias=False),
            nn.Conv2d(4, 5, 1),
            nn.Conv2d(6, 5, 3),
        ),
        (2, 6, 5, 5),
    ),
    "of a grouped layer": (
        lambda: (
            nn.Conv2d(8, 8, 3, groups=4, bias=False),
            nn.Conv2d(8, 6, 1, groups=2),
            nn.Conv2d(8, 6, 3, groups=2),
        ),
        (2, 8, 5, 5),
    ),
}
