"""Pareto fronts against the definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rankNAS.pareto import non_dominated

points = arrays(
    float, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(0, 3).map(float)
)


@given(points)
def test_the_definition(values: np.ndarray) -> None:
    expected = [
        not any(all(q >= p) and any(q > p) for q in values)  # q dominates p
        for p in values
    ]
    assert non_dominated(values).tolist() == expected


@given(points)
def test_someone_is_always_on_the_front(values: np.ndarray) -> None:
    assert non_dominated(values).any()


@given(points, st.randoms())
def test_order_does_not_matter(values: np.ndarray, random: object) -> None:
    order = np.arange(len(values))
    random.shuffle(order)
    assert non_dominated(values[order]).tolist() == non_dominated(values)[order].tolist()


def test_one_objective_keeps_all_of_the_best() -> None:
    assert non_dominated([[1.0], [3.0], [3.0], [2.0]]).tolist() == [False, True, True, False]


def test_equal_points_stay_together() -> None:
    assert non_dominated([[1.0, 2.0], [1.0, 2.0], [0.0, 2.0]]).tolist() == [True, True, False]
