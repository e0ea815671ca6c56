"""Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["non_dominated"]


def non_dominated(values: npt.ArrayLike | Sequence[Any]) -> npt.NDArray[np.bool_]:
    """Which points no other point dominates; larger is better in every column.

    Args:
        values: (points, objectives).

    Returns:
        (points,), true on the front. Equal points are on it together.

    >>> non_dominated([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]]).tolist()
    [True, True, False]
    """
    v = np.asarray(values, dtype=float)
    as_good = (v[:, None, :] >= v[None, :, :]).all(2)
    better = (v[:, None, :] > v[None, :, :]).any(2)
    dominated: npt.NDArray[np.bool_] = np.any(as_good & better, axis=0)
    return ~dominated
